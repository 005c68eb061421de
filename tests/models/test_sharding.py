"""A model's parts add up to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from thread_group import ThreadGroup, on_all_ranks
from tiny import TINY_MODELS, Tiny, save_as_internlm2

from turbolm.engine.batch import StepArrays, lay_out
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.errors import CheckpointError, ConfigError
from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
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


def whole_logits(folder: Path) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    model = load_decoder(spec, Loader(checkpoint.source, ReferenceOps(CPU, torch.float32)), 64)
    return model.forward(step_arrays().batch(torch.from_numpy), cache_spec(spec, FLOAT32).allocate(4, 8, CPU))


def part_logits(folder: Path, group: ThreadGroup) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The logits that a rank gathers, its own part of them, and the tokens that it chooses greedily and at 0.7."""
    checkpoint = open_checkpoint(folder)
    spec, shard = decoder_spec(checkpoint.config), Shard(group.rank, group.size)
    ops = ShardedReferenceOps(CPU, torch.float32, group, spec.vocab_size)
    model = load_decoder(shard_spec(spec, shard), ShardLoader(checkpoint.source, ops, cuts(spec, shard)), 64)
    caches = cache_spec(model.spec, FLOAT32).allocate(4, 8, CPU)
    with torch.inference_mode():
        own = model.forward(step_arrays().batch(torch.from_numpy), caches)
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
