"""Validation of requests, and joining of outputs."""

from __future__ import annotations

import math

import pytest

from turbolm.errors import RequestError
from turbolm.types import Output, ReasoningPart, Request, SamplingParams, Score, TextPart, ToolCallPart, Usage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("temperature", True),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -1), ("top_k", -1), ("top_k", 1.5),
        ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0),
        ("n", 0), ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1), ("logprobs", 101), ("seed", 1 << 64),
        ("stop", ("",)), ("stop", (1,)), ("stop", ("x",) * 65), ("stop_token_ids", (-1,)), ("stop_token_ids", ("x",)),
        ("bad_words", ("",)), ("logit_bias", {"a": 1}), ("logit_bias", {1: 101}), ("logit_bias", {-1: 0}),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert caught.value.parameter == name


def test_one_stop_string_may_be_given_bare() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens 5 exceeds max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        Request("r", ())


def test_collect_joins_neighbouring_parts_and_keeps_the_end() -> None:
    deltas = [
        Output("r", parts=(ReasoningPart("a"),), token_ids=(1,)),
        Output("r", parts=(ReasoningPart("b"), TextPart("c")), token_ids=(2, 3)),
        Output("r", parts=(TextPart("d"), ToolCallPart(0, "{", "id", "f"))),
        Output("r", parts=(ToolCallPart(0, "}"), ToolCallPart(1, "{}", "id2", "g"))),
        Output("r", parts=(TextPart("e"),), finish_reason="stop", usage=Usage(4, 3)),
    ]
    whole = Output.collect(deltas)
    assert whole.parts == (
        ReasoningPart("ab"), TextPart("cd"), ToolCallPart(0, "{}", "id", "f"), ToolCallPart(1, "{}", "id2", "g"),
        TextPart("e"),
    )  # fmt: skip
    assert (whole.text, whole.reasoning, whole.token_ids) == ("cde", "ab", (1, 2, 3))
    assert whole.is_final
    assert whole.usage == Usage(4, 3)


def test_score_of_tokens() -> None:
    score = Score((1, 2, 3), (None, -1.0, -3.0))
    assert score.num_scored == 2
    assert score.log_likelihood == -4.0
    assert score.perplexity == pytest.approx(math.exp(2.0))
