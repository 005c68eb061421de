"""The workloads are exactly those that other engines were measured on, and the limits are right."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import gpu_models
import gpu_workloads
import pytest
from gpu_workloads import GROUPS, Ask, Workload, best_peer, costs_of, peers, workloads

VOCABULARIES = {"w4": 32000, "w6": 151936}


def works(group: str) -> list[Workload]:
    return workloads(group, VOCABULARIES.get(group, 128256))


def checksum(asks: tuple[Ask, ...]) -> int:
    return zlib.crc32(json.dumps([[ask.prompt, ask.answer] for ask in asks]).encode())


# Of the request lists that the other engines' runs were given.
CHECKSUMS = {
    "w1": {
        "W1 batch 1": 3770188835,
        "W1 batch 8": 3044654399,
        "W1 batch 32": 1921683002,
        "W1 batch 64": 1827616919,
        "W1 batch 128": 2679639253,
        "W1 batch 256": 2075362449,
    },
    "w2": {
        "W2": 3127294003,
    },
    "w3": {
        "W3 prefill 8 x 8192": 1891781956,
        "W3 first token 8192": 446548005,
        "W3 first token 8": 2404782556,
    },
    "w4": {
        "W4 batch 1": 2293343314,
        "W4 batch 16": 2709403445,
        "W4 batch 64": 898274940,
        "W4 batch 256": 3818270624,
    },
    "w5": {
        "W5 64 x 4096": 1368811822,
    },
    "w6": {
        "W6": 1514970778,
        "W6 batch 1": 3824024886,
    },
}


@pytest.mark.parametrize("group", GROUPS)
def test_requests_are_the_other_engines_own(group: str) -> None:
    assert {work.name: checksum(work.asks) for work in works(group)} == CHECKSUMS[group]


def test_totals_are_the_published_ones() -> None:
    sharegpt, uniform = works("w2")[0], works("w6")[0]
    assert (sharegpt.num_prompt_tokens, sharegpt.num_answer_tokens) == (220178, 200809)
    assert (uniform.num_prompt_tokens, uniform.num_answer_tokens) == (142827, 133966)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the real shapes whose files end after their headers."""
    folders = {}
    for name in ("llama-3-8b", "llama-2-7b-awq", "qwen3-0.6b"):
        shape, folder = gpu_models.SHAPES[name], tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(shape.config))
        for number, plans in enumerate(gpu_models.shards(shape)):
            (folder / f"{number}.safetensors").write_bytes(gpu_models.header(plans)[0])
        folders[name] = folder
    return folders


# Worked out apart from this code, in ms per step or seconds, to the digits given.
FLOORS = {
    "W1 batch 1": 3.31, "W1 batch 8": 3.36, "W1 batch 32": 3.55, "W1 batch 64": 3.79, "W1 batch 128": 4.28,
    "W1 batch 256": 5.63, "W2": 11.45, "W3 prefill 8 x 8192": 1.532, "W3 first token 8192": 0.191,
    "W4 batch 1": 0.83, "W4 batch 16": 1.27, "W4 batch 64": 2.70, "W4 batch 256": 8.40, "W5 64 x 4096": 11.09,
    "W6": 3.51, "W6 batch 1": 0.27,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "groups"),
    [("llama-3-8b", ("w1", "w2", "w3", "w5")), ("llama-2-7b-awq", ("w4",)), ("qwen3-0.6b", ("w6",))],
)
def test_limits_are_those_worked_out_by_hand(headers: dict[str, Path], model: str, groups: tuple[str, ...]) -> None:
    costs = costs_of(headers[model])
    for work in (work for group in groups for work in works(group) if work.name in FLOORS):
        scale = 1e3 if work.kind in ("decode", "long decode") else 1
        assert costs.floor_seconds(work) * scale == pytest.approx(FLOORS[work.name], rel=0.006), work.name


def test_quantized_keys_and_values_lower_the_limit(headers: dict[str, Path]) -> None:
    work = works("w5")[0]
    limits = [costs_of(headers["llama-3-8b"], size).floor_seconds(work) * 1e3 for size in (1, 0.5)]
    assert limits == pytest.approx([7.20, 5.24], rel=0.01)


def test_best_peer_is_the_fastest_in_either_direction() -> None:
    assert best_peer("llama-3-8b", "W1 batch 64") == gpu_workloads.Peer("TurboMind", 11190.0)
    assert best_peer("llama-3-8b", "W3 first token 8192") == gpu_workloads.Peer("vLLM", 218.4)
    assert best_peer("llama-3-8b", "W9") is None
    assert best_peer("tiny", "W1 batch 64") is None


def test_every_figure_of_the_peers_belongs_to_a_row() -> None:
    names = {work.name for group in GROUPS for work in works(group)}
    names |= {f"W5 64 x 4096 {part}" for part in ("prefill", "decode")}
    for rows in peers()["models"].values():
        assert {name.partition(",")[0] for name in rows} <= names
        for row in rows.values():
            assert set(row["figures"]) <= set(peers()["engines"])


def test_unknown_workload_is_named() -> None:
    with pytest.raises(SystemExit, match="unknown workload 'w7'; known: w1, w2"):
        workloads("w7", 1000)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        costs_of(tmp_path)
