from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from turbolm.cache.block_pool import BlockPool


def test_allocates_each_block_once():
    pool = BlockPool(5)
    blocks = pool.allocate(2) + pool.allocate(3)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert pool.num_available == 0 and pool.num_owned == 5


def test_asking_for_more_than_there_is_is_a_bug():
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 available"):
        BlockPool(2).allocate(3)


def test_released_keyed_block_is_found_and_taken_over():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"k")
    pool.release([block])
    assert (pool.num_available, pool.num_idle) == (2, 1)
    assert pool.find(b"k") == block
    assert pool.count_idle([block]) == 1
    pool.acquire([block])
    assert (pool.num_available, pool.num_idle) == (1, 0)


def test_shared_block_stays_until_its_last_owner_leaves():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.acquire(blocks)
    assert pool.count_sole(blocks) == 0
    pool.release(blocks)
    assert pool.num_available == 0 and pool.count_sole(blocks) == 1
    pool.release(blocks)
    assert pool.num_available == 1


def test_free_blocks_go_before_idle_ones_and_the_longest_idle_first():
    pool = BlockPool(4)
    a, b, c = pool.allocate(3)
    for block, key in ((a, b"a"), (b, b"b"), (c, b"c")):
        pool.publish(block, key)
    pool.release([b])
    pool.release([c, a])
    pool.allocate(1)
    assert [pool.find(key) is not None for key in (b"a", b"b", b"c")] == [True, True, True]
    pool.allocate(1)
    assert [pool.find(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    pool.allocate(1)
    assert [pool.find(key) is not None for key in (b"a", b"b", b"c")] == [True, False, False]


def test_taking_over_renews_an_idle_block():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.publish(a, b"a")
    pool.publish(b, b"b")
    pool.release([a])
    pool.release([b])
    pool.acquire([a])
    pool.release([a])
    pool.allocate(1)
    assert pool.find(b"a") == a and pool.find(b"b") is None


def test_second_block_with_a_key_stays_unkeyed():
    pool = BlockPool(2)
    a, b = pool.allocate(2)
    pool.publish(a, b"same")
    pool.publish(b, b"same")
    pool.release([b, a])
    assert pool.find(b"same") == a
    assert pool.num_idle == 1


class Pool(RuleBasedStateMachine):
    """Random owners against a model that keeps every block's owners and keys in the plainest way."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.owned: list[int] = []  # one entry per ownership
        self.keys: dict[int, bytes] = {}  # of keyed blocks
        self.next_key = 0

    @rule(count=st.integers(0, 3))
    def allocate(self, count):
        if count > self.pool.num_available:
            return
        blocks = self.pool.allocate(count)
        assert not set(blocks) & set(self.owned) and len(set(blocks)) == count
        for block in blocks:
            self.keys.pop(block, None)
        self.owned += blocks

    @rule(data=st.data())
    def publish(self, data):
        candidates = sorted(set(self.owned) - set(self.keys))
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            key = data.draw(st.sampled_from([b"shared", b"%d" % self.next_key]))
            self.next_key += 1
            self.pool.publish(block, key)
            if key not in self.keys.values():
                self.keys[block] = key

    @rule(data=st.data())
    def release(self, data):
        if self.owned:
            self.pool.release([self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))])

    @rule(data=st.data())
    def acquire(self, data):
        candidates = sorted(set(self.owned) | set(self.keys))
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            self.pool.acquire([block])
            self.owned.append(block)

    @invariant()
    def agrees(self):
        if not hasattr(self, "pool"):
            return
        assert self.pool.num_owned == len(set(self.owned))
        assert self.pool.num_idle == len(set(self.keys) - set(self.owned))
        for block, key in self.keys.items():
            assert self.pool.find(key) == block
        assert self.pool.count_sole(set(self.owned)) == sum(self.owned.count(b) == 1 for b in set(self.owned))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
