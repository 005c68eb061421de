"""From logits to tokens: penalties, bans, the draw, log-probabilities.

A row's token depends on its logits, its request and what comes before it in the answer alone, never
on what else is in the batch, on how often the sequence was preempted, or on which tokens were drafts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from turbolm.engine.constraints import Constraints
from turbolm.engine.randomness import stream_key, uniform_at
from turbolm.errors import EngineError, RequestError, TurbolmError
from turbolm.ops.sampling import sample
from turbolm.types import Request, SamplingParams, Sequence, TokenLogprob

#: A token per row, as `ops.sampling.sample` defines it, of its arguments. May be -1 where a row has no
#: distribution.
SampleRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Choice(NamedTuple):
    """A token to choose: the one after the sequence's tokens and these drafts."""

    sequence: Sequence
    drafts: tuple[int, ...] = ()

    @property
    def num_output(self) -> int:
        """How long the answer is without the token."""
        return self.sequence.num_output + len(self.drafts)

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end the answer."""
        request = self.sequence.request
        return (*request.params.stop_token_ids, *(() if request.params.ignore_eos else request.eos_token_ids))


class _Columns(NamedTuple):
    """What `SampleRows` takes, of these rows."""

    params: list[SamplingParams]
    is_greedy: bool  # all rows
    filters: tuple[Tensor, Tensor, Tensor, Tensor]  # temperature, top_k, top_p, min_p
    uniform_r: Tensor  # zeros

    @classmethod
    def of(cls, params: list[SamplingParams], device: torch.device) -> _Columns:
        def column(name: str, dtype: torch.dtype) -> Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=device)

        filters = (
            column("temperature", torch.float32),
            column("top_k", torch.int64),
            column("top_p", torch.float32),
            column("min_p", torch.float32),
        )
        uniform_r = torch.zeros(len(params), dtype=torch.float64, device=device)
        return cls(params, all(p.is_greedy for p in params), filters, uniform_r)


class Sampler:
    """Chooses a token per row of logits. Keeps what penalties need per sequence, and forgets it
    with the sequence."""

    def __init__(self, sample_rows: SampleRows = sample) -> None:
        self._sample_rows = sample_rows
        self._histories: weakref.WeakKeyDictionary[Sequence, _History] = weakref.WeakKeyDictionary()
        self._constraints = Constraints()
        self._columns: _Columns | None = None  # of the last step: steps often follow with the same requests

    def sample(self, logits_rv: Tensor, choices: Rows[Choice]) -> tuple[list[int], list[TokenLogprob | None]]:
        """Each row's token, and its log-probabilities where asked for. May change `logits_rv` (float32).
        -1 where a row has no distribution: its logits are not numbers, or every token is banned."""
        wanted = {
            row: logits_rv[row].clone()  # before adjustments
            for row, choice in enumerate(choices)
            if choice.sequence.request.params.logprobs is not None
        }
        for row, choice in enumerate(choices):
            if _has_adjustments(choice):
                self._adjust(logits_rv[row], choice)
        self._constraints.apply(logits_rv, choices)
        tokens = self.draw(logits_rv, choices)
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        for row, logits_v in wanted.items():
            if tokens[row] < 0:
                continue
            num_top = choices[row].sequence.request.params.logprobs or 0
            logprobs[row] = token_logprobs(logits_v[None], [tokens[row]], num_top)[0]
        return tokens, logprobs

    def failure(self, sequence: Sequence) -> TurbolmError:
        """What ends a sequence for which no token could be chosen."""
        reason = self._constraints.error(sequence)
        if reason is not None:
            return RequestError(f"the answer can't go on by its grammar: {reason}", "grammar")
        return no_distribution()

    def draw(self, logits_rv: Tensor, choices: Rows[Choice]) -> list[int]:
        """Each row's token, from the logits as they are; -1 as in `sample`."""
        params = [choice.sequence.request.params for choice in choices]
        columns = self._columns
        if columns is None or columns.params != params or columns.uniform_r.device != logits_rv.device:
            columns = self._columns = _Columns.of(params, logits_rv.device)
        uniform_r = columns.uniform_r
        if not columns.is_greedy:
            uniform = [0.0 if p.is_greedy else self._uniform(choice) for p, choice in zip(params, choices, strict=True)]
            uniform_r = torch.tensor(uniform, dtype=torch.float64, device=logits_rv.device)
        tokens: list[int] = self._sample_rows(logits_rv.contiguous(), *columns.filters, uniform_r).tolist()
        return tokens

    def _uniform(self, choice: Choice) -> float:
        """A number in [0, 1) that is a function of the request's seed, its index and the position in
        the answer."""
        return uniform_at(stream_key(choice.sequence.request), choice.num_output)

    def _adjust(self, logits_v: Tensor, choice: Choice) -> None:
        """Penalties, biases and bans, in place on one row."""
        sequence = choice.sequence
        params, request = sequence.request.params, sequence.request
        if has_penalties(params):
            if sequence not in self._histories:
                self._histories[sequence] = _History(sequence.num_prompt)
            self._histories[sequence].update(sequence.token_ids)
            self._histories[sequence].penalize(logits_v, params, choice.drafts)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits_v.device)
            logits_v[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=logits_v.device)
        banned = _banned_words(request.bad_words_ids, choice)
        if choice.num_output < params.min_tokens and params.grammar is None:  # else as constraints.py says
            banned += choice.stops
        if banned:
            logits_v[torch.tensor(banned, device=logits_v.device)] = float("-inf")


class _History:
    """The distinct tokens of one sequence, and how often its answer holds each."""

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._num_seen = 0
        self._counts: dict[int, int] = {}  # token → occurrences in the answer; 0: in the prompt only

    def update(self, token_ids: list[int]) -> None:
        for position in range(self._num_seen, len(token_ids)):
            token = token_ids[position]
            self._counts[token] = self._counts.get(token, 0) + (position >= self._num_prompt)
        self._num_seen = len(token_ids)

    def penalize(self, logits_v: Tensor, params: SamplingParams, drafts: tuple[int, ...]) -> None:
        """`drafts`: tokens that follow, but may be wrong."""
        counted = self._counts
        if drafts:
            counted = dict(counted)
            for token in drafts:
                counted[token] = counted.get(token, 0) + 1
        size = len(counted)
        ids = torch.from_numpy(np.fromiter(counted.keys(), np.int64, size)).to(logits_v.device)
        counts = torch.from_numpy(np.fromiter(counted.values(), np.float32, size)).to(logits_v.device)
        values = logits_v[ids]
        if params.repetition_penalty != 1.0:
            factor = params.repetition_penalty
            values = torch.where(values > 0, values / factor, values * factor)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        logits_v[ids] = values


def token_logprobs(logits_rv: Tensor, tokens: Rows[int], num_top: int) -> list[TokenLogprob]:
    """Each row's entry for its token, with the best `num_top` alternatives."""
    logprobs = torch.log_softmax(logits_rv, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits_rv.device).unsqueeze(1))
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if num_top:
        best = torch.topk(logprobs, min(num_top, logprobs.shape[1]))
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops = [tuple(zip(indices, values, strict=True)) for indices, values in rows]
    values = chosen.squeeze(1).tolist()
    return [TokenLogprob(*entry) for entry in zip(tokens, values, ranks, tops, strict=True)]


def has_penalties(params: SamplingParams) -> bool:
    """Whether tokens that occur are less likely."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def is_plain(request: Request) -> bool:
    """Whether its tokens are drawn from the logits as they are, and nothing else is asked for."""
    return not is_adjusted(request) and is_chosen_alone(request)


def is_adjusted(request: Request) -> bool:
    """Whether logits are changed before a token is chosen, in ways that a device knows too (not by a grammar)."""
    params = request.params
    return bool(params.logit_bias or params.min_tokens or request.bad_words_ids) or has_penalties(params)


def is_chosen_alone(request: Request) -> bool:
    """Whether tokens are all that's asked for, and no grammar bears on them."""
    return request.params.logprobs is None and request.params.grammar is None


def no_distribution() -> EngineError:
    """What ends a sequence for which no token could be chosen, where nothing explains it."""
    return EngineError("the model's logits are not numbers, or every token is banned")


def _has_adjustments(choice: Choice) -> bool:
    request = choice.sequence.request
    params = request.params
    bans = choice.num_output < params.min_tokens or request.bad_words_ids
    return bool(params.logit_bias or bans) or has_penalties(params)


def _banned_words(words: tuple[tuple[int, ...], ...], choice: Choice) -> list[int]:
    """Last tokens of bad words whose other tokens end the answer so far."""
    if not words:
        return []
    known = choice.sequence.token_ids
    answer = known[max(choice.sequence.num_prompt, len(known) - max(map(len, words))) :]
    answer += choice.drafts
    banned = []
    for word in words:
        start = len(answer) - (len(word) - 1)
        if start >= 0 and tuple(answer[start:]) == word[:-1]:
            banned.append(word[-1])
    return banned
