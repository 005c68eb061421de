"""Who has asked for what: the requests that an engine in another process owes an end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from turbolm.errors import EngineError, RequestError
from turbolm.types import Output, Request, Usage
from turbolm.worker import wire

MAX_CRASHES = 2  # at work in so many, a request is not tried again


class Entry:
    """A request without its last output."""

    __slots__ = (
        "deltas", "has_output", "has_progress", "held", "is_at_work", "is_cancelled", "is_handed", "num_crashes",
        "num_tokens", "number", "request",
    )  # fmt: skip

    def __init__(self, number: int, request: Request, deltas: bool) -> None:
        self.number = number
        self.request = request
        self.deltas = deltas
        self.num_tokens = 0  # handed out
        self.has_output = False  # handed out
        self.held: list[Output] = []  # without deltas: what the process has told, for the last output
        self.num_crashes = 0  # that it may have caused
        self.is_cancelled = False
        # Of the present process:
        self.is_handed = False
        self.is_at_work = False  # has been in a step
        self.has_progress = False  # a step has brought something

    @property
    def is_suspect(self) -> bool:
        return self.num_crashes > 0

    def end(self, error: EngineError | None) -> Output:
        """Its last output, where the engine can't give one."""
        request, usage = self.request, Usage(len(self.request.prompt_token_ids), self.num_tokens)
        reason = "cancelled" if error is None else "error"
        return Output(request.id, request.index, finish_reason=reason, usage=usage, error=error)  # type: ignore[arg-type]


class Ledger:
    """Gives each request exactly one last output, however often the process dies. Not thread-safe.

    A request that was at work when a process died, and of which nothing was heard yet, is a suspect. Suspects are
    tried again one at a time, each until something is heard of it, so that the one that kills the process can be told
    from those that happened to be there."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}  # by number, in order of arrival
        self._numbers: dict[tuple[str, int], int] = {}
        self._next = 0
        self._due: list[Entry] = []  # not given to the process yet; may have ended
        self._suspects: dict[int, Entry] = {}  # of `_entries`
        self._on_trial: Entry | None = None
        self.num_finished = 0

    @property
    def has_work(self) -> bool:
        return bool(self._entries)

    @property
    def has_suspects(self) -> bool:
        return bool(self._suspects)

    @property
    def num_open(self) -> int:
        return len(self._entries)

    def add(self, requests: Sequence[Request], deltas: bool) -> None:
        """Raises RequestError where a request's (id, index) is in use; then none is added."""
        keys = [(request.id, request.index) for request in requests]
        is_unique = len(set(keys)) == len(keys)
        for key in keys:
            if key in self._numbers or (not is_unique and keys.count(key) > 1):
                raise RequestError(f"request '{key[0]}' (answer {key[1]}) is already in work: use another id")
        for key, request in zip(keys, requests, strict=True):
            entry = self._entries[self._next] = Entry(self._next, request, deltas)
            self._numbers[key] = self._next
            self._due.append(entry)
            self._next += 1

    def hand_out(self) -> list[Entry]:
        """Those to give to the process now; it counts as having them."""
        due, self._due = [entry for entry in self._due if entry.number in self._entries], []  # some were cancelled
        if self._on_trial is None and self._suspects:
            self._on_trial = next(iter(self._suspects.values()))
            due.append(self._on_trial)
        for entry in due:
            entry.is_handed = True
        return due

    def cancel(self, request_id: str, index: int) -> tuple[bool, list[Output]]:
        """Whether the process has to be told, and otherwise the last output, if the request is there at all."""
        entry = self._entries.get(self._numbers.get((request_id, index), -1))
        if entry is None:
            return False, []
        if entry.is_handed:
            entry.is_cancelled = True
            return True, []
        return False, [self._finish(entry, entry.end(None))]

    def begin(self, numbers: Iterable[int]) -> None:
        """These requests are in the step that comes next."""
        for number in numbers:
            if number in self._entries:
                self._entries[number].is_at_work = True

    def take(self, numbers: Sequence[int], tokens: Sequence[int], rows: Sequence[wire.Message]) -> list[Output]:
        """The outputs in a "step" message."""
        outputs: list[Output] = []
        entries = self._entries
        for number, token in zip(numbers, tokens, strict=True):
            entry = entries.get(number)
            if entry is None:
                continue
            output = Output(entry.request.id, entry.request.index, (token,))
            if entry.has_output:  # as hundreds of times per step
                entry.num_tokens += 1
                outputs.append(output)
            else:
                self._hand_on(entry, output, outputs)
        for row in rows:
            entry = entries.get(row[0])
            if entry is not None:
                self._hand_on(entry, wire.unpack_output(entry.request, row), outputs)
        return outputs

    def crash(self, how: str) -> list[Output]:
        """The process died. Returns the last outputs of requests that can't be tried again."""
        outputs = []
        self._on_trial = None
        for entry in tuple(self._entries.values()):
            error = self._charge(entry, how)
            if entry.is_cancelled or error is not None:
                outputs.append(self._finish(entry, entry.end(None if entry.is_cancelled else error)))
        self._suspects = {number: entry for number, entry in self._entries.items() if entry.is_suspect}
        self._due = [entry for entry in self._entries.values() if not entry.is_suspect]
        return outputs

    def fail(self, error: EngineError) -> list[Output]:
        """Ends all requests."""
        return [self._finish(entry, entry.end(error)) for entry in tuple(self._entries.values())]

    def _hand_on(self, entry: Entry, output: Output, outputs: list[Output]) -> None:
        if not entry.has_progress:
            entry.has_progress = True
            self._acquit(entry)
        if output.finish_reason is not None:
            whole = Output.collect([*entry.held, output]) if entry.held else output
            outputs.append(self._finish(entry, whole))
        elif entry.deltas:
            entry.has_output = True
            entry.num_tokens += len(output.token_ids)
            outputs.append(output)
        else:
            entry.held.append(output)

    def _charge(self, entry: Entry, how: str) -> EngineError | None:
        """Why the request can't be tried again, if so."""
        entry.num_crashes += entry.is_at_work and not entry.has_progress
        entry.is_handed = entry.is_at_work = entry.has_progress = False
        entry.held.clear()
        if entry.has_output:
            return EngineError(f"the engine's process {how} in the middle of this answer: send the request again")
        if entry.num_crashes >= MAX_CRASHES:
            return EngineError(
                f"the engine's process died {entry.num_crashes} times at work on request '{entry.request.id}' (the "
                f"last time, it {how}): it is not tried again"
            )
        return None

    def _acquit(self, entry: Entry) -> None:
        self._suspects.pop(entry.number, None)
        if self._on_trial is entry:
            self._on_trial = None

    def _finish(self, entry: Entry, output: Output) -> Output:
        self._acquit(entry)
        del self._entries[entry.number]
        del self._numbers[entry.request.id, entry.request.index]
        self.num_finished += 1
        return output
