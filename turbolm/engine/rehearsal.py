"""Steps that nobody asked for, computed while there is nothing to do: they compile the kernels of prompts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from turbolm.engine.batch import StepArrays, num_columns
from turbolm.engine.graph import Limits

#: Decodes, then prompts and tokens of each: kernels have variants for short and long, few and many prompts.
_SHAPES = ((0, 1, 8), (0, 1, 100), (2, 20, 40), (1, 100, 40), (0, 1, 2048))


def rehearsals(limits: Limits) -> Iterator[StepArrays]:
    """Steps within `limits`, the most likely first."""
    for num_decodes, num_prompts, length in _SHAPES:
        num_tokens = num_decodes + num_prompts * length
        fits = num_tokens <= limits.max_batch_tokens and num_decodes + num_prompts <= limits.max_batch_size
        if fits and length <= limits.max_context:
            yield rehearsal([1] * num_decodes + [length] * num_prompts, num_decodes, limits.block_size)


def rehearsal(counts: list[int], num_decodes: int, block_size: int) -> StepArrays:
    """Sequences of so many tokens, all new, which store nothing (slot -1)."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    lengths = np.array(counts, np.int32)
    longest = max(counts)
    chunks = tuple((int(start), count, count) for start, count in zip(starts, counts, strict=False))
    return StepArrays(
        token_ids=np.zeros(starts[-1], np.int32),
        positions=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        slots=np.full(starts[-1], -1, np.int32),
        query_start=starts,
        context_lens=lengths,
        block_tables=np.zeros((len(counts), num_columns(longest, block_size)), np.int32),
        logit_rows=starts[1:] - 1,
        max_query=longest,
        max_context=longest,
        num_decodes=num_decodes,
        chunks=chunks[num_decodes:],
    )
