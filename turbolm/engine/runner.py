"""Runs one scheduled step on a device: builds the batch, runs the model, chooses tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.engine.batch import lay_out
from turbolm.engine.graph import Forward, ForwardHidden
from turbolm.engine.pooling import Pooler, pooled_rows, sum_rows
from turbolm.engine.sampler import Choice, Sampler, SampleRows, is_plain, no_distribution, token_logprobs
from turbolm.engine.speculative import num_accepted
from turbolm.engine.step import ScheduledSequence, Step, StepResult
from turbolm.ops.sampling import sample
from turbolm.types import Sequence, TokenLogprob


@dataclass(frozen=True, slots=True)
class Completed:
    """A step whose results are there."""

    step_results: list[StepResult]

    def results(self) -> list[StepResult]:
        return self.step_results


class Runner:
    """Computes each step when it is submitted. `forward` is the model's call or a replay of it
    (engine/graph.py): same batch, same results."""

    depth = 1
    num_replays = 0

    def __init__(
        self,
        forward: Forward,
        block_size: int,
        device: torch.device,
        vocab_size: int,
        sample_rows: SampleRows = sample,
        forward_hidden: ForwardHidden | None = None,
    ) -> None:
        """`vocab_size`: tokens that may be chosen; models pad their logits beyond the tokenizer's.
        `sample_rows` chooses them. `forward_hidden`: for requests with pooling; without it there are none."""
        self._forward = forward
        self._forward_hidden = forward_hidden
        self._pooler = Pooler()
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._device = device
        self._sampler = Sampler(sample_rows)
        self._sequences: list[Sequence] = []  # of the last step of decodes
        self._are_plain = False

    def submit(self, step: Step) -> Completed:
        return Completed(self.run(step))

    def warm_up(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is held."""

    @torch.inference_mode()
    def run(self, step: Step) -> list[StepResult]:
        """One result per item of the step, in its order."""
        is_plain = self._has_plain_decodes_only(step)
        rows = [[0]] * len(step.items) if is_plain else [logit_rows_of(item) for item in step.items]
        arrays = lay_out(step, self._block_size, rows)
        batch = arrays.batch(lambda array: torch.from_numpy(array).to(self._device))
        if is_plain:
            return self._choose(self._forward(batch))
        ranges = pooled_rows(step.items)
        if not ranges or self._forward_hidden is None:
            return compute_results(self._forward(batch), step.items, self._sampler, self._vocab_size)[0]
        logits, hidden = self._forward_hidden(batch)
        embeddings = self._pooler.embeddings(step.items, sum_rows(hidden, ranges).cpu())
        results = compute_results(logits, step.items, self._sampler, self._vocab_size)[0]
        return with_embeddings(results, embeddings)

    def _has_plain_decodes_only(self, step: Step) -> bool:
        """Whether each sequence gets one token, drawn from the logits as they are. Steps often follow with the same
        sequences, so it's found out once for them."""
        items = step.items
        if step.num_tokens != len(items) or not all(item.samples for item in items):
            return False
        sequences = [item.sequence for item in items]
        if sequences != self._sequences:
            self._sequences = sequences
            self._are_plain = all(
                is_plain(sequence.request) and sequence.request.params.prompt_logprobs is None for sequence in sequences
            )
        return self._are_plain

    def _choose(self, logits_rv: Tensor) -> list[StepResult]:
        """As `compute_results`, in a step of plain decodes."""
        choices = [Choice(sequence) for sequence in self._sequences]
        tokens = self._sampler.draw(logits_rv[:, : self._vocab_size], choices)
        return [StepResult((token,)) if token >= 0 else StepResult(error=no_distribution()) for token in tokens]


def with_embeddings(results: list[StepResult], embeddings: list[bytes | None]) -> list[StepResult]:
    return [
        result if embedding is None else result._replace(embedding=embedding)
        for result, embedding in zip(results, embeddings, strict=True)
    ]


def compute_results(
    logits_rv: Tensor,
    items: tuple[ScheduledSequence, ...],
    sampler: Sampler,
    vocab_size: int,
    followed: Mapping[Sequence, int] | None = None,
) -> tuple[list[StepResult], list[int]]:
    """From the logits of each item's rows: a result per item, and all chosen tokens in order. `followed`: of items
    that follow, the token that they compute."""
    rows = [logit_rows_of(item) for item in items]
    ends = list(itertools.accumulate(len(item_rows) for item_rows in rows))
    scores = [
        _prompt_logprobs(logits_rv[end - len(item_rows) : end], item)
        for item, item_rows, end in zip(items, rows, ends, strict=True)
    ]
    choices = [_choices(item, followed or {}) for item in items]
    choice_rows = [row for its, end in zip(choices, ends, strict=True) for row in range(end - len(its), end)]
    logits = logits_rv[:, :vocab_size]
    if len(choice_rows) != logits.shape[0]:
        logits = logits[torch.tensor(choice_rows, dtype=torch.int64, device=logits.device)]
    tokens: list[int] = []
    logprobs: list[TokenLogprob | None] = []
    if choice_rows:
        tokens, logprobs = sampler.sample(logits, list(itertools.chain.from_iterable(choices)))
    results, first = [], 0
    for item, its, score in zip(items, choices, scores, strict=True):
        last = first + len(its)
        result = _result(item, tokens[first:last], logprobs[first:last], score)
        results.append(StepResult(error=sampler.failure(item.sequence)) if result is None else result)
        first = last
    return results, tokens


def logit_rows_of(item: ScheduledSequence) -> list[int]:
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


def _choices(item: ScheduledSequence, followed: Mapping[Sequence, int]) -> list[Choice]:
    """What its last rows of logits are for."""
    if not item.samples:
        return []
    if item.follows:
        return [Choice(item.sequence, (followed[item.sequence],))]
    return [Choice(item.sequence, item.drafts[:count]) for count in range(len(item.drafts) + 1)]


def _result(
    item: ScheduledSequence,
    tokens: list[int],
    logprobs: list[TokenLogprob | None],
    prompt_logprobs: tuple[TokenLogprob | None, ...],
) -> StepResult | None:
    """`tokens`: chosen after each leading part of the drafts. Those that follow a wrong draft are void. None where
    none could be chosen."""
    count = num_accepted(item.drafts, tokens) + 1 if tokens else 0
    if count and tokens[count - 1] < 0:
        return None
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
