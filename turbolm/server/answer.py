"""What a request's answers have brought and the client has not been sent yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from turbolm.text import Tokenizer
from turbolm.types import Output, Part, ReasoningPart, TextPart, TokenLogprob, ToolCallPart


class Answer:
    """Deltas of one answer, merged as they come: however many pile up, only their text is kept."""

    __slots__ = ("final", "logprobs", "num_tokens", "parts", "prompt_logprobs")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.num_tokens = 0
        self.final: Output | None = None

    def add(self, output: Output) -> None:
        self.parts += output.parts
        self.num_tokens += len(output.token_ids)
        if output.logprobs:
            self.logprobs += output.logprobs
        if output.prompt_logprobs:
            self.prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None and output.error is None:
            self.final = output

    @property
    def text(self) -> str:
        return "".join([part.text for part in self.parts if type(part) is TextPart])

    @property
    def reasoning(self) -> str:
        return "".join([part.text for part in self.parts if type(part) is ReasoningPart])

    @property
    def calls(self) -> list[ToolCallPart]:
        """The tool calls, or further pieces of them."""
        calls: dict[int, list[ToolCallPart]] = {}
        for part in self.parts:
            if type(part) is ToolCallPart:
                calls.setdefault(part.index, []).append(part)
        return [replace(pieces[0], arguments="".join(p.arguments for p in pieces)) for pieces in calls.values()]


def finite(logprob: float) -> float:
    """JSON has no infinities: OpenAI's stand-in for the logarithm of nothing."""
    return logprob if math.isfinite(logprob) else -9999.0


def token_entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """A token as the chat API shows it."""
    spelled = tokenizer.token_bytes(token_id)
    return {"token": spelled.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(spelled)}


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The chat API's `logprobs` object."""
    content = [
        {
            **token_entry(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [token_entry(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], first: int, offset: int
) -> dict[str, Any]:
    """The completions API's `logprobs` object. `first`: the token of an entry that is None, the first of a prompt;
    `offset`: characters before."""
    tokens, offsets, tops = [], [], []
    for entry in entries:
        tokens.append(_spelled(tokenizer, first if entry is None else entry.token_id))
        offsets.append(offset)
        offset += len(tokens[-1])
        pairs = () if entry is None else (*entry.top, (entry.token_id, entry.logprob))
        tops.append({_spelled(tokenizer, token): finite(logprob) for token, logprob in pairs} or None)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else finite(entry.logprob) for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")
