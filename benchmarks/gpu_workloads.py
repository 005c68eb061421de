"""The GPU workloads: what is asked of the engine, and the least time that the hardware needs for it.

Prompts are random token ids from fixed seeds; answers run on past end-of-text, so that every engine computes
the same numbers of tokens. The other engines' figures for the same inputs are in data/gpu_peers.json.

The least time ("floor") of a step is max(bytes / READ_BYTES, operations / OPERATIONS): bytes are the weights
without the embedding table, and the keys and values in context; operations are two per weight and token, and
attention's. Both rates are what the best of simple kernels reaches on an H200, not the data sheet's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

DATA = Path(__file__).parent / "data"
READ_BYTES = 4.55e12  # bytes per second: a kernel that only reads 8.6 GB, on one H200
OPERATIONS = 689e12  # per second: a bf16 matrix product 8192 x 4096 x 28672, on one H200


class Ask(NamedTuple):
    """One request: continue the prompt by exactly so many tokens."""

    prompt: list[int]
    answer: int


Kind = Literal["decode", "run", "prefill", "first token", "long decode"]


@dataclass(frozen=True)
class Workload:
    """One row of the results."""

    name: str
    kind: Kind
    asks: tuple[Ask, ...]
    rounds: int
    temperature: float = 1.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(ask.prompt) for ask in self.asks)

    @property
    def num_answer_tokens(self) -> int:
        return sum(ask.answer for ask in self.asks)

    def shortened(self, answer: int) -> tuple[Ask, ...]:
        """The same prompts with answers of so many tokens."""
        return tuple(Ask(ask.prompt, answer) for ask in self.asks)


GROUPS = ("w1", "w2", "w3", "w4", "w5", "w6")


def workloads(group: str, vocab_size: int) -> list[Workload]:
    """The rows of one group.

    w1: decode after prompts of 1 to 16 tokens, at 1 to 256 streams. w2: 1000 requests of ShareGPT's lengths at
    once. w3: prefill of 8 x 8192 tokens; first token after 8192 and 8. w4: decode after one token (made for 4-bit
    weights). w5: 64 prompts of 4096 tokens, 257 tokens each. w6: 256 requests of 100 to 1024 tokens in and out, and
    one stream (made for small models).
    """
    if group == "w1":
        return [_decode(f"W1 batch {n}", _short_prompts(n, vocab_size)) for n in (1, 8, 32, 64, 128, 256)]
    if group == "w2":
        return [Workload("W2", "run", _sharegpt(vocab_size), 2)]
    if group == "w3":
        return [
            Workload("W3 prefill 8 x 8192", "prefill", _equal(8, 8192, 1, vocab_size, seed=31), 2),
            Workload("W3 first token 8192", "first token", _equal(1, 8192, 1, vocab_size, seed=32), 3),
            Workload("W3 first token 8", "first token", _equal(1, 8, 1, vocab_size, seed=33), 3),
        ]
    if group == "w4":
        return [_decode(f"W4 batch {n}", _equal(n, 1, 512, vocab_size, seed=40 + n)) for n in (1, 16, 64, 256)]
    if group == "w5":
        return [Workload("W5 64 x 4096", "long decode", _equal(64, 4096, 257, vocab_size, seed=50), 1)]
    if group == "w6":
        return [
            Workload("W6", "run", _uniform_lengths(), 2, temperature=0.6),
            _decode("W6 batch 1", _short_prompts(1, vocab_size), temperature=0.6),
        ]
    raise SystemExit(f"unknown workload '{group}'; known: {', '.join(GROUPS)}")


def _decode(name: str, asks: tuple[Ask, ...], temperature: float = 1.0) -> Workload:
    return Workload(name, "decode", asks, 2, temperature)


def _draw(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    """Ids that are nobody's control tokens: those lie at the ends of vocabularies."""
    ids: list[int] = rng.integers(10, vocab_size - 300, size=count).tolist()
    return ids


def _short_prompts(streams: int, vocab_size: int) -> tuple[Ask, ...]:
    rng = np.random.default_rng(1000 + streams)
    return tuple(Ask(_draw(rng, 1 + i % 16, vocab_size), 512) for i in range(streams))


def _equal(streams: int, prompt: int, answer: int, vocab_size: int, *, seed: int) -> tuple[Ask, ...]:
    rng = np.random.default_rng(seed)
    return tuple(Ask(_draw(rng, prompt, vocab_size), answer) for _ in range(streams))


def warm_prefill(vocab_size: int) -> tuple[Ask, ...]:
    """What goes before the prefill workloads."""
    return _equal(2, 8192, 1, vocab_size, seed=30)


def _sharegpt(vocab_size: int) -> tuple[Ask, ...]:
    """1000 requests with the lengths (prompt, answer) of ShareGPT conversations, in this order."""
    rng = np.random.default_rng(2)
    lengths = json.loads((DATA / "sharegpt_lengths.json").read_text())
    return tuple(Ask(_draw(rng, prompt, vocab_size), answer) for prompt, answer in lengths)


def _uniform_lengths() -> tuple[Ask, ...]:
    """nano-vllm's benchmark, in its order of draws: all prompts, then all lengths of answers."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return tuple(Ask(prompt, rng.randint(100, 1024)) for prompt in prompts)


@dataclass(frozen=True)
class Costs:
    """What a model's steps take at least."""

    weight_bytes: int  # without the embedding table, unless it is the head too
    layer_parameters: int  # in matrices of all layers
    head_parameters: int
    kv_bytes: float  # per token in context
    attention_operations: int  # per pair of a token and a token that it attends to

    def decode_seconds(self, contexts: Sequence[float]) -> float:
        """One step of one token for each sequence."""
        total = sum(contexts)
        num_bytes = self.weight_bytes + self.kv_bytes * total
        parameters = self.layer_parameters + self.head_parameters
        return _seconds(num_bytes, 2 * parameters * len(contexts) + self.attention_operations * total)

    def prefill_seconds(self, lengths: Sequence[int]) -> float:
        """The first token of each prompt."""
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        operations = 2 * (self.layer_parameters * sum(lengths) + self.head_parameters * len(lengths))
        return _seconds(self.weight_bytes, operations + self.attention_operations * pairs)

    def run_seconds(self, asks: Sequence[Ask]) -> float:
        """All prompts, then all answers together, each until it ends."""
        lengths = np.array([len(ask.prompt) for ask in asks])
        answers = np.array([ask.answer for ask in asks])
        seconds = self.prefill_seconds(lengths.tolist())
        for done in range(1, int(answers.max())):
            seconds += self.decode_seconds((lengths[answers > done] + done).tolist())
        return seconds

    def floor_seconds(self, work: Workload) -> float:
        """Of a decode workload's average step; of everything in the others."""
        if work.kind in ("decode", "long decode"):
            return self.decode_seconds([len(ask.prompt) + ask.answer / 2 for ask in work.asks])
        if work.kind == "run":
            return self.run_seconds(work.asks)
        return self.prefill_seconds([len(ask.prompt) for ask in work.asks])


def _seconds(num_bytes: float, operations: float) -> float:
    return max(num_bytes / READ_BYTES, operations / OPERATIONS)


def costs_of(folder: Path, kv_item_bytes: float = 2) -> Costs:
    """From a folder's config.json and the headers of its safetensors files."""
    config = read_config(folder)
    hidden, layers, width = (config[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size"))
    heads = config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads", heads), config.get("head_dim") or hidden // heads
    attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
    return Costs(
        weight_bytes=_weight_bytes(folder, is_tied=config.get("tie_word_embeddings", False)),
        layer_parameters=layers * (attention + 3 * hidden * width),
        head_parameters=config["vocab_size"] * hidden,
        kv_bytes=2 * layers * kv_heads * head_dim * kv_item_bytes,
        attention_operations=4 * layers * heads * head_dim,
    )


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SystemExit(f"{folder} has no config.json; make a model with gpu_models.py, or give such a folder")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _weight_bytes(folder: Path, *, is_tied: bool) -> int:
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            is_table = "embed" in name or "embeddings" in name
            if name != "__metadata__" and (is_tied or not is_table):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


@dataclass(frozen=True)
class Peer:
    """Another engine's figure in one row."""

    engine: str
    figure: float


def best_peer(model: str, row: str) -> Peer | None:
    """The best figure of `row`, greedy or sampled, whichever engine is better; None: not measured."""
    entry = peers()["models"].get(model, {}).get(row)
    if entry is None:
        return None
    choose = min if is_less_better(entry["unit"]) else max
    engine, figure = choose(entry["figures"].items(), key=lambda item: item[1])
    return Peer(engine, figure)


def is_less_better(unit: str) -> bool:
    return unit in ("s", "ms", "ms/step")


def peers() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DATA / "gpu_peers.json").read_text())
    return data
