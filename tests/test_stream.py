"""An answer on its way out: the same however its tokens arrive."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.stream import AnswerStream
from turbolm.text import byte_tokenizer, parser_for
from turbolm.types import FinishReason, Output, Request, SamplingParams, TokenLogprob, ToolCallPart, Usage

TOKENIZER = byte_tokenizer()
TEMPLATE = "<think></think> <tool_call></tool_call>"
PIECES = ["<think>", "plan", "</think>", "\n", "héllo", " ", "STOP", "ST", "\x80é", "end",
          '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "<tool_call>{"]  # fmt: skip


def answer_of(
    token_ids: list[int], ends: list[int], params: SamplingParams, template: str, reason: FinishReason = "length"
) -> Output:
    """What comes of these tokens when outputs end after so many of them."""
    request = Request("r", (1, 2), params)
    stream = AnswerStream(request, TOKENIZER, lambda: parser_for(template, tools_given=True))
    bounds = [0, *(end for end in ends if end < len(token_ids)), len(token_ids)]
    deltas: list[Output] = []
    for start, end in itertools.pairwise(bounds):
        chunk = tuple(token_ids[start:end])
        output = Output("r", 0, chunk, logprobs=tuple(TokenLogprob(token, -1.0, 1) for token in chunk))
        if end == len(token_ids):
            output = output._replace(finish_reason=reason, usage=Usage(2, len(token_ids)))
        delta = stream.push(output)
        if stream.is_stopped and not stream.is_over:  # the caller cancels
            deltas += [delta] if delta else []
            delta = stream.push(Output("r", 0, (0,), finish_reason="cancelled", usage=Usage(2, end + 1)))
        deltas += [delta] if delta else []
        if stream.is_over:
            break
    assert [delta.is_final for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return Output.collect(deltas)


@given(
    st.lists(st.sampled_from(PIECES), max_size=8),
    st.lists(st.integers(1, 80), max_size=8).map(lambda ends: sorted(set(ends))),
    st.sampled_from([(), (), ("STOP",), ("STO", "end"), ("é",)]),
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from(["", TEMPLATE]),
)
def test_how_tokens_arrive_changes_nothing(
    pieces: list[str], ends: list[int], stop: tuple[str, ...], include_stop: bool, min_tokens: int, template: str
) -> None:
    text = "".join(pieces).encode()[:70]  # may end within a character
    token_ids = list(text) or [65]
    params = SamplingParams(stop=stop, include_stop=include_stop, min_tokens=min_tokens)
    singly = answer_of(token_ids, [*range(1, 100)], params, template)
    assert without_call_ids(answer_of(token_ids, ends, params, template)) == without_call_ids(singly)
    assert without_call_ids(answer_of(token_ids, [], params, template)) == without_call_ids(singly)


def without_call_ids(output: Output) -> Output:
    """Those of tool calls are drawn."""
    parts = [replace(part, id=None) if isinstance(part, ToolCallPart) else part for part in output.parts]
    return output._replace(parts=tuple(parts))


def test_a_stop_string_in_the_middle_of_an_output_ends_the_answer_there() -> None:
    output = answer_of(TOKENIZER.encode("one STOP two", add_special=False), [], SamplingParams(stop=("STOP",)), "")
    assert (output.text, output.stop, output.finish_reason) == ("one ", "STOP", "stop")
    assert len(output.token_ids) == len(output.logprobs) == len("one STOP")
    assert output.usage == Usage(2, len("one STOP"))


@pytest.mark.parametrize("reason", ["stop", "cancelled", "error"])
def test_the_end_shows_what_was_held_back(reason: FinishReason) -> None:
    token_ids = TOKENIZER.encode("to be ST", add_special=False)
    output = answer_of(token_ids, [2, 4, 6, 7], SamplingParams(stop=("STOP",)), "", reason)
    assert (output.text, output.finish_reason) == ("to be ST", reason)
