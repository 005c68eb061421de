"""Runs one scheduled step on a device: builds the batch, runs the model, chooses tokens."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from turbolm.engine.graph import Forward
from turbolm.engine.sampler import Choice, Sampler, SampleRows, token_logprobs
from turbolm.engine.speculative import num_accepted
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.errors import EngineError
from turbolm.ops.sampling import sample
from turbolm.types import Batch, TokenLogprob


class Runner:
    """`forward` is the model's call or a replay of it (engine/graph.py): same batch, same results."""

    def __init__(
        self,
        forward: Forward,
        block_size: int,
        device: torch.device,
        vocab_size: int,
        sample_rows: SampleRows = sample,
    ) -> None:
        """`vocab_size`: tokens that may be chosen; models pad their logits beyond the tokenizer's.
        `sample_rows` chooses them."""
        self._forward = forward
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._sampler = Sampler(sample_rows)

    @torch.inference_mode()
    def run(self, step: Step) -> list[StepResult]:
        """One result per item of the step, in its order."""
        items = step.items
        rows = [_logit_rows(item) for item in items]
        logits = self._forward(self._batch(step, rows))
        ends = list(itertools.accumulate(len(item_rows) for item_rows in rows))
        scores = [
            _prompt_logprobs(logits[end - len(item_rows) : end], item)
            for item, item_rows, end in zip(items, rows, ends, strict=True)
        ]
        choices = [_choices(item) for item in items]
        choice_rows = [row for its, end in zip(choices, ends, strict=True) for row in range(end - len(its), end)]
        logits = logits[:, : self._vocab_size]
        if len(choice_rows) != logits.shape[0]:
            logits = logits[torch.tensor(choice_rows, dtype=torch.int64, device=logits.device)]
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        if choice_rows:
            tokens, logprobs = self._sampler.sample(logits, list(itertools.chain.from_iterable(choices)))
        results, first = [], 0
        for item, its, score in zip(items, choices, scores, strict=True):
            last = first + len(its)
            results.append(_result(item, tokens[first:last], logprobs[first:last], score))
            first = last
        return results

    def _batch(self, step: Step, rows: list[list[int]]) -> Batch:
        items, size = step.items, self._block_size
        counts = np.array([item.num_tokens for item in items], np.int32)
        first_positions = np.array([item.start for item in items], np.int32)
        starts = np.zeros(len(items) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        num_tokens = int(starts[-1])
        contexts = first_positions + counts
        tables = np.zeros((len(items), -(-int(contexts.max()) // size)), np.int32)
        tokens: list[int] = []
        for i, item in enumerate(items):
            sequence, num_blocks = item.sequence, -(-int(contexts[i]) // size)
            tables[i, :num_blocks] = sequence.blocks[:num_blocks]
            tokens += sequence.token_ids[item.start : item.start + item.num_new_tokens]
            tokens += item.drafts
        token_ids = np.array(tokens, np.int32)
        positions = np.arange(num_tokens, dtype=np.int32) + np.repeat(first_positions - starts[:-1], counts)
        owners = np.repeat(np.arange(len(items)), counts)
        slots = tables[owners, positions // size] * size + positions % size
        logit_rows = np.array(
            [starts[i] + row for i, item_rows in enumerate(rows) for row in item_rows], dtype=np.int32
        )

        def tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
            made = torch.from_numpy(array)
            return made if self._device.type == "cpu" else made.to(self._device, non_blocking=True)

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
    """Rows of the item's tokens whose logits are wanted: those that predict a prompt token whose
    log-probability is asked for (position p predicts token p + 1), and where it samples, the last new
    token's and the drafts'."""
    sequence, count = item.sequence, item.num_new_tokens
    rows: list[int] = []
    if sequence.request.params.prompt_logprobs is not None:
        rows = list(range(min(count, sequence.num_prompt - 1 - item.start)))
    if item.samples:
        rows += range(count - 1, item.num_tokens)
    return rows


def _choices(item: ScheduledSequence) -> list[Choice]:
    """What its last rows of logits are for."""
    if not item.samples:
        return []
    return [Choice(item.sequence, item.drafts[:count]) for count in range(len(item.drafts) + 1)]


def _result(
    item: ScheduledSequence,
    tokens: list[int],
    logprobs: list[TokenLogprob | None],
    prompt_logprobs: tuple[TokenLogprob | None, ...],
) -> StepResult:
    """`tokens`: chosen after each leading part of the drafts. Those that follow a wrong draft are void."""
    count = num_accepted(item.drafts, tokens) + 1 if tokens else 0
    if count and tokens[count - 1] < 0:
        return StepResult(error=EngineError("the model's logits are not numbers, or every token is banned"))
    entries = tuple([entry for entry in logprobs[:count] if entry is not None])
    return StepResult(tuple(tokens[:count]), entries, prompt_logprobs)


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
