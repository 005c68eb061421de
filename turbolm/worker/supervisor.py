"""`SupervisedEngine`: the engine in another process, started again when it dies.

- Requests that have handed nothing out are tried again, the others end with an error: see `ledger`.
- A process that makes no step for `step_timeout` seconds while requests are at work is killed, and counts as dead.
- The first restart is immediate, those that follow without a request finished between wait longer and longer. After
  `max_restarts` of them the engine is given up, and everything ends with an error.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from turbolm import __version__
from turbolm.config import EngineConfig, ResolvedConfig
from turbolm.engine.engine import Deliver
from turbolm.engine.step import SchedulerStats
from turbolm.errors import ConfigError, EngineError, TurbolmError
from turbolm.lora import adapter_sources, as_entries
from turbolm.types import Output, Request
from turbolm.worker import wire
from turbolm.worker.client import COMMAND, Worker
from turbolm.worker.ledger import Ledger

logger = logging.getLogger(__name__)

_TICK = 0.5  # seconds between looks at the clock
_CLOSE_SECONDS = 5.0  # for a process to end by itself
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds before the second restart in a row; it doubles with each
_LONG_LIFE = 60.0  # seconds after which a process has been no failure


@dataclass(frozen=True, slots=True)
class Supervision:
    """When a process counts as dead, and how often it is started again."""

    step_timeout: float = 120.0
    """Seconds without a step while requests are at work; 0: no limit."""
    max_restarts: int = 5
    """Most restarts in a row without a request that was finished between."""

    def __post_init__(self) -> None:
        if not isinstance(self.step_timeout, (int, float)) or not 0 <= self.step_timeout < 1e9:
            raise ConfigError(f"step_timeout must be seconds, 0 or more, got {self.step_timeout!r}")
        if type(self.max_restarts) is not int or self.max_restarts < 0:
            raise ConfigError(f"max_restarts must be a whole number, 0 or more, got {self.max_restarts!r}")


class SupervisedEngine:
    """As `Engine`: `submit`, `cancel` and `close` may be called from any thread, and every submitted request gets
    exactly one final output, whatever happens."""

    def __init__(
        self,
        model: str,
        config: EngineConfig,
        progress: bool,
        deliver: Deliver,
        supervision: Supervision | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """Begins to load the model: `wait_until_loaded` comes before all else. `deliver` is called with outputs, in
        any thread, and must not block, raise or call this engine."""
        self._model = model
        self._settings = config
        self._progress = progress
        self._deliver = deliver
        self._supervision = supervision or Supervision()
        self._command = tuple(command)
        self._lock = threading.RLock()  # what follows, and `deliver`: a last output is the last
        self._ledger = Ledger()
        self._worker: Worker | None = None
        self._is_ready = False
        self._changes: dict[int, Future[None]] = {}  # of adapters, which the process is asked for
        self._trouble: str | None = None
        self._failure: EngineError | None = None  # given up or closed
        self._progressed = 0.0  # when the last step was heard of
        self._stats = SchedulerStats(**dict.fromkeys((field.name for field in dataclasses.fields(SchedulerStats)), 0))
        self._num_restarts = 0
        self._num_failures = 0  # in a row
        self._is_warm = threading.Event()
        self._closing = threading.Event()
        self._close_by = 0.0  # when a process that still runs is killed
        self._loaded = threading.Event()  # or it is known that it can't be
        self._load_error: TurbolmError | None = None
        self.name = model
        self.path: Path | None = None
        """Where the model's files are; None for the null model."""
        self.config: ResolvedConfig
        self._thread = threading.Thread(target=self._supervise, name="turbolm-supervisor", daemon=True)
        self._thread.start()

    def wait_until_loaded(self) -> None:
        """Raises what `load_model` raises, EngineError where the process dies."""
        try:
            self._loaded.wait()
        except BaseException:
            self.close()
            raise
        if self._load_error is not None:
            self._thread.join()
            raise self._load_error

    def submit(self, requests: Sequence[Request], deltas: bool = True) -> None:
        """As `Engine.submit`. While the process starts again, requests wait for it."""
        with self._lock:
            if self._failure is not None:
                raise EngineError(str(self._failure))
            if not self._ledger.has_work:
                self._progressed = time.monotonic()
            self._ledger.add(requests, deltas)
            self._hand_out()

    def cancel(self, request_id: str, index: int = 0) -> None:
        """As `Engine.cancel`."""
        with self._lock:
            is_there, outputs = self._ledger.cancel(request_id, index)
            if is_there and self._worker is not None:
                self._worker.channel.send("cancel", request_id, index)
            elif outputs:
                self._deliver(outputs)

    def add_adapter(self, name: str, source: str) -> None:
        """As `Engine.add_adapter`. Processes that come later load it when they start."""
        self._adapt(name, source)

    def remove_adapter(self, name: str) -> None:
        """As `Engine.remove_adapter`."""
        self._adapt(name, None)

    def _adapt(self, name: str, source: str | None) -> None:
        done: Future[None] = Future()
        with self._lock:
            if not self._is_ready or self._worker is None:
                raise EngineError(self._trouble or "the engine is closed")
            self._changes[id(done)] = done
            self._worker.channel.send("adapt", id(done), name, source)
        done.result()
        with self._lock:
            sources = {known: path for known, path in adapter_sources(self._settings.adapters).items() if known != name}
            sources |= {} if source is None else {name: source}
            self._settings = dataclasses.replace(self._settings, adapters=as_entries(sources))

    def close(self) -> None:
        """Cancel what is left, and end the process. Idempotent."""
        with self._lock:
            if not self._closing.is_set():
                self._close_by = time.monotonic() + _CLOSE_SECONDS
            self._closing.set()
            self._fail_all(EngineError("the engine was closed"))
            if self._worker is not None:
                if self._is_ready:
                    self._worker.channel.send("close")
                else:
                    self._worker.kill()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def wait_until_warm(self, timeout: float | None = None) -> bool:
        """As `Engine.wait_until_warm`."""
        return self._is_warm.wait(timeout)

    @property
    def stats(self) -> SchedulerStats:
        """As the process last told, with how often it was started again."""
        return dataclasses.replace(self._stats, num_restarts=self._num_restarts)

    @property
    def trouble(self) -> str | None:
        """Why nothing is being computed; None: all is well."""
        return self._trouble

    @property
    def is_given_up(self) -> bool:
        """Whether the process died too often. Nothing will be computed any more."""
        return self._failure is not None and not self._closing.is_set()

    @property
    def worker_pid(self) -> int:
        """The present process's, or the last one's; 0 before the first."""
        return self._worker.pid if self._worker else 0

    # The supervisor's thread. It starts the processes, too: they end with the thread that started them.

    def _supervise(self) -> None:
        while (worker := self._start()) is not None:
            how = self._attend(worker)
            with self._lock:
                self._note_end(worker, how)
        self._loaded.set()

    def _start(self) -> Worker | None:
        """A process, after a while perhaps; None: there is to be no further one."""
        while not self._closing.wait(self._delay) and self._failure is None:
            try:
                worker = Worker(self._command)
            except OSError as error:
                with self._lock:
                    self._note_failure(f"can't be started ({error})", log="")
                continue
            with self._lock:
                self._num_restarts += self._worker is not None
                self._worker = worker
                if self._closing.is_set():
                    worker.kill()
            return worker
        return None

    @property
    def _delay(self) -> float:
        """Seconds to wait before the next process is started."""
        return 0.0 if self._num_failures < 2 else min(_FIRST_DELAY * 2 ** (self._num_failures - 2), _LONGEST_DELAY)

    def _attend(self, worker: Worker) -> str:
        """Until the process ends: how."""
        level = logging.getLogger().getEffectiveLevel()
        settings = wire.pack_record(self._settings)
        worker.channel.send("load", wire.VERSION, __version__, self._model, settings, self._progress, level)
        hung = ""
        while True:
            try:
                for message in worker.channel.receive(_TICK):
                    with self._lock:
                        self._handle(worker, *message)
            except EOFError:
                break
            except EngineError as error:
                hung = f"was killed: {error}"
            if not hung and self._closing.is_set() and time.monotonic() > self._close_by:
                hung = "didn't end when it was told to, and was killed"
            limit = self._supervision.step_timeout
            if not hung and limit and self._is_stuck(limit):
                hung = f"made no step for {limit:g} s, and was killed"
            if hung:
                worker.kill()
                break
        how = worker.end(_CLOSE_SECONDS)
        return hung or how

    def _is_stuck(self, limit: float) -> bool:
        with self._lock:
            return self._is_ready and self._ledger.has_work and time.monotonic() - self._progressed > limit

    def _handle(self, worker: Worker, kind: str, *fields: object) -> None:
        # mypy can't know what is in a message
        match kind, fields:
            case "step", (numbers, tokens, rows, stats):
                self._take(self._ledger.take(numbers, tokens, rows), stats)  # type: ignore[arg-type]
            case "began", (numbers,):
                self._ledger.begin(numbers)  # type: ignore[arg-type]
            case "adapted", (number, error):
                self._end_change(number, error)  # type: ignore[arg-type]
            case "pulse", (stats, is_warm):
                self._take([], stats)  # type: ignore[arg-type]
                if is_warm:
                    self._is_warm.set()
            case "log", (level, name, text):
                worker.log.append(str(text))
                logging.getLogger(str(name)).log(level, "%s", text)  # type: ignore[arg-type]
            case "loaded", (version, package, name, path, config):
                self._begin(version, package, name, path, config)  # type: ignore[arg-type]
            case "failed", (error,):
                self._load_error = wire.unpack_error(error)  # type: ignore[arg-type]
            case _:
                raise EngineError(f"it sent a message that this process doesn't know: {kind!r}")

    def _end_change(self, number: int, error: wire.Message | None) -> None:
        done = self._changes.pop(number)
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(wire.unpack_error(error))

    def _begin(self, version: int, package: str, name: str, path: str | None, config: dict[str, object]) -> None:
        """The process is ready."""
        if (version, package) != (wire.VERSION, __version__):
            raise EngineError(f"it is turbolm {package}, and this process {__version__}: restart it")
        self.name = name
        self.path = None if path is None else Path(path)
        self.config = wire.unpack_record(ResolvedConfig, config)
        # What adapters came to later takes no more room away.
        self._settings = dataclasses.replace(
            self._settings,
            max_adapters=self.config.max_adapters,
            max_adapter_rank=self.config.max_adapter_rank,
        )
        self._trouble = None
        self._is_ready = True
        self._progressed = time.monotonic()
        self._hand_out()
        self._loaded.set()

    def _take(self, outputs: list[Output], stats: wire.Message) -> None:
        found = wire.unpack_stats(stats)
        if outputs or found.num_steps != self._stats.num_steps:
            self._progressed = time.monotonic()
        self._stats = found
        if outputs:
            self._deliver(outputs)
        if self._ledger.has_suspects:
            self._hand_out()

    def _hand_out(self) -> None:
        """Gives the process what is due. A suspect shows by its first output that it does no harm."""
        if not self._is_ready or self._worker is None:
            return
        due = self._ledger.hand_out()
        if due:
            rows = [(entry.number, wire.pack_request(entry.request), entry.deltas or entry.is_suspect) for entry in due]
            self._worker.channel.send("submit", rows)

    def _note_end(self, worker: Worker, how: str) -> None:
        """A process has ended."""
        was_ready, self._is_ready = self._is_ready, False
        for done in self._changes.values():
            done.set_exception(EngineError(f"the engine's process {how} before the adapter was changed"))
        self._changes.clear()
        self._is_warm.clear()
        self._stats = dataclasses.replace(
            self._stats, num_used_blocks=0, num_idle_blocks=0, num_running=0, num_waiting=0
        )
        if self._closing.is_set():
            return
        log = "\nThe last lines of its log:\n  " + "\n  ".join(worker.log) if worker.log else ""
        if self._loaded.is_set():
            if self._load_error is not None:  # it did load before: memory that isn't free yet, perhaps
                how, self._load_error = f"{how} ({self._load_error})", None
            self._note_crash(worker, was_ready, how, log)
        self._note_failure(how, log)

    def _note_crash(self, worker: Worker, was_ready: bool, how: str, log: str) -> None:
        age, num_open = time.monotonic() - worker.started, self._ledger.num_open
        if self._ledger.num_finished or (was_ready and age > _LONG_LIFE):
            self._num_failures = 0
        self._ledger.num_finished = 0
        outputs = self._ledger.crash(how)
        if outputs:
            self._deliver(outputs)
        logger.error(
            "the engine's process %d %s after %.0f s; of its %d requests %d end with it, the others are tried again%s",
            worker.pid, how, age, num_open, len(outputs), log,
        )  # fmt: skip

    def _note_failure(self, how: str, log: str) -> None:
        if not self._loaded.is_set():
            self._failure = EngineError("the model could not be loaded")
            self._load_error = self._load_error or EngineError(
                f"the engine's process {how} before '{self._model}' was loaded{log}"
            )
            return
        self._num_failures += 1
        self._trouble = f"the engine's process {how}; it is being started again"
        if self._num_failures > self._supervision.max_restarts:
            self._trouble = f"the engine's process {how}; it failed {self._num_failures} times in a row and is given up"
            logger.critical("%s", self._trouble)
            self._fail_all(EngineError(self._trouble))

    def _fail_all(self, error: EngineError) -> None:
        self._failure = self._failure or error
        outputs = self._ledger.fail(error)
        if outputs:
            self._deliver(outputs)
