"""Messages between the ranks' processes, over a private pair of sockets: a kind, and bytes that it explains."""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from collections.abc import Sequence
from typing import NamedTuple

from turbolm.errors import EngineError

_HEADER = struct.Struct("<iI")  # kind, bytes that follow
_BUFFER_BYTES = 4 << 20  # of a socket: more than the largest step, so that writing doesn't wait for the reader
_UNREAD = getattr(socket, "SIOCOUTQ", 0x5411)  # ioctl: bytes that the other side has not taken yet


class Message(NamedTuple):
    kind: int
    body: memoryview  # valid until the next message


class Channel:
    """One end. Not thread-safe."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._buffer = bytearray(1 << 16)

    @staticmethod
    def pair() -> tuple[Channel, socket.socket]:
        """This process's end, and a socket for the other's `Channel`."""
        ours, theirs = socket.socketpair()
        return Channel(ours), theirs

    def set_timeout(self, seconds: float | None) -> None:
        """How long `send` and `receive` wait before they raise TimeoutError."""
        self._socket.settimeout(seconds)

    def send(self, kind: int, parts: Sequence[bytes] = ()) -> None:
        """Raises OSError where the other end is gone, TimeoutError where it takes nothing."""
        self._socket.sendall(b"".join([_HEADER.pack(kind, sum(map(len, parts))), *parts]))

    def receive(self) -> Message | None:
        """None: the other end is closed."""
        header = self._read(_HEADER.size)
        if header is None:
            return None
        kind, size = _HEADER.unpack(header)
        body = self._read(size)
        return None if body is None else Message(kind, body)

    def _read(self, size: int) -> memoryview | None:
        if len(self._buffer) < size:
            self._buffer = bytearray(2 * size)
        view, done = memoryview(self._buffer)[:size], 0
        while done < size:
            try:
                count = self._socket.recv_into(view[done:])
            except ConnectionResetError:
                count = 0
            if not count:
                return None
            done += count
        return view

    @property
    def num_unread(self) -> int:
        """Bytes sent that the other end has not taken."""
        answer = fcntl.ioctl(self._socket.fileno(), _UNREAD, struct.pack("i", 0))
        return int(struct.unpack("i", answer)[0])

    def close(self) -> None:
        self._socket.close()


def inherited(file_descriptor: int) -> Channel:
    """The end that a parent process left open for this one."""
    if sys.platform == "win32":
        raise EngineError("tensor parallelism needs Linux")
    return Channel(socket.socket(fileno=file_descriptor))
