"""The processes of ranks 1 and up: started, watched and ended by rank 0's."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

from turbolm.errors import CapacityError, EngineError, UserError
from turbolm.parallel.channel import Channel, Message

logger = logging.getLogger(__name__)

STUCK_SECONDS = 30.0  # without progress, after which a rank counts as lost
_LOADING_SECONDS = 900.0
_WATCH_SECONDS = 0.1
_END_SECONDS = 5.0  # that a process has to end by itself
_PR_SET_PDEATHSIG = 1


class RankProcesses:
    """One process for each rank from 1 on, running `python -m module DESCRIPTOR RANK`, the descriptor being its
    channel's. If one ends, all others do, and `check` says which it was."""

    def __init__(self, module: str, size: int) -> None:
        """`size`: ranks, this process's included. Raises EngineError where a process can't be started."""
        self._failure: str | None = None
        self._closing = threading.Event()
        self._started = threading.Event()
        self._processes: list[subprocess.Popen[bytes]] = []
        pairs = [Channel.pair() for _ in range(1, size)]
        self._channels = [ours for ours, _ in pairs]
        # The thread that starts a process must outlive it: `end_with_parent` refers to it.
        self._thread = threading.Thread(
            target=self._run, args=(module, [theirs for _, theirs in pairs]), name="turbolm-ranks", daemon=True
        )
        self._thread.start()
        self._started.wait()
        self.check()

    def send(self, kind: int, parts: Sequence[bytes] = ()) -> None:
        """To every rank."""
        self.check()
        for rank, channel in enumerate(self._channels, 1):
            try:
                channel.send(kind, parts)
            except TimeoutError:
                self.lose(f"rank {rank} has taken no message for {STUCK_SECONDS:.0f} s")
            except OSError:
                self.await_exit(_END_SECONDS)  # a process that closes its end is ending: say how
                self.lose(f"rank {rank} has closed its channel")

    def receive(self) -> list[Message]:
        """The next message of each rank, waited for. For the time of loading: steps have no answers."""
        messages = []
        for rank, channel in enumerate(self._channels, 1):
            channel.set_timeout(_LOADING_SECONDS)
            try:
                message = channel.receive()
            except TimeoutError:
                self.lose(f"rank {rank} has said nothing for {_LOADING_SECONDS:.0f} s")
            channel.set_timeout(STUCK_SECONDS)
            if message is None:
                self.await_exit(_END_SECONDS)  # a process that closes its end is ending: say how
                self.lose(f"rank {rank} has closed its channel")
            messages.append(message)
        return messages

    def check(self) -> None:
        """Raises EngineError if a rank was lost."""
        if self._failure is not None:
            raise self._error()

    def watching(self) -> AbstractContextManager[None]:
        """Around work with the other ranks. Whatever it raises leaves ranks out of step, so all are given up: it
        becomes an EngineError, which names the rank that was lost if one was. (UserError and CapacityError stay as
        they are: what raises them does so before it works with others.)"""
        return _Watch(self)

    def await_exit(self, seconds: float) -> bool:
        """Whether a rank is lost, or is found to be so within this time."""
        end = time.monotonic() + seconds
        while self._failure is None and time.monotonic() < end:
            time.sleep(_WATCH_SECONDS / 2)
        return self._failure is not None

    def lose_stuck(self) -> NoReturn:
        """To be called when nothing has happened for STUCK_SECONDS. Raises EngineError."""
        stuck = [rank for rank, channel in enumerate(self._channels, 1) if channel.num_unread]
        who = f"rank {', '.join(map(str, stuck))}" if stuck else "a rank"
        self.lose(f"{who} has not answered for {STUCK_SECONDS:.0f} s")

    def lose(self, failure: str) -> NoReturn:
        """Give all up. Raises EngineError."""
        self._failure = self._failure or failure
        self._closing.set()
        raise self._error()

    def close(self) -> None:
        """End all processes. Idempotent."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._failure = self._failure or "the engine was closed"

    def _error(self) -> EngineError:
        return EngineError(
            f"{self._failure}; the model is spread over {len(self._channels) + 1} processes and can't go on with "
            "fewer: load it again"
        )

    def _run(self, module: str, ends: list[socket.socket]) -> None:
        try:
            for end in ends:
                command = [sys.executable, "-m", module, str(end.fileno()), str(len(self._processes) + 1)]
                process = subprocess.Popen(
                    command, pass_fds=[end.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )  # of its own, so that Ctrl-C in a terminal reaches this process alone
                self._processes.append(process)
        except OSError as error:
            self._failure = f"a rank's process can't be started: {error}"
            self._closing.set()
        for end in ends:
            end.close()
        self._started.set()
        while not self._closing.wait(_WATCH_SECONDS):
            for rank, process in enumerate(self._processes, 1):
                code = process.poll()
                if code is not None and self._failure is None:
                    self._failure = f"rank {rank} (process {process.pid}) {_ending(code)}"
                    self._closing.set()
        self._end_all()

    def _end_all(self) -> None:
        """Closed channels end them; what doesn't, is killed. After a failure none has anything left to do."""
        for channel in self._channels:
            channel.close()
        end = time.monotonic() + (0 if self._failure else _END_SECONDS)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            if process.returncode is None:
                process.kill()
                process.wait()


class _Watch(AbstractContextManager[None]):
    def __init__(self, processes: RankProcesses) -> None:
        self._processes = processes

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, UserError | CapacityError):
            return
        processes = self._processes
        if not processes.await_exit(1 if isinstance(error, RuntimeError) else 0) and "imed out" in str(error):
            processes.lose_stuck()
        try:
            processes.lose(f"rank 0 failed: {error or type(error).__name__}")
        except EngineError as lost:
            raise lost from error


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def end_with_parent() -> None:
    """From now on the system kills this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
