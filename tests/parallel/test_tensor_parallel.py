"""A model spread over two processes on the CPU: the answers of one process, and a clear end where one is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from spread_model import Served, asked, built, children
from tiny import Tiny

from turbolm.errors import EngineError
from turbolm.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    Tiny("Llama", {"num_key_value_heads": 1, "vocab_size": 91}).save(folder)
    return folder


@pytest.fixture(scope="module")
def spread(folder: Path) -> Iterator[Served]:
    parts, config = built(folder, 2)
    assert any(reason.startswith("tensor_parallel 2") for reason in config.reasons)
    served = Served(parts)
    yield served
    served.engine.close()


VARIANTS = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(seed=5),
    "filtered": SamplingParams(seed=6, temperature=1.5, top_p=0.8, top_k=20),
    "penalties": SamplingParams(temperature=0, repetition_penalty=1.4),
    "logprobs": SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1),
}


def requests() -> list[Request]:
    """Some short, some prefilled in several chunks."""
    variants = {name: SamplingParams.of(params, max_tokens=9) for name, params in VARIANTS.items()}
    return asked(variants, (1, 11, 45))


def test_two_processes_answer_as_one(spread: Served, folder: Path) -> None:
    alone = Served(built(folder, 1)[0])
    expected, found = alone.answers(requests()), spread.answers(requests())
    alone.engine.close()
    assert found.keys() == expected.keys()
    for name, output in found.items():
        assert output.token_ids == expected[name].token_ids, name
        for mine, theirs in zip(output.logprobs, expected[name].logprobs, strict=True):
            assert mine.token_id == theirs.token_id and mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert len(output.prompt_logprobs) == len(expected[name].prompt_logprobs)


def test_a_killed_rank_ends_everything_by_name(spread: Served) -> None:
    (child,) = children()
    os.kill(child.pid, signal.SIGKILL)
    start = time.monotonic()
    message = rf"rank 1 \(process {child.pid}\) was ended by SIGKILL; .* load it again"
    for output in spread.answers(requests()).values():
        assert isinstance(output.error, EngineError) and re.match(message, str(output.error))
    assert time.monotonic() - start < 5
    spread.engine.close()
    assert not children()


def test_what_a_rank_cannot_load_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:90].clone()  # rank 0 needs the first 48
    save_file(tensors, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(EngineError, match=r"^rank 1: lm_head: 90 output rows in the checkpoint"):
        built(tmp_path / "cut", 2)
    assert not children()
