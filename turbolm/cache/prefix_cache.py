"""Which KV block holds which tokens: prompts that begin the same way share their first blocks.

A block's keys and values depend on its tokens and on all tokens before them, so it is keyed by
a hash chain: SHA-256(key of the block before it, its token ids). The chain starts from the tenant
and the adapter: what one tenant computed can't be found, or probed for by timing, by another.
SHA-256 because prompts come from strangers: a collision would show one's text to another.
Only full blocks are shared, so nobody ever writes to a shared block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from turbolm.cache.block_pool import BlockPool


class BlockKeys:
    """The keys of one sequence's full blocks, each computed once, when first asked for."""

    def __init__(self, token_ids: Sequence[int], block_size: int, tenant: str = "", adapter: object = None) -> None:
        """`token_ids` is read later: it may grow, but what it holds must not change. `adapter`: by its `repr`."""
        self._token_ids = token_ids
        self._block_size = block_size
        self._start = tenant, adapter
        self._keys: list[bytes] = []

    def __getitem__(self, index: int) -> bytes:
        """The key of block `index`, whose tokens must all be known."""
        keys, size = self._keys, self._block_size
        while len(keys) <= index:
            first = len(keys) * size
            tokens = array("q", self._token_ids[first : first + size])
            assert len(tokens) == size, f"block {len(keys)} is not full"
            before = keys[-1] if keys else hashlib.sha256(repr(self._start).encode()).digest()
            keys.append(hashlib.sha256(before + tokens.tobytes()).digest())
        return keys[index]


def match(pool: BlockPool, keys: BlockKeys, limit: int) -> list[int]:
    """The blocks that hold the longest known beginning of a sequence, at most `limit` of them.
    They still have to be acquired."""
    blocks: list[int] = []
    for index in range(limit):
        block = pool.find(keys[index])
        if block is None:
            break
        blocks.append(block)
    return blocks
