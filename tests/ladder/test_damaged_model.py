"""A real model whose weights were rounded to 2 bits: the ladder must find it out."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from turbolm.config import EngineConfig
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import read_items
from turbolm.ladder.climb import Climber
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.cost import Cost
from turbolm.ladder.rungs import parse_rung
from turbolm.ladder.store import Store
from turbolm.ladder.subject import open_subject
from turbolm.llm import AsyncLLM
from turbolm.models.gguf import GGUFFile

_BLOCK = 20  # bytes of Q4_1: scale and minimum in float16, then 32 codes of 4 bits


@pytest.fixture(scope="module")
def damaged(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's codes rounded to four values."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    shutil.copyfile(smollm2_path, path)
    data = np.memmap(path, np.uint8, "r+")
    for tensor in GGUFFile(smollm2_path).tensors.values():
        if tensor.type.name.lower() == "q4_1":
            codes = data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(-1, _BLOCK)[:, 4:]
            codes[:] = (codes & 0b11001100) | 0b00100010  # 0–3 → 2, 4–7 → 6, 8–11 → 10, 12–15 → 14
    data.flush()
    return path


class _Silent:
    def begin(self, *args: object) -> None:
        pass

    def advance(self) -> None:
        pass

    def say(self, text: str) -> None:
        pass


async def _no_cost(llm: AsyncLLM, prompts: Sequence[Sequence[int]], streams: int, load_seconds: float) -> Cost:
    return Cost(llm.config.weight_bytes, llm.config.kv_bytes_per_token, 512, 1, load_seconds, 0.1, 10.0, 10.0)


def test_two_bit_weights_are_rejected(smollm2_path: Path, damaged: Path, tmp_path: Path) -> None:
    """By the perplexity of texts, and by what the distributions along the base's answers say."""
    items = [item for item in read_items("examples")[0] if item.group == "text" or item.id in ("number 1", "number 2")]
    store = Store(tmp_path / "answers.sqlite")
    climber = Climber(
        open_subject(str(smollm2_path)), items, [], LadderConfig(), ExamConfig(), EngineConfig(max_context=512), store,
        _Silent(), measure=_no_cost,
    )  # fmt: skip
    found = climber.run([parse_rung("base"), parse_rung(f"model={damaged}"), parse_rung(f"kv=int8+model={damaged}")])
    store.close()
    base, bad, skipped = found.steps
    assert bad.outcome.status == "rejected"
    assert bad.outcome.agreement.kl > 0.5
    assert "more than 1.00%" in bad.outcome.reason
    texts = [item.key for item in items if item.group == "text"]
    assert all(bad.answers[key].log_likelihoods < base.answers[key].log_likelihoods for key in texts)
    assert skipped.outcome.status == "skipped"
    assert found.recommended is base
