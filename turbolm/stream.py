"""One answer on its way out: the engine's tokens become text, cut at stop strings, sorted into
reasoning, text and tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from turbolm.text import Detokenizer, PartParser, StopStrings, Tokenizer
from turbolm.types import FinishReason, Output, Part, Request, ToolCallPart, Usage


class AnswerStream:
    """Turns the engine's outputs for one request (token ids) into outputs with parts. After an output
    with a `finish_reason` the answer is over: later engine outputs are dropped."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, parser: PartParser, *, is_continuation: bool = False
    ) -> None:
        """`is_continuation`: the answer goes on right where the prompt's text ends."""
        params = request.params
        markers = (tokenizer.token_id(marker) for marker in parser.markers)
        self.request = request
        self.is_over = False
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special=params.skip_special_tokens,
            keep_ids=[token for token in markers if token is not None],
            is_continuation=is_continuation,
        )
        self._stops = StopStrings(params.stop, include_stop=params.include_stop)
        self._parser = parser
        self._num_tokens = 0
        self._has_tool_call = False

    def push(self, output: Output) -> Output | None:
        """The same delta with its parts; None where the answer was over already."""
        if self.is_over:
            return None
        stop_from = self.request.params.min_tokens
        parts: list[Part] = []
        for position, token in enumerate(output.token_ids):
            self._num_tokens += 1
            text = self._detokenizer.push([token])
            if self._num_tokens <= stop_from:
                parts += self._parser.push(text)
                continue
            text, matched = self._stops.push(text)
            parts += self._parser.push(text)
            if matched is not None:
                return self._end_at_stop(output, position + 1, matched, parts)
        if output.is_final:
            text, matched = self._stops.push(self._detokenizer.finish())
            parts += self._parser.push(text if matched else text + self._stops.finish())
            parts += self._parser.finish()
            reason = "stop" if matched else output.finish_reason
            return self._final(output._replace(stop=matched or output.stop), parts, reason)
        self._note(parts)
        return output._replace(parts=tuple(parts))

    def _end_at_stop(self, output: Output, count: int, matched: str, parts: list[Part]) -> Output:
        parts += self._parser.finish()
        cut = output._replace(
            token_ids=output.token_ids[:count],
            logprobs=output.logprobs[:count],
            stop=matched,
            usage=Usage(len(self.request.prompt_token_ids), self._num_tokens),
            error=None,
        )
        return self._final(cut, parts, "stop")

    def _final(self, output: Output, parts: list[Part], reason: FinishReason | None) -> Output:
        self.is_over = True
        self._note(parts)
        if reason == "stop" and self._has_tool_call:
            reason = "tool_calls"
        return output._replace(parts=tuple(parts), finish_reason=reason)

    def _note(self, parts: Sequence[Part]) -> None:
        self._has_tool_call |= any(isinstance(part, ToolCallPart) for part in parts)
