"""The engine loop: takes requests in, runs steps, hands outputs out. It runs in a thread of its own."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import Step, StepResult
from turbolm.errors import EngineError, TurbolmError
from turbolm.types import Output, Request

logger = logging.getLogger(__name__)

#: Receives the outputs of a step, in order. Called in the engine's thread: must not block or raise.
Deliver = Callable[[Sequence[Output]], None]


class StepRunner(Protocol):
    def run(self, step: Step) -> list[StepResult]: ...


class Engine:
    """`submit`, `cancel` and `close` may be called from any thread. Every submitted request gets
    exactly one final output, whatever happens."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, deliver: Deliver) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._changed = threading.Condition()
        self._submitted: collections.deque[Request] = collections.deque()
        self._cancelled: collections.deque[tuple[str, int]] = collections.deque()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="turbolm-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises EngineError when the engine is closed."""
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            self._submitted.extend(requests)
            self._changed.notify()

    def cancel(self, request_id: str, index: int = 0) -> None:
        """End one answer of a request; an unknown or finished one is no error."""
        with self._changed:
            self._cancelled.append((request_id, index))
            self._changed.notify()

    def close(self) -> None:
        """Cancel what is left, and end the thread. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        while self._take_in():
            step = self._scheduler.next_batch()
            if step is not None:
                self._deliver(self._run(step))
        self._deliver(self._scheduler.fail(EngineError("the engine was closed")))

    def _take_in(self) -> bool:
        """Wait for work, move what was submitted into the scheduler; False: the engine closes."""
        with self._changed:
            while not (self._submitted or self._cancelled or self._closing or self._scheduler.has_work):
                self._changed.wait()
            submitted, cancelled = list(self._submitted), list(self._cancelled)
            self._submitted.clear()
            self._cancelled.clear()
            closing = self._closing
        outputs: list[Output] = []
        for request in submitted:
            try:
                self._scheduler.add(request)
            except TurbolmError as error:
                outputs.append(Output(request.id, request.index, finish_reason="error", error=error))
        ended = (self._scheduler.cancel(request_id, index) for request_id, index in cancelled)
        outputs += [output for output in ended if output is not None]
        if outputs:
            self._deliver(outputs)
        return not closing

    def _run(self, step: Step) -> Sequence[Output]:
        try:
            return self._scheduler.update(step, self._runner.run(step))
        except Exception as error:
            logger.exception("a step failed; its %d requests end with an error", len(step.items))
            failure = error if isinstance(error, TurbolmError) else EngineError(f"a step failed: {error!r}")
            return self._scheduler.fail(failure, step)
