"""What passes between scheduler and runner: the step to compute, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from turbolm.errors import EngineError, TurbolmError
from turbolm.types import Sequence, TokenLogprob


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step: its tokens [start, start + num_new_tokens) are computed, reading
    the K/V of those before, and after them its drafts. Their blocks are in `sequence.blocks`."""

    sequence: Sequence
    start: int  # equals sequence.num_computed once all earlier steps are updated
    num_new_tokens: int
    samples: bool  # the last known token is among them, so the next one is sampled
    drafts: tuple[int, ...] = ()  # guesses of the tokens that follow the last known one, to be verified
    follows: bool = False  # its one new token is what the step before samples for it: not in `token_ids` yet

    @property
    def num_tokens(self) -> int:
        """Tokens to compute: the new ones and the drafts."""
        return self.num_new_tokens + len(self.drafts)

    def check(self, token_ids: tuple[int, ...]) -> None:
        """Raises EngineError unless these may be its result's tokens."""
        if self.samples != bool(token_ids):
            raise EngineError(f"{self.sequence}: {len(token_ids)} tokens for samples={self.samples}")
        if len(token_ids) > 1 and token_ids[:-1] != self.drafts[: len(token_ids) - 1]:
            raise EngineError(f"{self.sequence}: tokens {token_ids} don't follow from the drafts {self.drafts}")


@dataclass(frozen=True, slots=True)
class Step:
    """What one step computes: decodes (one token, sampled, and drafts) first, then prompt chunks, each
    in order of priority and arrival."""

    items: tuple[ScheduledSequence, ...]
    num_tokens: int


class StepResult(NamedTuple):
    """What a step yielded for one of its items."""

    token_ids: tuple[int, ...] = ()
    """Where the item samples: the leading drafts that were right, and the token that follows them.
    The K/V of the former count as computed; what wrong drafts left in their slots is overwritten later."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token in `token_ids`, where the request asks for them."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Where asked for: those of prompt tokens start+1 … start+num_new_tokens, as far as these are
    in the prompt; in the first chunk (start 0) preceded by None for token 0."""
    error: TurbolmError | None = None
    """Ends this sequence, and no other."""
    embedding: bytes | None = None
    """The prompt's, where its last chunk is done and the request asks for it: as in `Output`."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start, but for blocks and requests, which are as of now."""

    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int  # of requests admitted so far
    num_prefix_hit_tokens: int  # those of them whose K/V were found in the prefix cache
    num_draft_tokens: int  # computed to be verified (speculative decoding)
    num_accepted_tokens: int  # those of them that were right
    num_blocks: int
    num_used_blocks: int  # held by requests
    num_idle_blocks: int  # kept by the prefix cache alone; given away when needed
    num_running: int  # requests, as of now
    num_waiting: int
    num_replays: int = 0  # steps computed by replaying a CUDA graph
    num_restarts: int = 0  # of the process that the engine runs in; the other counts are of the present one

    @property
    def num_free_blocks(self) -> int:
        """Those that requests can get."""
        return self.num_blocks - self.num_used_blocks

    @property
    def kv_use(self) -> float:
        """The part of the pool that requests hold, 0 to 1."""
        return self.num_used_blocks / self.num_blocks
