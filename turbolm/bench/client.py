"""One streamed request to an OpenAI-compatible server, timed event by event. The connection is read as it comes, with
no HTTP library in between, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from turbolm.errors import ConfigError, EngineError
from turbolm.events import EventReader


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go."""

    host: str
    port: int
    is_secure: bool
    base: str  # the path before /chat/completions
    key: str | None = None

    @classmethod
    def at(cls, url: str, key: str | None = None) -> Server:
        """`url` with or without /v1. Raises ConfigError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise ConfigError(f"url is '{url}'; give an address such as http://127.0.0.1:23333")
        base = parts.path.rstrip("/")
        base = base if base.endswith("/v1") else f"{base}/v1"
        is_secure = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if is_secure else 80), is_secure, base, key)


@dataclass(slots=True)
class Timing:
    """What became of a request. Times are in seconds, from when it was due."""

    due: float  # after the start of the run
    first: float | None = None  # the first text
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)  # from one event with text to the next
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finish: str | None = None
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first."""
        if self.first is None or self.answer_tokens < 2:
            return None
        return (self.last - self.first) / (self.answer_tokens - 1)


async def ask(server: Server, path: str, body: Mapping[str, Any], due: float, start: float, timeout: float) -> Timing:
    """Sends a request whose body asks for a stream with usage, and reads to its end. `due`: seconds after `start`, a
    time of `time.perf_counter`. What fails is in the result's `error`."""
    timing = Timing(due)
    began = start + due
    try:
        await asyncio.wait_for(_ask(server, path, body, timing, began), timeout)
    except (asyncio.TimeoutError, TimeoutError):
        timing.error = f"no end within {timeout:g} s"
    except asyncio.IncompleteReadError:
        timing.error = "the server hung up"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        timing.error = f"{type(error).__name__}: {error}"
    except EngineError as error:
        timing.error = str(error)
    timing.last = timing.last or time.perf_counter() - began
    return timing


async def _ask(server: Server, path: str, body: Mapping[str, Any], timing: Timing, began: float) -> None:
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=True if server.is_secure else None)
    try:
        writer.write(_request(server, path, body))
        status, is_chunked = await _head(reader)
        if status != 200:
            rest = await reader.read(4096)
            raise EngineError(f"status {status}: {rest.decode(errors='replace').strip()[:300]}")
        events = EventReader()
        async for piece in _pieces(reader, is_chunked):
            now = time.perf_counter() - began
            for event in events.read(piece):
                _note(timing, event, now)
            if events.is_done:
                break
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    if timing.finish is None:
        raise EngineError("the stream ended without a finish_reason")


def _request(server: Server, path: str, body: Mapping[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    key = f"Authorization: Bearer {server.key}\r\n" if server.key else ""
    head = (
        f"POST {server.base}/{path} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: close\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body comes in chunks."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    return int(lines[0].split()[1]), any(line.replace(" ", "") == "transfer-encoding:chunked" for line in lines[1:])


async def _pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    if not is_chunked:
        while piece := await reader.read(1 << 16):
            yield piece
        return
    while size := int((await reader.readline()).partition(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _note(timing: Timing, event: dict[str, Any], now: float) -> None:
    if usage := event.get("usage"):
        timing.prompt_tokens, timing.answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices") or ():
        timing.finish = choice.get("finish_reason") or timing.finish
        delta = choice.get("delta") or {}
        if choice.get("text") or any(delta.get(name) for name in ("content", "reasoning_content", "reasoning",
                                                                  "tool_calls")):  # fmt: skip
            if timing.first is None:
                timing.first = now
            else:
                timing.gaps.append(now - timing.last)
            timing.last = now
