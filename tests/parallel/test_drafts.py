"""Drafts over two processes: the answers are those of one process without drafts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from spread_model import Served, asked, assert_same_answers, built, children
from tiny import Tiny

from turbolm.errors import CheckpointError
from turbolm.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    Tiny("Llama", {"num_key_value_heads": 2, "vocab_size": 91}).save(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Served]:
    served = Served(built(folder, 1)[0])
    yield served
    served.engine.close()


def repetitive() -> list[Request]:
    """Prompts that say what comes next, and biases that make answers repeat themselves."""
    variants = {
        "greedy": GREEDY,
        "loops": SamplingParams.of(GREEDY, logit_bias={7: 40.0}),
        "penalties": SamplingParams.of(GREEDY, repetition_penalty=1.05, logit_bias={7: 9.0, 80: 9.0}),
        "sampled": SamplingParams(seed=9, temperature=0.4, max_tokens=40),
    }
    return asked(variants, (4, 20))


def test_drafts_by_prompt_lookup_change_no_answer(folder: Path, alone: Served) -> None:
    drafted = Served(built(folder, 2, speculation=True)[0])
    for request in repetitive():  # few at a time: drafts are for these
        assert_same_answers([request], [alone, drafted])
    assert_same_answers(repetitive(), [alone, drafted])
    stats = drafted.engine.stats
    drafted.engine.close()
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 20


def test_a_draft_model_runs_whole_on_the_leading_rank(
    folder: Path, alone: Served, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Once the model itself, whose guesses are right, once another one."""
    small = tmp_path_factory.mktemp("draft")
    Tiny("Llama", {"num_key_value_heads": 2, "vocab_size": 91}).save(small, seed=5)
    accepted = {}
    for draft in (folder, small):
        drafted = Served(built(folder, 2, draft=draft)[0])
        assert_same_answers(repetitive(), [alone, drafted])
        for request in repetitive()[:3]:
            assert_same_answers([request], [alone, drafted])
        stats = drafted.engine.stats
        drafted.engine.close()
        assert stats.num_draft_tokens > 0
        accepted[draft] = stats.num_accepted_tokens / stats.num_draft_tokens
    assert accepted[folder] > 0.9 > accepted[small]


def test_a_draft_model_that_cannot_be_loaded_ends_all_ranks(folder: Path, tmp_path: Path) -> None:
    Tiny("Llama", {"num_key_value_heads": 2, "vocab_size": 91}).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    before = {child.pid for child in children()}
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        built(folder, 2, draft=tmp_path)
    assert {child.pid for child in children()} == before
