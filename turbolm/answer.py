"""One answer as it comes in: its parts and its timing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from turbolm.errors import TurbolmError
from turbolm.types import FinishReason, Output, Part, ReasoningPart, SamplingParams, TextPart, Usage, join_parts


class Limits(Protocol):
    @property
    def max_context(self) -> int: ...


class ChatEngine(Protocol):
    """What the chat needs: `AsyncLLM`, or a server that looks like it."""

    model_name: str
    default_params: SamplingParams

    @property
    def config(self) -> Limits: ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None
    ) -> AsyncIterator[Output]: ...

    async def close(self) -> None: ...


class Answer:
    """Collects the deltas of one answer."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.num_tokens = 0
        self.usage: Usage | None = None
        self.finish_reason: FinishReason | None = None
        self.error: TurbolmError | None = None
        self._started = time.monotonic()
        self._first = 0.0  # when the first token came; 0: not yet
        self._last = 0.0

    def push(self, output: Output) -> None:
        """Adds a delta."""
        now = time.monotonic()
        if output.parts or output.token_ids:
            self._first = self._first or now
            self._last = now
        # Servers send texts without their tokens: until the usage comes, a delta counts as one.
        self.num_tokens += len(output.token_ids) or bool(output.parts)
        self.parts[-1:] = join_parts([*self.parts[-1:], *output.parts])
        if output.is_final:
            self.finish_reason, self.usage, self.error = output.finish_reason, output.usage, output.error
            if self.usage and self.usage.completion_tokens:
                self.num_tokens = self.usage.completion_tokens

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def time_to_first_token(self) -> float:
        """Seconds; 0 if none came."""
        return self._first - self._started if self._first else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there is no second."""
        elapsed = self._last - self._first
        return (self.num_tokens - 1) / elapsed if self.num_tokens > 1 and elapsed > 0 else 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the question."""
        return time.monotonic() - self._started

    def statistics(self, max_context: int) -> str:
        """One line: `38 tokens, 45.2 tokens/s, first token 0.12 s, context 61 of 2048`."""
        words = [f"{self.num_tokens} tokens"]
        if self.tokens_per_second:
            words.append(f"{self.tokens_per_second:.1f} tokens/s")
        if self._first:
            words.append(f"first token {self.time_to_first_token:.2f} s")
        if self.usage:
            words.append(f"context {self.usage.total_tokens}" + (f" of {max_context}" if max_context else ""))
        return ", ".join(words)

    def ending(self, max_context: int, remedy: str = "/reset begins anew") -> str | None:
        """What the user should know about how it ended, if anything; `remedy`: what to do about a full context."""
        if self.error:
            return str(self.error)
        if self.finish_reason != "length":
            return None
        if self.usage and max_context and self.usage.total_tokens >= max_context:
            return f"the context of {max_context} tokens is full, so the answer ends here: {remedy}"
        return f"the answer ends here, at max_tokens: {self.num_tokens}"
