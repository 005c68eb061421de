"""One request to a server and how it ended, over a connection of its own: what a load is made of."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["done", "failed", "left", "refused", "hung", "wrong"]
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "left", "refused", "hung", "wrong")
"""An answer of the length asked for; an error, said as the API says it; this side hung up; 429; no end in time;
anything else."""

_CONNECT_TRIES = 5


@dataclass(frozen=True, slots=True)
class Errand:
    """A completion to ask for, and when to hang up."""

    prompt: str
    num_tokens: int
    streams: bool
    leaves_after: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Ending:
    outcome: Outcome
    note: str = ""


async def run(host: str, port: int, errand: Errand, timeout: float) -> Ending:
    """Sends the request and reads to its end."""
    limit = timeout if errand.leaves_after is None else errand.leaves_after
    try:
        return await asyncio.wait_for(_run(host, port, errand), limit)
    except (asyncio.TimeoutError, TimeoutError):
        return Ending("hung" if errand.leaves_after is None else "left")


async def _run(host: str, port: int, errand: Errand) -> Ending:
    body = json.dumps({
        "prompt": errand.prompt, "max_tokens": errand.num_tokens, "stream": errand.streams, "temperature": 0,
        "ignore_eos": True,
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await _connect(host, port)
    try:
        writer.write(head.encode() + body)
        answer = await reader.read(-1)
    except OSError as error:
        return Ending("wrong", f"the connection broke: {error!r}")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return judge(answer, errand)


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """The kernel may refuse in a crowd."""
    for attempt in range(_CONNECT_TRIES):
        try:
            return await asyncio.open_connection(host, port)
        except OSError:
            if attempt == _CONNECT_TRIES - 1:
                raise
            await asyncio.sleep(0.2 * (attempt + 1))
    raise AssertionError


def judge(answer: bytes, errand: Errand) -> Ending:
    """What the bytes of a whole response say."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    try:
        if b"transfer-encoding: chunked" in head.lower():
            body = _unchunked(body)
        if status == [b"429"]:
            return Ending("refused")
        if status != [b"200"]:
            return Ending("failed", json.loads(body)["error"]["message"])
        return _judge_stream(body, errand) if errand.streams else _judge_choice(json.loads(body)["choices"], errand)
    except (ValueError, LookupError, TypeError) as error:
        return Ending("wrong", f"no answer ({error!r}): {answer[-200:]!r}")


def _unchunked(body: bytes) -> bytes:
    pieces: list[bytes] = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return b"".join(pieces)
        pieces.append(body[:length])
        body = body[length + 2 :]
    raise ValueError("cut off")


def _judge_stream(body: bytes, errand: Errand) -> Ending:
    *events, done, rest = body.split(b"\n\n")
    if done != b"data: [DONE]" or rest:
        raise ValueError("no [DONE] at the end")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events if not event.startswith(b":")]
    errors = [chunk["error"]["message"] for chunk in chunks if "error" in chunk]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    if errors:
        is_last = "error" in chunks[-1] and not any(choice["finish_reason"] for choice in choices)
        return Ending("failed", errors[0]) if len(errors) == 1 and is_last else Ending("wrong", "several endings")
    return _judge_choice(choices, errand)


def _judge_choice(choices: list[dict[str, Any]], errand: Errand) -> Ending:
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    length = sum(len(choice["text"]) for choice in choices)  # of the null model's tokens, each a letter
    if reasons != ["length"] or choices[-1]["finish_reason"] is None:
        return Ending("wrong", f"endings: {reasons}")
    if length != errand.num_tokens:
        return Ending("wrong", f"{length} tokens instead of {errand.num_tokens}")
    return Ending("done")
