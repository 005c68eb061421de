"""Between the engine and the event loops in which its answers are awaited: requests there, outputs back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple, Protocol

from turbolm.engine.step import SchedulerStats
from turbolm.errors import DeadlineError, EngineError, TurbolmError
from turbolm.stream import AnswerStream
from turbolm.types import Completion, Output, Request

logger = logging.getLogger(__name__)

_index = attrgetter("index")

#: Takes the outputs of a request, in order, in the request's event loop. Must not raise.
Sink = Callable[[Output], None]


class AnyEngine(Protocol):
    """`Engine`, or what stands in for one in another process."""

    def submit(self, requests: Sequence[Request], deltas: bool = True) -> None: ...
    def cancel(self, request_id: str, index: int = 0) -> None: ...
    def close(self) -> None: ...
    def wait_until_warm(self, timeout: float | None = None) -> bool: ...
    @property
    def stats(self) -> SchedulerStats: ...


class _Inbox:
    """What has come for the requests of one event loop, and who is about to be submitted there."""

    def __init__(self) -> None:
        self.steps: deque[Sequence[Output]] = deque()
        self.num_routes = 0
        self.unsent: list[Answers] = []


class _Route(NamedTuple):
    loop: asyncio.AbstractEventLoop
    sink: Sink


class Delivery:
    """Where each request's outputs go. What comes while an event loop is busy is joined: a loop that falls behind
    has fewer, longer outputs to take."""

    def __init__(self) -> None:
        self._routes: dict[str, _Route] = {}  # by request id
        self._inboxes: dict[asyncio.AbstractEventLoop, _Inbox] = {}  # an entry comes and goes in its loop's thread

    def deliver(self, outputs: Sequence[Output]) -> None:
        """Called in the engine's thread, which has other things to do."""
        if outputs:
            for loop, inbox in tuple(self._inboxes.items()):
                inbox.steps.append(outputs)
                if len(inbox.steps) == 1 and not loop.is_closed():  # otherwise it has been told
                    loop.call_soon_threadsafe(self._empty, loop, inbox)

    def open(self, request_id: str, sink: Sink) -> None:
        """From now on, this event loop gets the request's outputs."""
        loop = asyncio.get_running_loop()
        self._routes[request_id] = _Route(loop, sink)
        inbox = self._inboxes.get(loop)
        if inbox is None:
            inbox = self._inboxes[loop] = _Inbox()
        inbox.num_routes += 1

    def close(self, request_id: str) -> None:
        """The request's outputs go nowhere. Idempotent."""
        route = self._routes.pop(request_id, None)
        if route is not None:
            inbox = self._inboxes[route.loop]
            inbox.num_routes -= 1
            if not inbox.num_routes:
                del self._inboxes[route.loop]

    def submit_soon(self, answers: Answers) -> None:
        """Submits them, which are open, with all that tasks of this event loop are about to ask for: to the engine they
        come at once."""
        loop = asyncio.get_running_loop()
        unsent = self._inboxes[loop].unsent
        unsent.append(answers)
        if len(unsent) == 1:
            loop.call_soon(_submit_unsent, unsent)

    def abandon(self, request_id: str) -> None:
        """`close`, from any thread."""
        route = self._routes.get(request_id)
        if route is not None and not route.loop.is_closed():
            route.loop.call_soon_threadsafe(self.close, request_id)

    def _empty(self, loop: asyncio.AbstractEventLoop, inbox: _Inbox) -> None:
        steps, routes = [], self._routes
        while inbox.steps:
            steps.append(inbox.steps.popleft())
        for output in steps[0] if len(steps) == 1 else _joined(steps):
            route = routes.get(output[0])
            if route is not None and route.loop is loop:
                route.sink(output)


def _joined(steps: Iterable[Sequence[Output]]) -> list[Output]:
    """The outputs of several steps as one for each answer."""
    groups: dict[tuple[str, int], list[Output]] = {}
    for outputs in steps:
        for output in outputs:
            groups.setdefault(output[:2], []).append(output)
    return [group[0] if len(group) == 1 else _join(group) for group in groups.values()]


def _join(deltas: Sequence[Output]) -> Output:
    return deltas[-1]._replace(
        token_ids=tuple([token for delta in deltas for token in delta.token_ids]),
        logprobs=tuple([entry for delta in deltas for entry in delta.logprobs]),
        prompt_logprobs=tuple([entry for delta in deltas for entry in delta.prompt_logprobs]),
    )


class Answers(AsyncIterator[Output]):
    """The answers to one request, as they come. Iterate, or have `begin` call a function with each output. What still
    runs is cancelled by `end` or `aclose`, and when nobody refers to this any more."""

    def __init__(
        self,
        engine: AnyEngine,
        delivery: Delivery,
        requests: Sequence[Request],
        streams: Sequence[AnswerStream],
        deltas: bool,
    ) -> None:
        """`requests`: one for each answer, with the `streams` that read them; `deltas` as for `Engine.submit`."""
        self._engine = engine
        self._delivery = delivery
        self._requests = requests
        self._streams = streams
        self._deltas = deltas
        self._id = requests[0].id
        self._num_open = len(requests)
        self._sink: Sink | None = None
        self._timer: asyncio.TimerHandle | None = None  # of the request's deadline
        self._outputs: asyncio.Queue[Output | Exception] | None = None  # of those that are iterated

    @property
    def request(self) -> Request:
        """That of the first answer."""
        return self._requests[0]

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._requests[0].prompt_token_ids)

    def begin(self, sink: Sink) -> None:
        """Starts the request: `sink` is called, in this event loop, with each output. Raises EngineError where the
        engine takes no more requests."""
        self._open(sink)
        try:
            self._engine.submit(self._requests, self._deltas)
        except TurbolmError:
            self.end()
            raise

    def _open(self, sink: Sink) -> None:
        """From now on `sink` is called, and time runs."""
        itself = weakref.ref(self)

        def take(output: Output) -> None:
            answers = itself()
            if answers is not None:
                answers._take(output)

        self._sink = sink
        timeout = self._requests[0].params.timeout
        if timeout is not None:
            self._timer = asyncio.get_running_loop().call_later(timeout, _expire, itself)
        self._delivery.open(self._id, take)

    def end(self) -> None:
        """No further outputs. Idempotent."""
        self._close()
        self._cancel()

    async def aclose(self) -> None:
        self.end()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> Output:
        if self._outputs is None:
            self._outputs = asyncio.Queue()
            if self._sink is None and self._num_open:
                self._open(self._outputs.put_nowait)
                self._delivery.submit_soon(self)
        if not self._num_open and self._outputs.empty():
            raise StopAsyncIteration
        try:
            found = await self._outputs.get()
        except asyncio.CancelledError:
            self.end()
            raise
        if isinstance(found, Exception):
            raise found
        return found

    def __del__(self) -> None:
        if self._sink is not None and self._num_open:  # in any thread
            self._delivery.abandon(self._id)
            self._cancel()

    def _refuse(self, error: Exception) -> None:
        """To whoever iterates."""
        self.end()
        if self._outputs is not None:
            self._outputs.put_nowait(error)

    def _close(self) -> None:
        self._delivery.close(self._id)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        """Ends what isn't done by the deadline, at once, whatever the engine is busy with."""
        timeout = self._requests[0].params.timeout
        error = DeadlineError(
            f"the request was not done within its timeout of {timeout:g} s: ask for less, or wait longer"
        )
        for request, stream in zip(self._requests, self._streams, strict=True):
            if not stream.is_over:
                self._engine.cancel(self._id, request.index)
                self._take(Output(self._id, request.index, finish_reason="error", error=error))

    def _cancel(self) -> None:
        if self._sink is not None and self._num_open:
            for request, stream in zip(self._requests, self._streams, strict=True):
                if not stream.is_over:
                    self._engine.cancel(self._id, request.index)
        self._num_open = 0

    def _take(self, output: Output) -> None:
        stream = self._streams[output.index]
        try:
            delta = stream.push(output)
        except Exception:  # a bug; the other requests' outputs come next
            logger.exception("the answer to request %s can't be read", self._id)
            delta = output._replace(finish_reason="error", error=EngineError("the answer can't be read; see the log"))
            stream.is_over = True
            self._engine.cancel(self._id, output.index)
        if delta is None or self._sink is None:
            return
        if delta.finish_reason is not None:
            self._num_open -= 1
            if not self._num_open:
                self._close()
        elif stream.is_stopped:
            self._engine.cancel(self._id, output.index)
        self._sink(delta)


def _submit_unsent(unsent: list[Answers]) -> None:
    asked = [answers for answers in unsent if answers._num_open]  # the others were cancelled meanwhile
    unsent.clear()
    try:
        _submit(asked)
    except Exception as error:  # noqa: BLE001 (raised in those who wait)
        for answers in asked:
            answers._refuse(error)


def _submit(asked: Iterable[Answers]) -> None:
    """Together, in their order."""
    for (engine, deltas), group in itertools.groupby(asked, lambda answers: (answers._engine, answers._deltas)):
        engine.submit([request for answers in group for request in answers._requests], deltas)


def _expire(expired: weakref.ref[Answers]) -> None:
    answers = expired()
    if answers is not None:
        answers._expire()


async def complete(asked: Sequence[Answers], advance: Callable[[int], object]) -> list[Completion]:
    """All answers to many requests, which reach the engine together, so that its first step is a full one. `advance`
    is called with 1 as each request ends. Cancelling this cancels what still runs. Raises as `Answers.begin`."""
    all_ended = asyncio.get_running_loop().create_future()
    num_left = len(asked)

    def note_end() -> None:
        nonlocal num_left
        num_left -= 1
        advance(1)
        if not num_left and not all_ended.done():
            all_ended.set_result(None)

    collectors = [_Collector(len(answers._requests), note_end) for answers in asked]
    try:
        for answers, collector in zip(asked, collectors, strict=True):
            answers._open(collector.take)
        _submit(asked)
        if asked:
            await all_ended
    except BaseException:
        for answers in asked:
            answers.end()
        raise
    pairs = zip(asked, collectors, strict=True)
    return [Completion(answers.request.prompt_token_ids, collector.outputs) for answers, collector in pairs]


class _Collector:
    """The answers to one request."""

    __slots__ = ("_deltas", "_note_end", "_num_open", "outputs")

    def __init__(self, num_answers: int, note_end: Callable[[], None]) -> None:
        self._num_open = num_answers
        self._note_end = note_end
        self._deltas: list[Output] = []
        self.outputs: tuple[Output, ...] = ()  # by index, once all have ended

    def take(self, output: Output) -> None:
        self._deltas.append(output)
        if output.finish_reason is None:
            return
        self._num_open -= 1
        if not self._num_open:
            by_index = itertools.groupby(sorted(self._deltas, key=_index), _index)
            self.outputs = tuple([Output.collect(deltas) for _, deltas in by_index])
            self._note_end()
