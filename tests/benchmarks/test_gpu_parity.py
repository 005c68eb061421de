"""The parity check: silent where both sides agree, loud where one is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gpu_parity
import pytest
from gpu_parity import LIMITS, Answers, check, compare, first_differences, is_within

from turbolm import LLM


@pytest.fixture(scope="module")
def exact(tiny_model: Path) -> Iterator[LLM]:
    with LLM(
        str(tiny_model), device="cpu", dtype="float32", speculation="off", max_context=1024, progress=False
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts(exact: LLM) -> list[list[int]]:
    return gpu_parity.prompts_for(exact, 4)


@pytest.fixture(scope="module")
def answers(exact: LLM, prompts: list[list[int]]) -> Answers:
    return gpu_parity.answers_of(exact, prompts, 5, gpu_parity.TEXT[:1200])


def test_float32_kernels_agree_with_plain_pytorch(tiny_model: Path) -> None:
    options = argparse.Namespace(
        device="cpu", option=["kernels=reference"], prompts=4, tokens=4, text=1200, max_context=1024
    )
    found = check(str(tiny_model), "float32", options)
    assert found["ok"]
    assert found["likeliest_agree"] == 1.0
    assert found["perplexity"] == pytest.approx(found["perplexity_float32"], rel=1e-3)


def test_a_wrong_token_shows_as_a_gap_in_logits(exact: LLM, prompts: list[list[int]], answers: Answers) -> None:
    wrong = list(answers.tokens)
    wrong[2] = (*wrong[2][:3], (wrong[2][3] + 1000) % 16384, *wrong[2][4:])
    side = gpu_parity.scored(exact, prompts, answers.tokens)
    found = compare(exact, prompts, replace(answers, tokens=wrong), answers, side)
    assert [(entry["prompt"], entry["position"]) for entry in found["differences"]] == [(2, 3)]
    assert found["equal"] == 3
    assert found["largest_gap"] > LIMITS["bfloat16"].gap
    assert not is_within(found, LIMITS["bfloat16"])
    assert is_within(compare(exact, prompts, answers, answers, side), LIMITS["float32"])


def test_drifting_scores_and_nan_are_beyond_the_limits(exact: LLM, prompts: list[list[int]], answers: Answers) -> None:
    side = gpu_parity.scored(exact, prompts, answers.tokens)
    drifting = [(logprob + 0.2, rank) for logprob, rank in side]
    assert not is_within(compare(exact, prompts, answers, answers, drifting), LIMITS["bfloat16"])
    for value in (answers.perplexity * 1.02, float("nan")):
        found = compare(exact, prompts, replace(answers, perplexity=value), answers, side)
        assert not is_within(found, LIMITS["bfloat16"])


def test_first_differences() -> None:
    assert first_differences([(1, 2, 3), (4, 5, 6)], [(1, 2, 3), (4, 0, 0)]) == {1: 1}
