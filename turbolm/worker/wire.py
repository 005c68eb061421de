"""What passes between a front end and an engine in another process.

A message is a tuple in msgpack, (kind, field, …), after its length in 4 bytes, little-endian. Requests go by a
number that the front end gives them.

    to the engine   load    VERSION, turbolm's version, model, EngineConfig, show progress, log level
                    submit  ((number, request, deltas), …)
                    cancel  request id, index
                    adapt   number, an adapter's name, where it is or nil: remove it
                    close
    from it         loaded  VERSION, turbolm's version, the model's full name, path of its files or nil, ResolvedConfig
                    failed  error: the model can't be loaded
                    began   (number, …): computed for the first time in the step that comes next
                    step    numbers, tokens, rows, stats: outputs; most have one token and nothing else
                    adapted number, error or nil
                    pulse   stats, whether the engine is warm: about once a second
                    log     level, logger's name, text
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar, get_args, get_type_hints

import msgpack

from turbolm import errors
from turbolm.engine.step import SchedulerStats
from turbolm.errors import EngineError, RequestError, TurbolmError
from turbolm.form import Grammar
from turbolm.types import Output, Request, SamplingParams, TokenLogprob, Usage

VERSION = 1  # of these messages
Message = tuple[Any, ...]
Record = TypeVar("Record")

_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18
_STATS = tuple(field.name for field in dataclasses.fields(SchedulerStats))
_stats_values = attrgetter(*_STATS)
_PARAMS = tuple((field.name, getattr(SamplingParams(), field.name)) for field in dataclasses.fields(SamplingParams))
_OWN = ("params", "compiled_grammar", "loaded_adapter")  # not sent as they are
_REQUEST = tuple(field.name for field in dataclasses.fields(Request) if field.name not in _OWN)
_KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TurbolmError)]
_ERRORS = {kind.__name__: kind for kind in _KINDS}


class Channel:
    """Messages over a connected stream socket. `send` may be called from any thread and never blocks: what the
    socket doesn't take at once, a thread writes. `receive` is for one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._received = bytearray()
        self._changed = threading.Condition()
        self._unsent: deque[bytes] = deque()  # frames; the thread writes the first
        self._writer: threading.Thread | None = None
        self._is_open = True

    def send(self, *message: object) -> None:
        """Once the other side is gone, messages go nowhere: `receive` tells."""
        data = msgpack.packb(message)
        frame = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        with self._changed:
            if not self._is_open:
                return
            if not self._unsent:
                frame = frame[self._write(frame) :]
            if frame:
                self._unsent.append(frame)
                self._changed.notify_all()
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_rest, name="turbolm-channel", daemon=True)
                    self._writer.start()

    def receive(self, timeout: float) -> list[Message]:
        """The messages that came; none after so many seconds without. Raises EOFError when the other side is gone,
        EngineError for what is no message."""
        if not self._poll.poll(timeout * 1000):
            return []
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        self._received += data
        return list(self._messages())

    def close(self) -> None:
        """What is unsent is lost."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends a write that waits
        if self._writer is not None and self._writer is not threading.current_thread():
            self._writer.join()
        self._socket.close()

    def flush(self, timeout: float) -> None:
        """Waits until everything is sent."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unsent or not self._is_open, timeout)

    def _messages(self) -> Iterable[Message]:
        received, start = self._received, 0
        while len(received) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            end = body + int.from_bytes(received[start:body], "little")
            if len(received) < end:
                break
            yield _unpack(bytes(received[body:end]))
            start = end
        del received[:start]

    def _write(self, frame: bytes) -> int:
        """How many bytes the socket takes now."""
        try:
            return self._socket.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._is_open = False
            return len(frame)

    def _write_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsent or not self._is_open)
                if not self._is_open:
                    return
                frame = self._unsent[0]
            try:
                self._socket.sendall(frame)
            except OSError:
                with self._changed:
                    self._is_open = False
                    self._unsent.clear()
                return
            with self._changed:
                self._unsent.popleft()
                self._changed.notify_all()


def _unpack(data: bytes) -> Message:
    try:
        message = msgpack.unpackb(data, use_list=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise EngineError(f"the engine's process and this one don't understand each other ({error!r})") from error
    if not isinstance(message, tuple) or not message:
        raise EngineError("the engine's process and this one don't understand each other: no message")
    return message


def pack_request(request: Request) -> Mapping[str, Any]:
    """Its fields; of the parameters those that are not as by default."""
    packed = {name: getattr(request, name) for name in _REQUEST}
    values = ((name, getattr(request.params, name), default) for name, default in _PARAMS)
    params = packed["params"] = {name: value for name, value, default in values if value != default}
    grammar = request.params.grammar
    if grammar is not None:
        params["grammar"] = (grammar.kind, grammar.value, grammar.thoughts, grammar.parameter)
    return packed


def unpack_request(packed: Mapping[str, Any]) -> Request:
    params = dict(packed["params"])
    if "grammar" in params:
        params["grammar"] = Grammar(*params["grammar"])
    return Request(**{**packed, "params": SamplingParams(**params)})


def pack_outputs(outputs: Sequence[Output], numbers: dict[tuple[str, int], int]) -> Message:
    """A "step" message's numbers, tokens and rows. Requests that end leave `numbers`."""
    short, tokens, rows = [], [], []
    for output in outputs:
        request_id, index, token_ids, _, logprobs, prompt_logprobs, reason, stop, usage, error, embedding = output
        key = (request_id, index)
        if reason is None and len(token_ids) == 1 and not logprobs and not prompt_logprobs:
            short.append(numbers[key])
            tokens.append(token_ids[0])
            continue
        number = numbers[key] if reason is None else numbers.pop(key)
        rows.append((
            number, token_ids, _pack_logprobs(logprobs), _pack_logprobs(prompt_logprobs), reason, stop,
            usage and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.queued),
            error and pack_error(error), embedding,
        ))  # fmt: skip
    return short, tokens, rows


def unpack_output(request: Request, row: Message) -> Output:
    """One of a "step" message's rows."""
    _, token_ids, logprobs, prompt_logprobs, reason, stop, usage, error, embedding = row
    return Output(
        request.id, request.index, token_ids, (), _unpack_logprobs(logprobs), _unpack_logprobs(prompt_logprobs),
        reason, stop, usage and Usage(*usage), error and unpack_error(error), embedding,
    )  # fmt: skip


def _pack_logprobs(entries: Iterable[TokenLogprob | None]) -> list[Any]:
    return [entry and (entry.token_id, entry.logprob, entry.rank, entry.top) for entry in entries]


def _unpack_logprobs(rows: Iterable[Any]) -> tuple[Any, ...]:
    return tuple([row and TokenLogprob(*row) for row in rows])


def pack_stats(stats: SchedulerStats) -> Message:
    values: Message = _stats_values(stats)
    return values


def unpack_stats(values: Message) -> SchedulerStats:
    return SchedulerStats(*values)


def pack_error(error: TurbolmError) -> Message:
    """Its kind (of turbolm.errors: the nearest), text, and parameter."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS)
    return kind, str(error), error.parameter if isinstance(error, RequestError) else None


def unpack_error(packed: Message) -> TurbolmError:
    name, text, parameter = packed
    kind = _ERRORS.get(name, EngineError)
    error = kind(text, parameter) if issubclass(kind, RequestError) else kind(text)
    assert isinstance(error, TurbolmError)
    return error


def pack_record(record: object) -> Mapping[str, Any]:
    """The fields of a dataclass of plain values, and of the dataclasses in it."""
    return dataclasses.asdict(record)  # type: ignore[call-overload, no-any-return]


def unpack_record(kind: type[Record], packed: Mapping[str, Any]) -> Record:
    values = {}
    for name, hint in get_type_hints(kind).items():
        inner = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        value = packed[name]
        is_nested = isinstance(inner, type) and isinstance(value, dict)
        values[name] = unpack_record(inner, value) if is_nested else value  # type: ignore[arg-type]
    return kind(**values)
