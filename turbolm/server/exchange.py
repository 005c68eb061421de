"""One request being answered: takes in what the engine yields, for a client that reads at its own pace."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from turbolm.delivery import Sink
from turbolm.errors import DeadlineError, TurbolmError
from turbolm.server.answer import Answer
from turbolm.server.failures import internal, timed_out
from turbolm.server.metrics import Metrics
from turbolm.types import Output, Request, SamplingParams, Usage

logger = logging.getLogger(__name__)

#: Sends what the answer to a choice has brought, where that can be done at once: whether it was done.
Push = Callable[[int, Answer], bool]

STALL_SECONDS = 60.0  # a client that takes nothing for so long is cut off


@dataclass(slots=True)
class Record:
    """What the log and the metrics keep of a request."""

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    outcome: str = "ok"  # refused, failed, gone (the client left), timeout
    first_token: float = 0.0  # seconds after the start; 0: none came
    prompt_tokens: int = 0
    answer_tokens: int = 0
    streams: bool = False
    params: SamplingParams | None = None  # of the first prompt
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    finish_reasons: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """`Answers`, or what stands in for them."""

    @property
    def request(self) -> Request: ...
    def begin(self, sink: Sink) -> None: ...
    def end(self) -> None: ...


class Exchange:
    """The answers to one request. What comes in piles up, merged, until it is taken; so a slow client costs
    the text of its answers and no more. Leaving the `async with` ends whatever still runs."""

    def __init__(self, sources: Sequence[Source], num_answers: int, record: Record, metrics: Metrics) -> None:
        """`sources`: the outputs of each prompt, with `num_answers` answers each."""
        self.record = record
        self.answers: dict[int, Answer] = {}  # not taken yet, by choice
        self.usage = Usage(0, 0)
        self.error: TurbolmError | None = None
        self.is_gone = False
        self.blocked_since = 0.0  # when the current write began; 0: none waits
        self._sources = sources
        self._num_answers = num_answers
        self._num_open = num_answers * len(sources)
        self._metrics = metrics
        self._streams = False
        self._pings = False
        self._last = 0.0  # when tokens were last taken or sent
        self._push: Push | None = None
        self._changed = asyncio.Event()
        self._owner: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> Exchange:
        self._owner = asyncio.current_task()
        self._last = time.perf_counter()
        try:
            for index, source in enumerate(self._sources):
                source.begin(partial(self._take_in, index * self._num_answers))
        except TurbolmError as error:
            self.fail(error)
        return self

    async def __aexit__(self, *_: object) -> None:
        for source in self._sources:
            source.end()

    @property
    def is_over(self) -> bool:
        return self._num_open == 0 or self.error is not None or self.is_gone

    @property
    def has_begun(self) -> bool:
        """Whether a first token came."""
        return self.record.first_token > 0

    async def finished(self) -> None:
        """Waits for the end of all answers."""
        while not self.is_over:
            await self._changed.wait()
            self._changed.clear()
        self._note_whole()

    async def news(self, push: Push | None = None) -> None:
        """Waits until there is something to send, a comment perhaps. What comes meanwhile goes to `push` as long as
        that takes it, so that no task has to be woken for each token. (Several answers are taken together.)"""
        self._streams = True
        self._push = push if self._num_open == 1 else None
        try:
            while not (self.answers or self._pings or self.is_over):
                await self._changed.wait()
                self._changed.clear()
        finally:
            self._push = None

    def take(self) -> dict[int, Answer]:
        """What came in since the last call, by choice."""
        self._pings = False
        answers, self.answers = self.answers, {}
        self._note_taken(answers.values())
        return answers

    def leave(self) -> None:
        """The client has gone."""
        if not self.is_over:
            self.record.outcome = "gone"
            self.is_gone = True
            self._changed.set()

    def fail(self, error: TurbolmError) -> None:
        """Ends the exchange with an error."""
        if not self.is_over:
            self.error = error
            if isinstance(error, DeadlineError):
                self.record.outcome = "timeout"
            self._changed.set()

    def tick(self, now: float, timeout: float, ping_interval: float) -> None:
        """Called about once a second: deadline, comments, clients that don't read."""
        if timeout and now - self.record.started > timeout and not self.is_over:
            self.record.outcome = "timeout"
            self.fail(timed_out(timeout))
        if self.blocked_since and now - self.blocked_since > STALL_SECONDS and self._owner is not None:
            self.record.outcome = "gone"
            self.is_gone = True
            self._owner.cancel()
        if ping_interval and self._streams and now - self._last > ping_interval:
            self._last = now
            self._pings = True
            self._changed.set()

    def _take_in(self, base: int, output: Output) -> None:
        """What the prompt whose first choice is `base` has brought."""
        try:
            choice = base + output.index
            if output.token_ids:
                self.record.answer_tokens += len(output.token_ids)
                if not self.record.first_token:
                    self._note_first()
            if self._push is not None:
                if output.finish_reason is None and self._hand_on(self._push, choice, output):
                    return
                self._push = None  # what follows has to come after this
            if output.error is None or output.parts:
                answer = self.answers.get(choice)
                if answer is None:
                    answer = self.answers[choice] = Answer()
                answer.add(output)
            if output.finish_reason is not None:
                self._end(choice, output)
            elif self._streams:
                self._changed.set()
        except Exception:
            logger.exception("request %s failed", self.record.id)
            self.fail(internal())

    def _hand_on(self, push: Push, choice: int, output: Output) -> bool:
        answer = Answer()
        answer.add(output)
        is_taken = push(choice, answer)
        if is_taken:
            self._note_taken((answer,))
        return is_taken

    def _note_taken(self, answers: Iterable[Answer]) -> None:
        now = time.perf_counter()
        for answer in answers:
            if answer.num_tokens and self._last:
                self._metrics.between_tokens.observe((now - self._last) / answer.num_tokens, answer.num_tokens)
        self._last = now

    def _note_first(self) -> None:
        now = time.perf_counter()
        self.record.first_token = now - self.record.started
        self._metrics.first_token.observe(self.record.first_token)
        self._last = 0.0 if self._streams else now  # the first token has no distance to one before

    def _end(self, choice: int, output: Output) -> None:
        self._num_open -= 1
        if output.usage is not None:
            is_first = choice % self._num_answers == 0  # the prompt counts once for all its answers
            self.usage = Usage(
                self.usage.prompt_tokens + output.usage.prompt_tokens * is_first,
                self.usage.completion_tokens + output.usage.completion_tokens,
                self.usage.cached_tokens + output.usage.cached_tokens * is_first,
                max(self.usage.queued, output.usage.queued),
            )
        if output.error is not None:
            self._num_open += 1
            self.fail(output.error)
        elif self._streams or self._num_open == 0:
            self._changed.set()
        reason = output.finish_reason or ""
        self.record.finish_reasons.append(reason)
        self._metrics.finished["abort" if reason in ("cancelled", "error") else reason] += 1

    def _note_whole(self) -> None:
        """The mean distance of the tokens of answers that were not streamed."""
        num_gaps = self.record.answer_tokens - self._num_answers * len(self._sources)
        if self.has_begun and num_gaps > 0:
            elapsed = time.perf_counter() - self._last
            self._metrics.between_tokens.observe(elapsed * len(self.answers) / num_gaps, num_gaps)
