"""A model's parts add up to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import PROJECTIONS, save_random_adapter
from safetensors.torch import load_file, save_file
from thread_group import ThreadGroup, on_all_ranks
from tiny import TINY_MODELS, Tiny, save_as_internlm2

from turbolm.engine.batch import StepArrays, lay_out
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.errors import CheckpointError, ConfigError
from turbolm.kv import KvFormat
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.peft import Adapter, read_adapter
from turbolm.models.registry import decoder_spec
from turbolm.models.sharding import ShardLoader, cuts, shard_spec
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.sharded import ShardedReferenceOps
from turbolm.parallel.shard import Shard
from turbolm.types import Request, Sequence

CPU = torch.device("cpu")
FLOAT32 = KvFormat.both("float32")
MODELS = {
    "llama": TINY_MODELS["llama"],
    "tied": TINY_MODELS["llama-tied"],
    "biases": TINY_MODELS["llama-biases"],
    "one kv head": Tiny("Llama", {"num_key_value_heads": 1}),
    "odd vocabulary": Tiny("Llama", {"vocab_size": 83, "tie_word_embeddings": True}),
    "qwen3": TINY_MODELS["qwen3"],
}


def step_arrays() -> StepArrays:
    """Two prompts."""
    items = []
    for number, tokens in enumerate(((5, 80, 41, 7, 60), (82, 3, 9))):
        sequence = Sequence(Request(str(number), tokens))
        sequence.blocks = [2 * number, 2 * number + 1]
        items.append(ScheduledSequence(sequence, 0, len(tokens), True))
    return lay_out(Step(tuple(items), 8), 8, [[4], [2]])


def whole_logits(folder: Path, adapters: list[Adapter] | None = None) -> torch.Tensor:
    """`adapters`: one for each prompt."""
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    model = load_decoder(spec, Loader(checkpoint.source, ReferenceOps(CPU, torch.float32)), 64)
    arrays = with_adapters(step_arrays(), AdaptedDecoder(model, 2, 8) if adapters else None, adapters)
    return model.forward(arrays.batch(torch.from_numpy), cache_spec(spec, FLOAT32).allocate(4, 8, CPU))


def with_adapters(arrays: StepArrays, adapted: AdaptedDecoder | None, adapters: list[Adapter] | None) -> StepArrays:
    """The second prompt has the adapter in the first place."""
    if adapted is None or adapters is None:
        return arrays
    for place, adapter in enumerate(adapters):
        adapted.put(place, adapter)
    return arrays._replace(adapters=np.repeat(np.array([1, 0], np.int32), [5, 3]))


def part_logits(
    folder: Path, group: ThreadGroup, adapters: list[Adapter] | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The logits that a rank gathers, its own part of them, and the tokens that it chooses greedily and at 0.7."""
    checkpoint = open_checkpoint(folder)
    spec, shard = decoder_spec(checkpoint.config), Shard(group.rank, group.size)
    ops = ShardedReferenceOps(CPU, torch.float32, group, spec.vocab_size)
    model = load_decoder(shard_spec(spec, shard), ShardLoader(checkpoint.source, ops, cuts(spec, shard)), 64)
    caches = cache_spec(model.spec, FLOAT32).allocate(4, 8, CPU)
    adapted = AdaptedDecoder(model, 2, 8, spec, cuts(spec, shard)) if adapters else None
    arrays = with_adapters(step_arrays(), adapted, adapters)
    with torch.inference_mode():
        own = model.forward(arrays.batch(torch.from_numpy), caches)
        columns = (torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.zeros(2))
        tokens = ops.sample(own, *columns, torch.tensor([0.0, 0.7], dtype=torch.float64), has_filters=False)
        return ops.gather_logits(own)[:, : spec.vocab_size], own, tokens.tolist()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*MODELS, "internlm2"])
def test_parts_add_up(tmp_path: Path, name: str, size: int) -> None:
    if name == "internlm2":
        save_as_internlm2(tmp_path, {"bias": True} if size == 2 else {})
    else:
        MODELS[name].save(tmp_path)
    expected = whole_logits(tmp_path)
    found = on_all_ranks(size, lambda group: part_logits(tmp_path, group))
    for logits, own, tokens in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert own.shape[1] < expected.shape[1]
        assert tokens == found[0][2]
        assert tokens[0] == int(expected[0].argmax())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["biases", "one kv head", "internlm2"])
def test_parts_of_an_adapter_add_up(tmp_path: Path, name: str, size: int) -> None:
    """Of two in one step, one sequence has each."""
    targets = PROJECTIONS
    if name == "internlm2":
        save_as_internlm2(tmp_path, {})
        targets = ["wqkv", "wo", "w1", "w2", "w3"]
    else:
        MODELS[name].save(tmp_path)
    spec = decoder_spec(open_checkpoint(tmp_path).config)
    folders = [save_random_adapter(tmp_path, tmp_path / str(i), i, targets=targets, scale=0.2) for i in range(2)]
    adapters = [read_adapter(folder, spec) for folder in folders]
    plain, expected = whole_logits(tmp_path), whole_logits(tmp_path, adapters)
    assert ((expected - plain).abs().amax(1) > 0.01).all()
    for logits, own, _ in on_all_ranks(size, lambda group: part_logits(tmp_path, group, adapters)):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert own.shape[1] < expected.shape[1]


def test_what_ranks_hold_together_is_the_model_once(tmp_path: Path) -> None:
    TINY_MODELS["llama"].save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = decoder_spec(checkpoint.config)

    def matrices(group: ThreadGroup) -> int:
        shard = Shard(group.rank, group.size)
        ops = ShardedReferenceOps(CPU, torch.float32, group, spec.vocab_size)
        model = load_decoder(shard_spec(spec, shard), ShardLoader(checkpoint.source, ops, cuts(spec, shard)), 64)
        layer = model.layers[0]
        used = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
        return model.embedding.num_bytes + sum(linear.weight.num_bytes for linear in used)

    infos = checkpoint.source.tensors.items()
    first = [info for name, info in infos if "layers.0." in name and len(info.shape) == 2]
    embedding = checkpoint.source.tensors["model.embed_tokens.weight"]
    assert sum(on_all_ranks(2, matrices)) == embedding.num_bytes + sum(info.num_bytes for info in first)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    TINY_MODELS["llama"].save(tmp_path)  # 4 heads, 2 kv heads, width 96
    spec = decoder_spec(open_checkpoint(tmp_path).config)
    with pytest.raises(
        ConfigError, match=r"3, which doesn't divide the model's 4 attention heads; choose one of 1, 2, 4"
    ):
        shard_spec(spec, Shard(0, 3))
    layers = tuple(replace(layer, mlp=replace(layer.mlp, width=98)) for layer in spec.layers)
    with pytest.raises(ConfigError, match=r"98 columns of the feed-forward; choose one of 1, 2$"):
        shard_spec(replace(spec, layers=layers), Shard(0, 4))


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path: Path) -> None:
    TINY_MODELS["llama"].save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:90].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head: 90 output rows in the checkpoint"):
        on_all_ranks(2, lambda group: part_logits(tmp_path, group))


@pytest.mark.parametrize("vocab_size", [83, 96, 32000, 128256, 151936])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_vocabulary_parts_cover_it_in_order(vocab_size: int, size: int) -> None:
    parts = [Shard(rank, size).vocabulary(vocab_size) for rank in range(size)]
    assert [token for part in parts for token in part] == list(range(vocab_size))
    width = Shard(0, size).vocabulary_size(vocab_size)
    assert all(part.start == min(rank * width, vocab_size) for rank, part in enumerate(parts))
    assert width * size < vocab_size + size * (1024 if width >= 8192 else 8)
