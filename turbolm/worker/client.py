"""This side of one engine process: starting it, talking to it, how it ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

from turbolm.worker import wire

COMMAND = (sys.executable, "-m", "turbolm.worker")
_LOG_LINES = 20  # kept for the report of a crash


class Worker:
    """A child process, connected by a pair of sockets that nobody else can reach."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """`command` gets the number of its end's file descriptor as its last argument."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        self.channel = wire.Channel(ours)
        self.started = time.monotonic()
        self.log: deque[str] = deque(maxlen=_LOG_LINES)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def end(self, timeout: float) -> str:
        """Waits for the process, kills it where that takes longer, and says how it ended, after "it"."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self.channel.close()
        if status >= 0:
            return f"ended with status {status}"
        name = str(-status)
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
        return f"was killed by {name}"
