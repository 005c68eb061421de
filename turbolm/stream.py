"""One answer on its way out: the engine's tokens become text, cut at stop strings, sorted into
reasoning, text and tool calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from turbolm.text import Detokenizer, PartParser, StopStrings, Tokenizer
from turbolm.types import Output, Part, Request, ToolCallPart, Usage


class AnswerStream:
    """Turns the engine's outputs for one request (token ids) into outputs with parts.

    At a stop string `is_stopped` becomes true: the caller ends the request, further tokens are
    dropped, and the engine's final output, whatever its reason, becomes the answer's."""

    def __init__(
        self, request: Request, tokenizer: Tokenizer, parser: Callable[[], PartParser], *, is_continuation: bool = False
    ) -> None:
        """`is_continuation`: the answer goes on right where the prompt's text ends. What reads the answer is made when
        its first tokens are there: of requests that come by the thousand, most wait."""
        params = request.params
        self.request = request
        self.is_over = False
        self._tokenizer = tokenizer
        self._make_parser = parser
        self._is_continuation = is_continuation
        self._stops = StopStrings(params.stop, include_stop=params.include_stop) if params.stop else None
        self._num_tokens = 0
        self._has_tool_call = False

    @cached_property
    def _parser(self) -> PartParser:
        return self._make_parser()

    @cached_property
    def _detokenizer(self) -> Detokenizer:
        markers = [self._tokenizer.token_id(marker) for marker in self._parser.markers]
        return Detokenizer(
            self._tokenizer,
            skip_special=self.request.params.skip_special_tokens,
            keep_ids=[token for token in markers if token is not None],
            is_continuation=self._is_continuation,
        )

    @property
    def is_stopped(self) -> bool:
        return self._stops is not None and self._stops.matched is not None

    def push(self, output: Output) -> Output | None:
        """The same delta with its parts; None where there is nothing to tell."""
        request_id, index, token_ids, _, logprobs, prompt_logprobs, reason, *_ = output
        if reason is None and not self.request.params.stop:
            parts = self._parts(self._detokenizer.push(token_ids), is_last=False)
            return Output(request_id, index, token_ids, parts, logprobs, prompt_logprobs)
        if self.is_stopped:
            return None if reason is None else self._finish(output._replace(token_ids=(), logprobs=()))
        count, text = self._read(token_ids)
        if reason is not None and not self.is_stopped:
            text += self._detokenizer.finish() if self._stops is None else self._rest(self._stops)
        parts = self._parts(text, is_last=reason is not None or self.is_stopped)
        delta = output._replace(token_ids=token_ids[:count], logprobs=logprobs[:count], parts=parts)
        return delta if reason is None else self._finish(delta)

    def _rest(self, stops: StopStrings) -> str:
        """What was held back."""
        rest, _ = stops.push(self._detokenizer.finish())
        return rest if self.is_stopped else rest + stops.finish()

    def _parts(self, text: str, is_last: bool) -> tuple[Part, ...]:
        parts = self._parser.push(text)
        if is_last:
            parts += self._parser.finish()
        for part in parts:
            if type(part) is ToolCallPart:
                self._has_tool_call = True
        return parts

    def _read(self, token_ids: tuple[int, ...]) -> tuple[int, str]:
        """How many of these tokens are part of the answer, and the text that is certain after them."""
        params = self.request.params
        if self._stops is None:
            self._num_tokens += len(token_ids)
            return len(token_ids), self._detokenizer.push(token_ids)
        text = ""
        for count, token in enumerate(token_ids, 1):
            self._num_tokens += 1
            piece = self._detokenizer.push([token])
            text += piece if self._num_tokens <= params.min_tokens else self._stops.push(piece)[0]
            if self.is_stopped:
                return count, text
        return len(token_ids), text

    def _finish(self, output: Output) -> Output:
        self.is_over = True
        reason, usage = output.finish_reason, output.usage
        if self._stops is not None and self.is_stopped:
            usage = replace(usage or Usage(len(self.request.prompt_token_ids), 0), completion_tokens=self._num_tokens)
            output, reason = output._replace(stop=self._stops.matched, usage=usage, error=None), "stop"
        if reason == "stop" and self._has_tool_call:
            reason = "tool_calls"
        return output if reason == output.finish_reason else output._replace(finish_reason=reason)
