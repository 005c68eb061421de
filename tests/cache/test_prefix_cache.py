from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from turbolm.cache.block_pool import BlockPool
from turbolm.cache.prefix_cache import BlockKeys, match

SIZE = 4


def keys_of(token_ids, tenant="", adapter=None, block_size=SIZE):
    keys = BlockKeys(token_ids, block_size, tenant, adapter)
    return [keys[index] for index in range(len(token_ids) // block_size)]


tokens = st.lists(st.integers(0, 1), max_size=16)


@given(tokens, tokens)
def test_keys_are_equal_exactly_where_the_tokens_up_to_the_block_are(a, b):
    for index, (key_a, key_b) in enumerate(zip(keys_of(a), keys_of(b), strict=False)):
        end = (index + 1) * SIZE
        assert (key_a == key_b) == (a[:end] == b[:end])


def test_keys_differ_by_tenant_and_adapter():
    names = [("", None), ("", ""), ("a", None), ("", "a"), ("a", "b"), ("ab", None), ("a', 'b", None), ("\ud800", None)]
    assert len({keys_of([1, 2, 3, 4], *name)[0] for name in names}) == len(names)


def test_block_border_matters():
    # Token ids of several bytes, and the same ids in blocks of another size, give other keys.
    assert keys_of([1, 0, 0, 0])[0] != keys_of([256, 0, 0, 0])[0]
    assert keys_of([1, 2, 3, 4], block_size=4)[0] != keys_of([1, 2, 3, 4], block_size=2)[1]


def test_keys_follow_a_growing_sequence():
    token_ids = [1, 2, 3, 4]
    keys = BlockKeys(token_ids, SIZE)
    first = keys[0]
    token_ids += [5, 6, 7, 8]
    assert [first, keys[1]] == keys_of([1, 2, 3, 4, 5, 6, 7, 8])


def fill(pool, token_ids):
    blocks = pool.allocate(len(token_ids) // SIZE)
    for block, key in zip(blocks, keys_of(token_ids), strict=True):
        pool.publish(block, key)
    return blocks


def test_match_finds_the_longest_known_beginning():
    pool = BlockPool(8)
    blocks = fill(pool, [*range(12)])
    other = BlockKeys([0, 1, 2, 3, 4, 5, 6, 7, 99, 9, 10, 11], SIZE)
    assert match(pool, other, 3) == blocks[:2]
    assert match(pool, other, 1) == blocks[:1]
    assert match(pool, other, 0) == []
    assert match(pool, BlockKeys([99, *range(1, 12)], SIZE), 3) == []


def test_a_chain_is_forgotten_from_its_end():
    pool = BlockPool(3)
    token_ids = [*range(12)]
    blocks = fill(pool, token_ids)
    pool.release(reversed(blocks))
    for num_left in (2, 1, 0):
        pool.allocate(1)
        assert match(pool, BlockKeys(token_ids, SIZE), 3) == blocks[:num_left]
