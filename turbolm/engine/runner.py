"""Runs one scheduled step on a device: builds the batch, runs the model, chooses tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turbolm.engine.sampler import Sampler, token_logprobs
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.types import Batch, TokenLogprob

#: The model's step: a batch → float32 logits [r, v] of its `logit_rows`.
Forward = Callable[[Batch], Tensor]


class Runner:
    """`forward` is the model's call or a replay of it (engine/graph.py): same batch, same results."""

    def __init__(self, forward: Forward, block_size: int, device: torch.device, vocab_size: int) -> None:
        """`vocab_size`: tokens that may be chosen; models pad their logits beyond the tokenizer's."""
        self._forward = forward
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._sampler = Sampler()

    @torch.inference_mode()
    def run(self, step: Step) -> list[StepResult]:
        """One result per item of the step, in its order."""
        rows = [_logit_rows(item) for item in step.items]
        logits = self._forward(self._batch(step, rows))
        first_rows = [0, *itertools.accumulate(len(item_rows) for item_rows in rows)]
        scores = [
            _prompt_logprobs(logits[first : first + len(item_rows)], item)
            for item, item_rows, first in zip(step.items, rows, first_rows, strict=False)
        ]
        sampling = [i for i, item in enumerate(step.items) if item.samples]
        last_rows = [first_rows[i + 1] - 1 for i in sampling]
        logits = logits[:, : self._vocab_size]
        if len(last_rows) != logits.shape[0]:
            logits = logits[torch.tensor(last_rows, dtype=torch.int64, device=logits.device)]
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        if sampling:
            tokens, logprobs = self._sampler.sample(logits, [step.items[i].sequence for i in sampling])
        results = [StepResult((), (), score) for score in scores]
        for i, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            results[i] = StepResult((token,), () if logprob is None else (logprob,), scores[i])
        return results

    def _batch(self, step: Step, rows: list[list[int]]) -> Batch:
        items, size = step.items, self._block_size
        counts = np.array([item.num_new_tokens for item in items], np.int32)
        starts = np.zeros(len(items) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        num_tokens = int(starts[-1])
        token_ids = np.empty(num_tokens, np.int32)
        positions = np.empty(num_tokens, np.int32)
        slots = np.empty(num_tokens, np.int32)
        contexts = np.array([item.start for item in items], np.int32) + counts
        tables = np.zeros((len(items), -(-int(contexts.max()) // size)), np.int32)
        for i, item in enumerate(items):
            sequence, first, last = item.sequence, starts[i], starts[i + 1]
            num_blocks = -(-int(contexts[i]) // size)
            tables[i, :num_blocks] = sequence.blocks[:num_blocks]
            token_ids[first:last] = sequence.token_ids[item.start : item.start + item.num_new_tokens]
            positions[first:last] = np.arange(item.start, contexts[i], dtype=np.int32)
            slots[first:last] = tables[i, positions[first:last] // size] * size + positions[first:last] % size
        logit_rows = np.array(
            [starts[i] + row for i, item_rows in enumerate(rows) for row in item_rows], dtype=np.int32
        )

        def tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
            return torch.from_numpy(array).to(self._device, non_blocking=True)

        return Batch(
            token_ids=tensor(token_ids),
            positions=tensor(positions),
            slots=tensor(slots),
            query_start=tensor(starts),
            context_lens=tensor(contexts),
            block_tables=tensor(tables),
            logit_rows=tensor(logit_rows),
            num_tokens=num_tokens,
            num_sequences=len(items),
            max_query=int(counts.max()),
            max_context=int(contexts.max()),
        )


def _logit_rows(item: ScheduledSequence) -> list[int]:
    """Rows of the item's new tokens whose logits are wanted: those that predict a prompt token whose
    log-probability is asked for (position p predicts token p + 1), and the last where it samples."""
    sequence, count = item.sequence, item.num_new_tokens
    rows: list[int] = []
    if sequence.request.params.prompt_logprobs is not None:
        rows = list(range(min(count, sequence.num_prompt - 1 - item.start)))
    if item.samples and (not rows or rows[-1] != count - 1):
        rows.append(count - 1)
    return rows


def _prompt_logprobs(logits_rv: Tensor, item: ScheduledSequence) -> tuple[TokenLogprob | None, ...]:
    """Entries of the prompt tokens start+1 … start+count, as far as these are in the prompt; in the
    first chunk preceded by None for the first token, which nothing predicts."""
    sequence = item.sequence
    num_top = sequence.request.params.prompt_logprobs
    if num_top is None:
        return ()
    first: tuple[TokenLogprob | None, ...] = (None,) if item.start == 0 else ()
    targets = sequence.request.prompt_token_ids[item.start + 1 : item.start + 1 + item.num_new_tokens]
    # A sampling row may follow those of the prompt.
    return (*first, *token_logprobs(logits_rv[: len(targets)], targets, num_top)) if targets else first
