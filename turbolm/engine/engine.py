"""The engine loop: takes requests in, runs steps, hands outputs out. It runs in a thread of its own."""

from __future__ import annotations

import collections
import dataclasses
import gc
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from turbolm.engine.preparation import Preparation, Prepared
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import SchedulerStats, Step, StepResult
from turbolm.errors import EngineError, RequestError, TurbolmError
from turbolm.grammar import GrammarCompiler
from turbolm.types import Output, Request

if TYPE_CHECKING:
    from turbolm.engine.adapters import Adapters

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL = 0.0005  # seconds for which other threads' Python code may hold up a step; Python's default is 0.005
# When garbage is looked for. By Python's defaults (700, 10, 10), hundreds of sequences at work make it look through all
# objects there are, 0.1 s with PyTorch's, every few hundred steps. A step hardly ever makes a cycle.
_COLLECTION = (20_000, 20, 20)

#: Receives the outputs of a step, in order. Called in the engine's thread: must not block or raise.
Deliver = Callable[[Sequence[Output]], None]


class PendingStep(Protocol):
    """A step that a device may still be computing."""

    def results(self) -> list[StepResult]:
        """Waits for them: one per item, in the step's order. May raise."""


class StepRunner(Protocol):
    """Computes steps in the order in which they are submitted."""

    depth: int
    """How many steps may be in flight: while the device computes one, the next is made and submitted.
    1: `submit` itself computes the step."""

    @property
    def num_replays(self) -> int:
        """How many steps were computed by replaying a CUDA graph."""

    def submit(self, step: Step) -> PendingStep:
        """Starts a step. May raise: then nothing comes of it, and those before it are not touched."""

    def warm_up(self) -> bool:
        """Prepares a part of what makes steps faster, while there is nothing to compute; False: nothing is
        left to prepare. May raise."""

    def close(self) -> None:
        """The last call: lets go of what other processes hold."""


class Engine:
    """`submit`, `cancel` and `close` may be called from any thread. Every submitted request gets
    exactly one final output, whatever happens."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        deliver: Deliver,
        grammars: GrammarCompiler | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """Without `grammars` or `adapters`, requests that have one are refused."""
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._adapters = adapters
        self._calls: collections.deque[tuple[Callable[[], None], Future[None]]] = collections.deque()
        self._changed = threading.Condition()
        self._submitted: collections.deque[Prepared] = collections.deque()
        self._preparation = Preparation(grammars, self._take_prepared)
        self._preparing: dict[tuple[str, int], bool] = {}  # by (request id, index): whether it was cancelled since
        self._cancelled: collections.deque[tuple[str, int]] = collections.deque()
        self._closing = False
        self._in_flight: collections.deque[tuple[Step, PendingStep]] = collections.deque()
        self._last_stats: SchedulerStats | None = None  # once it has ended
        self._is_warm = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="turbolm-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], deltas: bool = True) -> None:
        """Queue requests. With `deltas`, outputs come as tokens do; without, each request gets one
        output with all of them, at its end. Raises EngineError when the engine is closed."""
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            for request in requests:
                if request.params.grammar is None:
                    self._submitted.append(Prepared(request, deltas))
                else:
                    self._preparing[request.id, request.index] = False
                    self._preparation.begin(request, deltas)
            self._changed.notify()

    def cancel(self, request_id: str, index: int = 0) -> None:
        """End one answer of a request; an unknown or finished one is no error."""
        key = (request_id, index)
        with self._changed:
            if key in self._preparing:
                self._preparing[key] = True
            else:
                self._cancelled.append(key)
                self._changed.notify()

    def add_adapter(self, name: str, source: str) -> None:
        """Reads a LoRA adapter (a folder, or a hub's name), waits until requests may name it. Raises UserError,
        CapacityError where there is no room."""
        adapters = self._room_for_adapters()
        adapter = adapters.read(source)
        self._call(lambda: adapters.add(name, adapter, self._scheduler.uses))

    def remove_adapter(self, name: str) -> None:
        """Requests that come later can't name it; those that have it go on to their ends. Raises UserError."""
        adapters = self._room_for_adapters()
        self._call(lambda: adapters.remove(name))

    def _room_for_adapters(self) -> Adapters:
        if self._closing:
            raise EngineError("the engine is closed")
        if self._adapters is None:
            raise RequestError("there is no room for adapters: start the engine with max_adapters", "adapter")
        return self._adapters

    def _call(self, job: Callable[[], None]) -> None:
        """Waits until the engine's thread has done it, between steps."""
        done: Future[None] = Future()
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            self._calls.append((job, done))
            self._changed.notify()
        done.result()

    def close(self) -> None:
        """Cancel what is left, and end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _take_prepared(self, prepared: Prepared) -> None:
        key = (prepared.request.id, prepared.request.index)
        with self._changed:
            if key in self._preparing:  # else the loop has ended, and told so
                self._submitted.append(prepared)
                if self._preparing.pop(key):
                    self._cancelled.append(key)
                self._changed.notify()

    @property
    def stats(self) -> SchedulerStats:
        """What was counted so far."""
        if self._last_stats is not None:
            return self._last_stats
        return dataclasses.replace(self._scheduler.stats, num_replays=self._runner.num_replays)

    def _loop(self) -> None:
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL))
        if gc.get_threshold()[0]:  # else it's switched off
            gc.set_threshold(*map(max, gc.get_threshold(), _COLLECTION))
        while self._take_in():
            is_full = len(self._in_flight) >= self._runner.depth
            step = None if is_full else self._scheduler.next_batch()
            if step is not None:
                self._start(step)
            if self._in_flight and (step is None or len(self._in_flight) >= self._runner.depth):
                self._complete_oldest()
        self._deliver([*self._end_preparation(), *self._scheduler.fail(EngineError("the engine was closed"))])
        while self._in_flight:  # the device must be at rest before its memory goes
            self._complete_oldest()
        self._runner.close()
        self._last_stats = self.stats
        # The model's memory is free when this thread ends, however long this object is kept.
        self._adapters = None
        del self._runner
        gc.collect()

    def _take_in(self) -> bool:
        """Wait for work, move what was submitted into the scheduler; False: the engine closes."""
        while self._is_idle and self._warm_up():
            pass
        with self._changed:
            while self._is_idle:
                self._changed.wait()
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            self._submitted.clear()
            self._cancelled.clear()
            calls = list(self._calls)
            self._calls.clear()
            closing = self._closing
        for job, done in calls:
            try:
                job()
            except Exception as failure:  # noqa: BLE001 (raised in the caller's thread)
                done.set_exception(failure)
            else:
                done.set_result(None)
        outputs: list[Output] = []
        for request, deltas, error in submitted:
            if error is not None:
                outputs.append(Output(request.id, request.index, finish_reason="error", error=error))
                continue
            try:
                self._scheduler.add(self._bound(request), deltas)
            except TurbolmError as refusal:
                outputs.append(Output(request.id, request.index, finish_reason="error", error=refusal))
        ended = (self._scheduler.cancel(request_id, index) for request_id, index in cancelled)
        outputs += [output for output in ended if output is not None]
        if outputs:
            self._deliver(outputs)
        return not closing

    def _bound(self, request: Request) -> Request:
        """With the adapter that bears the name now. Raises RequestError."""
        if request.adapter is None:
            return request
        return replace(request, loaded_adapter=self._room_for_adapters().find(request.adapter))

    def _end_preparation(self) -> list[Output]:
        """The last outputs of requests that never came as far as the scheduler."""
        self._preparation.close()
        error = EngineError("the engine was closed")
        with self._changed:
            keys = [*self._preparing, *((request.id, request.index) for request, _, _ in self._submitted)]
            self._preparing.clear()
            self._submitted.clear()
        return [Output(request_id, index, finish_reason="error", error=error) for request_id, index in keys]

    @property
    def _is_idle(self) -> bool:
        is_asked = self._submitted or self._cancelled or self._calls or self._closing
        return not (is_asked or self._in_flight or self._scheduler.has_work)

    def _warm_up(self) -> bool:
        if not self._is_warm.is_set():
            try:
                if self._runner.warm_up():
                    return True
            except Exception:
                logger.exception("steps can't be prepared further: some are computed a slower way")
            self._is_warm.set()
        return False

    def wait_until_warm(self, timeout: float | None = None) -> bool:
        """Wait until steps are as fast as they get. Work that comes before goes first, and delays it."""
        return self._is_warm.wait(timeout)

    def _start(self, step: Step) -> None:
        try:
            self._in_flight.append((step, self._runner.submit(step)))
        except Exception as error:
            logger.exception("a step could not be started; its %d requests end with an error", len(step.items))
            while self._in_flight:
                self._complete_oldest()
            self._deliver(self._scheduler.fail(_failure(error), step))

    def _complete_oldest(self) -> None:
        step, pending = self._in_flight.popleft()
        try:
            outputs = self._scheduler.update(step, pending.results())
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(step.items))
            outputs = self._scheduler.fail(_failure(error), step)
        self._deliver(outputs)


def _failure(error: Exception) -> TurbolmError:
    return error if isinstance(error, TurbolmError) else EngineError(f"a step failed: {error!r}")
