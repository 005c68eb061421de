"""Which KV block belongs to whom: counted ownership, and keyed blocks that outlive their owners.

A block is in one of three states:

    owned   one or more sequences hold it
    idle    nobody holds it, but it has a key: its content can still be taken over, until the
            block is given to somebody else (least recently released first)
    free    nobody holds it and its content is worth nothing

This module knows nothing of tokens: a key is any bytes that stand for a block's content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 … `num_blocks`-1. Every operation costs time in the number of blocks it names."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_owners = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._keyed: dict[bytes, int] = {}  # key → block
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently released first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of the caller's own, free ones first; their old content is forgotten."""
        assert count <= self.num_available, f"{count} blocks asked for, {self.num_available} available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._idle.popitem(last=False)
                key = self._keys[block]
                assert key is not None
                del self._keyed[key]
                self._keys[block] = None
            self._num_owners[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these owned or idle blocks; its owners may only read them."""
        for block in blocks:
            if self._num_owners[block] == 0:
                del self._idle[block]
            self._num_owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each. Give a sequence's blocks last to first: then a chain is eventually
        forgotten from its end, as a block without those before it is of no use."""
        for block in blocks:
            owners = self._num_owners[block] - 1
            assert owners >= 0, f"block {block} released by nobody"
            self._num_owners[block] = owners
            if owners == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def publish(self, block: int, key: bytes) -> None:
        """An owned block's content is complete and may be found under `key`. Where another block
        has that key already, this one stays unkeyed."""
        assert self._num_owners[block] > 0 and self._keys[block] is None
        if key not in self._keyed:
            self._keyed[key] = block
            self._keys[block] = key

    def find(self, key: bytes) -> int | None:
        """The block with this content."""
        return self._keyed.get(key)

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of them nobody owns: so many available blocks go when they are acquired."""
        return sum(self._num_owners[block] == 0 for block in blocks)

    def count_sole(self, blocks: Iterable[int]) -> int:
        """How many of these owned blocks become available when one owner releases them."""
        return sum(self._num_owners[block] == 1 for block in blocks)
