"""A sequence at work, with what the scheduler alone knows of it, and the step being put together."""

from __future__ import annotations

from turbolm.cache.prefix_cache import BlockKeys
from turbolm.engine.speculative import Drafter
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.types import FinishReason, Sequence, TokenLogprob


class Job:
    """A live sequence."""

    __slots__ = (
        "asks_prompt_logprobs", "block_size", "deferred", "deltas", "drafter", "has_answer", "held_logprobs",
        "held_prompt_logprobs", "is_summed", "keys", "max_blocks", "max_length", "min_length", "num_in_flight",
        "num_prompt_logprobs", "num_scheduled", "place", "priority", "reads_answer", "sampled_by", "sequence", "stops",
    )  # fmt: skip

    def __init__(
        self,
        sequence: Sequence,
        number: int,
        max_context: int,
        block_size: int,
        drafter: Drafter | None = None,
        deltas: bool = True,
    ) -> None:
        """`number`: how many came before. `deltas`: what each step yields goes out at once."""
        request = sequence.request
        params = request.params
        num_prompt = len(sequence.token_ids)
        self.sequence = sequence
        self.block_size = block_size
        self.drafter = drafter
        self.deltas = deltas
        self.priority = request.priority
        self.place = (request.priority, number)  # the order of all work; unique
        self.keys = BlockKeys(sequence.token_ids, block_size, request.tenant, request.loaded_adapter)
        # Leading tokens that steps so far compute; sequence.num_computed follows at update. One more than
        # are known where the last step computes what the one before samples.
        self.num_scheduled = 0
        self.num_in_flight = 0  # steps with it that are not updated
        self.sampled_by = -1  # number of the step whose token the next step may compute before it's known
        # What the answer holds bears on the choice of the next token, and the host computes how.
        self.reads_answer = params.grammar is not None
        self.held_logprobs: list[TokenLogprob] = []  # without deltas: what the last output will bring
        self.held_prompt_logprobs: list[TokenLogprob | None] = []
        self.asks_prompt_logprobs = params.prompt_logprobs is not None
        self.is_summed = request.pooling == "mean"  # each of the prompt's tokens has to be computed
        self.num_prompt_logprobs = 0  # handed out, of those asked for
        self.deferred = (-1, -1)  # the block (index) that it last waited for, and the step that computed it
        # The answer ends when it is longer than min_length by one of these tokens, or reaches max_length.
        self.stops = frozenset(params.stop_token_ids + (() if params.ignore_eos else request.eos_token_ids))
        # (A grammar's end comes before min_tokens where it has to: the sampler sees to it.)
        self.min_length = num_prompt + (params.min_tokens if params.grammar is None else 0)
        self.max_length = max_context if params.max_tokens is None else min(max_context, num_prompt + params.max_tokens)
        if not request.has_answer:
            self.max_length = num_prompt
        self.has_answer = self.max_length > num_prompt
        # The last token of the longest answer is never computed.
        self.max_blocks = -(-max(num_prompt, self.max_length - 1) // block_size)

    @property
    def num_left(self) -> int:
        """Known tokens that no step computes yet; -1 where a step computes the one after them."""
        return len(self.sequence.token_ids) - self.num_scheduled

    @property
    def num_needed(self) -> int:
        """Blocks for all tokens that are known or being computed."""
        return -(-max(len(self.sequence.token_ids), self.num_scheduled) // self.block_size)

    @property
    def num_wanted(self) -> int:
        """Blocks that it lacks for the tokens it has, and one to grow. (It may have more, for drafts.)"""
        sequence = self.sequence  # (written out: it's asked of all that run, while others wait)
        num_needed = -(-max(len(sequence.token_ids), self.num_scheduled) // self.block_size)
        return max(0, min(num_needed + 1, self.max_blocks) - len(sequence.blocks))

    @property
    def num_draftable(self) -> int:
        """How many drafts the answer has room for: the last token of the longest one is never computed."""
        return self.max_length - 1 - len(self.sequence.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether some of its prompt's log-probabilities are still due."""
        return self.asks_prompt_logprobs and self.num_prompt_logprobs < self.sequence.num_prompt

    @property
    def num_shareable(self) -> int:
        """How many leading blocks may come from the prefix cache: at least one token is computed, so
        that there is something to sample from; all are where something of each is due."""
        if self.is_summed or self.wants_prompt_logprobs:
            return 0
        return (len(self.sequence.token_ids) - 1) // self.block_size

    @property
    def answer(self) -> tuple[int, ...]:
        """All its tokens so far, less a stop token that is not part of it."""
        sequence = self.sequence
        is_hidden = sequence.stop is not None and not sequence.request.params.include_stop
        return tuple(sequence.token_ids[sequence.num_prompt : len(sequence.token_ids) - is_hidden])

    def append(self, token_ids: tuple[int, ...]) -> tuple[int, FinishReason | None, int | None]:
        """Appends sampled tokens as far as the answer goes: how many, and if it ends so, why and with
        which stop token."""
        known = self.sequence.token_ids
        if len(token_ids) == 1 and token_ids[0] not in self.stops and len(known) + 1 < self.max_length:
            known.append(token_ids[0])  # as hundreds of times per step
            return 1, None, None
        for number, token in enumerate(token_ids, 1):
            known.append(token)
            if token in self.stops and len(known) > self.min_length:
                return number, "stop", token
            if len(known) >= self.max_length:
                return number, "length", None
        return len(token_ids), None, None

    def hold(self, logprobs: tuple[TokenLogprob, ...], prompt_logprobs: tuple[TokenLogprob | None, ...]) -> None:
        """Keeps for the last output what a step yielded."""
        self.held_logprobs += logprobs
        self.held_prompt_logprobs += prompt_logprobs

    def new_prompt_logprobs(
        self, start: int, entries: tuple[TokenLogprob | None, ...]
    ) -> tuple[TokenLogprob | None, ...]:
        """Those of a chunk that begins at token `start`, less those handed out before a preemption."""
        entries = entries[max(0, self.num_prompt_logprobs - (start + 1 if start else 0)) :]
        self.num_prompt_logprobs += len(entries)
        return entries


class OpenStep:
    """A step being put together, and what is left of its limits."""

    def __init__(self, num_tokens: int, num_logit_rows: int) -> None:
        """What prompts may use: the decodes' share is taken off beforehand."""
        self.num_tokens = num_tokens
        self.num_logit_rows = num_logit_rows
        self.decodes: list[ScheduledSequence] = []
        self.decode_jobs: list[Job] = []
        self._prefills: list[ScheduledSequence] = []
        self._prefill_jobs: list[Job] = []

    def room(self, job: Job) -> int:
        """How many of the job's tokens fit. Where the prompt's log-probabilities are asked for, each of
        its tokens needs logits; otherwise the last one does."""
        if self.num_logit_rows < 1:
            return 0
        num_new = min(job.num_left, self.num_tokens)
        return min(num_new, self.num_logit_rows) if job.asks_prompt_logprobs else num_new

    def add_decode(self, item: ScheduledSequence, job: Job) -> None:
        self.decodes.append(item)
        self.decode_jobs.append(job)

    def add_prompt(self, item: ScheduledSequence, job: Job) -> None:
        """Adds what fits the room."""
        self.num_tokens -= item.num_new_tokens
        self.num_logit_rows -= item.num_new_tokens if job.asks_prompt_logprobs else item.samples
        if item.samples and item.num_new_tokens == 1:
            self.add_decode(item, job)
        else:
            self._prefills.append(item)
            self._prefill_jobs.append(job)

    def finish(self) -> tuple[Step, list[Job]] | None:
        """The step and its items' jobs; None if it is empty."""
        items = (*self.decodes, *self._prefills)
        if not items:
            return None
        num_drafts = sum([len(item.drafts) for item in self.decodes if item.drafts])
        num_tokens = len(self.decodes) + num_drafts + sum([item.num_new_tokens for item in self._prefills])
        return Step(items, num_tokens), self.decode_jobs + self._prefill_jobs
