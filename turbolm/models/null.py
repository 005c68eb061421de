"""A deterministic model without weights, for tests of everything around a model.

The next token is a function of the last token and its position; it never ends by itself. It reads
the last token back from its KV cache, so that a block that was lost or shared wrongly shows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbolm.cache.spec import CacheSpec
from turbolm.kv import KvFormat, KvShape
from turbolm.ops import LayerCache
from turbolm.types import Batch

NULL_VOCABULARY = 258  # bytes and two turn markers; answers are lower-case letters


class NullModel:
    """Logits are 0 for the next token and -10 for the others. A token's hidden state is its id, as read back, and
    its position."""

    cache_spec = CacheSpec((KvShape(1, 1, 1),), KvFormat.both("float32"))

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """float32 logits [r, 258] of the rows `batch.logit_rows`."""
        return self.logits(self.hidden_states(batch, caches), batch)

    def hidden_states(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """float32 [t, 2]"""
        cache = caches[0]
        slots = batch.slots.long()
        block, offset = slots // cache.block_size, slots % cache.block_size
        cache.k[block, 0, offset, 0] = batch.token_ids.float()
        return torch.stack([cache.k[block, 0, offset, 0], batch.positions.float()], dim=1)

    def logits(self, x_th: Tensor, batch: Batch) -> Tensor:
        """float32 [r, 258]"""
        rows = batch.logit_rows.long()
        last, positions = x_th[rows].long().unbind(1)
        chosen = 97 + (last * 31 + positions * 7) % 26
        logits = torch.full((rows.shape[0], NULL_VOCABULARY), -10.0)
        return logits.scatter_(1, chosen.unsqueeze(1), 0.0)
