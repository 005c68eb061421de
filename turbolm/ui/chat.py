"""What the page does: asks an engine, shows the answer while it comes in, tells what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence

from turbolm.answer import Answer, ChatEngine
from turbolm.errors import EngineError, TurbolmError
from turbolm.remote import RemoteLLM
from turbolm.types import Output, ReasoningPart, SamplingParams
from turbolm.ui import controls
from turbolm.ui.history import Row, answer_rows, note, to_messages

_log = logging.getLogger("turbolm.ui")
_INTERVAL = 0.1  # seconds between two looks at what has come
_TICK = 1.0  # seconds after which the page hears of us though nothing came: that is how we learn that it's gone
_REMEDY = "clear the chat to begin anew"


class Chat:
    """One engine, any number of conversations: those are in the pages, not here.

    `base`: what holds where neither the page nor `given` says otherwise; `given`: parameters of the
    command line, which stand in the page's form at first.
    """

    def __init__(self, engine: ChatEngine, base: SamplingParams, given: Mapping[str, object] | None = None) -> None:
        self.engine = engine
        self._given = dict(given or {})
        self._base = SamplingParams.of(base, **{k: v for k, v in self._given.items() if k not in controls.NAMES})

    def form(self) -> list[controls.Control]:
        """The page's sampling parameters."""
        return controls.controls(None if isinstance(self.engine, RemoteLLM) else self._base, self._given)

    async def answer(
        self, rows: Sequence[Row], system: str, values: Sequence[object]
    ) -> AsyncIterator[tuple[list[Row], str]]:
        """Answers the last row. Yields all rows and a line about the answer, at most 10 times a second while
        there is news; `values` as `form()` orders them. Closing the iterator cancels the request.
        An error is a row, not an exception. Where the last row is no question, nothing changes."""
        if not rows or rows[-1]["role"] != "user":
            yield list(rows), ""
            return
        answer = Answer()
        reader: asyncio.Task[None] | None = None
        thought = 0.0  # seconds
        try:
            reader = asyncio.create_task(self._read(answer, rows, system, values))
            seen, shown = -1, 0.0
            while not reader.done():
                await asyncio.wait({reader}, timeout=_INTERVAL)
                if not answer.text:
                    thought = answer.elapsed
                if not reader.done() and (answer.num_tokens != seen or answer.elapsed - shown >= _TICK):
                    seen, shown = answer.num_tokens, answer.elapsed
                    yield [*rows, *answer_rows(answer.parts, thought, is_over=False)], self._progress(answer)
            error = _failure(reader) or answer.error
            done = [*rows, *answer_rows(answer.parts, thought, is_over=True)]
            if error is not None:
                done.append(note("This didn't work:", str(error)))
            elif len(done) == len(rows):
                done.append(note("The answer is empty:", "the model ended at once."))
            yield done, self._summary(answer, error)
        finally:
            if reader is not None:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, answer: Answer, rows: Sequence[Row], system: str, values: Sequence[object]) -> None:
        stream = self._ask(to_messages(rows, system), controls.read(values))
        async with contextlib.aclosing(stream):  # type: ignore[type-var]  # both engines give async generators
            async for output in stream:
                answer.push(output)

    def _ask(self, messages: Sequence[Mapping[str, str]], given: Mapping[str, object]) -> AsyncIterator[Output]:
        params = SamplingParams.of(self._base, **given)
        if isinstance(self.engine, RemoteLLM):
            hidden = {name for name in self._given if name not in controls.NAMES}
            return self.engine.chat(messages, params, explicit=hidden | given.keys())
        return self.engine.chat(messages, params)

    def _progress(self, answer: Answer) -> str:
        if not answer.num_tokens:
            return f"reading… {answer.elapsed:.0f} s"
        is_thinking = bool(answer.parts) and isinstance(answer.parts[-1], ReasoningPart)
        speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
        return f"{'thinking, ' if is_thinking else ''}{answer.num_tokens} tokens{speed}"

    def _summary(self, answer: Answer, error: TurbolmError | None) -> str:
        limit = self.engine.config.max_context
        ending = None if error else answer.ending(limit, _REMEDY)
        statistics = answer.statistics(limit) if answer.num_tokens else ""
        return " — ".join(text for text in (statistics, ending) if text)


def _failure(reader: asyncio.Task[None]) -> TurbolmError | None:
    """Why it ended early. What nobody foresaw is told without its inner life, which the log has."""
    error = reader.exception()
    if error is None or isinstance(error, TurbolmError):
        return error
    _log.error("an answer failed", exc_info=error)
    return EngineError("something went wrong inside turbolm; its log says what")
