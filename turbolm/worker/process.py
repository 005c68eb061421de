"""The other side: a process that loads a model and runs its engine for the process that started it."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import itertools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from turbolm import __version__
from turbolm.config import EngineConfig, ResolvedConfig
from turbolm.engine.engine import Engine, PendingStep, StepRunner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import Step, StepResult
from turbolm.errors import CapacityError, EngineError, TurbolmError, UserError
from turbolm.grammar import GrammarCompiler
from turbolm.types import Output
from turbolm.worker import wire

if TYPE_CHECKING:
    from turbolm.engine.adapters import Adapters

PULSE_SECONDS = 1.0
EXIT_LOAD, EXIT_BROKEN = 3, 4  # statuses: the model can't be loaded; steps fail, or the loop has ended
_MAX_FAILED_STEPS = 3  # in a row: the device, or what it holds, is broken
_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


class EngineModel(Protocol):
    """What the process needs of a loaded model."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def config(self) -> ResolvedConfig: ...
    @property
    def scheduler(self) -> Scheduler: ...
    @property
    def runner(self) -> StepRunner: ...
    @property
    def grammars(self) -> GrammarCompiler | None: ...
    @property
    def adapters(self) -> Adapters | None: ...


Load = Callable[[str, EngineConfig, bool], EngineModel]


def main(load: Load, arguments: Sequence[str]) -> None:
    """`arguments`: the number of the file descriptor that leads to the front end. Ends the process."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the front end's matter
    faulthandler.enable()
    Process(wire.Channel(socket.socket(fileno=int(arguments[0])))).run(load)


class Process:
    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel
        self._numbers: dict[tuple[str, int], int] = {}  # of requests, by id and index
        self._engine: Engine | None = None

    def run(self, load: Load) -> None:
        """Returns never: ends the process."""
        threading.excepthook = lambda what: self._die(what.exc_value)
        sys.excepthook = lambda _, error, __: self._die(error)
        (_, version, package, name, config, progress, level), *rest = self._first()
        self._log_to_channel(level)
        if (version, package) != (wire.VERSION, __version__):
            # turbolm was updated under a running server
            self._refuse(
                EngineError(f"the engine is turbolm {__version__}, the process that asks {package}: restart it")
            )
        try:
            model = load(name, wire.unpack_record(EngineConfig, config), progress)
        except TurbolmError as error:
            self._refuse(error)
        gc.collect()
        gc.freeze()  # what loading made stays
        gc.set_threshold(20_000, 20, 20)  # a step makes thousands of objects and hardly ever a cycle
        path = None if model.path is None else str(model.path)
        self._channel.send("loaded", wire.VERSION, __version__, model.name, path, wire.pack_record(model.config))
        runner = _WatchedRunner(model.runner, self._begin, self._die)
        self._engine = Engine(model.scheduler, runner, self._deliver, model.grammars, model.adapters)
        self._serve(self._engine, rest)

    def _first(self) -> list[wire.Message]:
        while True:
            messages = self._receive(PULSE_SECONDS)
            if messages:
                return messages

    def _serve(self, engine: Engine, messages: list[wire.Message]) -> None:
        is_warm, last = False, 0.0
        while True:
            for kind, *fields in messages:
                if kind == "submit":
                    self._submit(engine, fields[0])
                elif kind == "cancel":
                    engine.cancel(*fields)
                elif kind == "adapt":  # takes its time
                    threading.Thread(target=self._adapt, args=(engine, *fields), daemon=True).start()
                elif kind == "close":
                    engine.close()
                    self._leave(0)
            now = time.monotonic()
            if now - last >= PULSE_SECONDS or is_warm != engine.wait_until_warm(0):
                last, is_warm = now, engine.wait_until_warm(0)
                self._channel.send("pulse", wire.pack_stats(engine.stats), is_warm)
            messages = self._receive(PULSE_SECONDS if is_warm else PULSE_SECONDS / 10)

    def _submit(self, engine: Engine, packed: wire.Message) -> None:
        for deltas, rows in itertools.groupby(packed, lambda row: row[2]):
            requests = []
            for number, fields, _ in rows:
                requests.append(request := wire.unpack_request(fields))
                self._numbers[request.id, request.index] = number
            engine.submit(requests, deltas)

    def _adapt(self, engine: Engine, number: int, name: str, source: str | None) -> None:
        try:
            if source is None:
                engine.remove_adapter(name)
            else:
                engine.add_adapter(name, source)
        except TurbolmError as error:
            self._channel.send("adapted", number, wire.pack_error(error))
        except Exception as error:  # nobody's answers have to end with it
            logger.exception("the adapter '%s' could not be changed", name)
            self._channel.send("adapted", number, wire.pack_error(EngineError(f"the change failed: {error!r}")))
        else:
            self._channel.send("adapted", number, None)

    def _receive(self, timeout: float) -> list[wire.Message]:
        try:
            return self._channel.receive(timeout)
        except EOFError:
            os._exit(0)  # nobody is left to work for

    def _begin(self, step: Step) -> None:
        """Says which requests a step computes for the first time, before it can come to harm."""
        first = [item.sequence.request for item in step.items if item.start <= item.sequence.num_cached]
        if first:
            self._channel.send("began", [self._numbers[request.id, request.index] for request in first])

    def _deliver(self, outputs: Sequence[Output]) -> None:
        if outputs and self._engine is not None:
            stats = wire.pack_stats(self._engine.stats)
            self._channel.send("step", *wire.pack_outputs(outputs, self._numbers), stats)

    def _refuse(self, error: TurbolmError) -> None:
        self._channel.send("failed", wire.pack_error(error))
        self._leave(EXIT_LOAD)

    def _die(self, error: BaseException | None) -> None:
        """Something went wrong that a fresh process may do better."""
        logger.critical("the engine's process gives up", exc_info=error)
        self._leave(EXIT_BROKEN)

    def _leave(self, status: int) -> None:
        self._channel.flush(timeout=5.0)
        sys.stderr.flush()
        os._exit(status)  # threads in native code, a device in the middle of something: nothing to wait for

    def _log_to_channel(self, level: int) -> None:
        """The front end writes the log."""
        root = logging.getLogger()
        root.handlers[:] = [_ChannelHandler(self._channel)]
        root.setLevel(level)


class _ChannelHandler(logging.Handler):
    def __init__(self, channel: wire.Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send("log", record.levelno, record.name, self.format(record))


class _WatchedRunner:
    """A runner that tells what it begins, and gives up when nothing succeeds any more."""

    def __init__(
        self, runner: StepRunner, begin: Callable[[Step], None], give_up: Callable[[BaseException | None], None]
    ) -> None:
        self.depth = runner.depth
        self._runner = runner
        self._begin = begin
        self._give_up = give_up
        self._num_failed = 0

    @property
    def num_replays(self) -> int:
        return self._runner.num_replays

    def submit(self, step: Step) -> PendingStep:
        self._begin(step)
        try:
            return _WatchedStep(self._runner.submit(step), self)
        except Exception as error:
            self.note(error)
            raise

    def warm_up(self) -> bool:
        return self._runner.warm_up()

    def close(self) -> None:
        self._runner.close()

    def note(self, error: Exception | None) -> None:
        """How a step ended."""
        if isinstance(error, (UserError, CapacityError)):
            return
        self._num_failed = 0 if error is None else self._num_failed + 1
        if self._num_failed >= _MAX_FAILED_STEPS:
            self._give_up(error)


class _WatchedStep:
    def __init__(self, pending: PendingStep, runner: _WatchedRunner) -> None:
        self._pending = pending
        self._runner = runner

    def results(self) -> list[StepResult]:
        try:
            results = self._pending.results()
        except Exception as error:
            self._runner.note(error)
            raise
        self._runner.note(None)
        return results


def _end_with_parent() -> None:
    """The kernel ends this process when the thread that started it is gone (Linux), whatever it is busy with."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
