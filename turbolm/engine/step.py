"""What passes between scheduler and runner: the step to compute, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from turbolm.types import Sequence, TokenLogprob


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step: its tokens [start, start + num_new_tokens) are computed, reading
    the K/V of those before. Their blocks are in `sequence.blocks`."""

    sequence: Sequence
    start: int  # equals sequence.num_computed once all earlier steps are updated
    num_new_tokens: int
    samples: bool  # the last known token is among them, so the next one is sampled


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: decodes (one token, sampled) first, then prompt chunks, each in order
    of priority and arrival."""

    items: tuple[ScheduledSequence, ...]
    num_tokens: int


class StepResult(NamedTuple):
    """What a step yielded for one of its items."""

    token_ids: tuple[int, ...] = ()
    """The tokens that follow: one or more if the item samples, else none. Of several (speculative
    decoding), the K/V of all but the last known token's counts as not computed: the next step computes
    the surplus as a chunk. To keep K/V of accepted drafts, items would have to carry the number of
    draft tokens, take blocks and budget for them, and report how many were accepted."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token in `token_ids`, where the request asks for them."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Where asked for: those of prompt tokens start+1 … start+num_new_tokens, as far as these are
    in the prompt; in the first chunk (start 0) preceded by None for token 0."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, but for the blocks, which are as of now."""

    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int  # of requests admitted so far
    num_prefix_hit_tokens: int  # those of them whose K/V were found in the prefix cache
    num_blocks: int
    num_used_blocks: int  # held by requests
    num_idle_blocks: int  # kept by the prefix cache alone; given away when needed

    @property
    def kv_use(self) -> float:
        """The part of the pool that requests hold, 0 to 1."""
        return self.num_used_blocks / self.num_blocks
