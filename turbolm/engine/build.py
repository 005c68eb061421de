"""From a checkpoint and a resolved config to a scheduler and a runner that are ready to step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbolm.config import ResolvedConfig
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.engine import StepRunner
from turbolm.engine.graph import DecodeGraphs, record
from turbolm.engine.part import Part, lead, load_part
from turbolm.engine.rehearsal import rehearsals
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import PromptLookup
from turbolm.engine.step_device import StepDevice
from turbolm.memory import ModelNeeds
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.decoder import Decoder, cache_spec, kv_layers, load_decoder
from turbolm.models.loader import Loader, Progress
from turbolm.models.null import NULL_VOCABULARY, NullModel
from turbolm.models.sharding import shard_spec
from turbolm.models.spec import DecoderSpec, LayerSpec
from turbolm.ops import DeviceOps, LayerCache, sampling
from turbolm.ops.cpu import sampling as native_sampling
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.select import select_ops
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.shard import Shard
from turbolm.quant import FORMATS
from turbolm.quant.rounding import Rounding


@dataclass(frozen=True, slots=True)
class EngineParts:
    scheduler: Scheduler
    runner: StepRunner


def model_needs(name: str, checkpoint: Checkpoint, spec: DecoderSpec, tensor_parallel: int = 1) -> ModelNeeds:
    """What one rank's part of the model takes, from headers alone. Raises ConfigError where `tensor_parallel` doesn't
    divide it."""
    spec = shard_spec(spec, Shard(0, tensor_parallel))
    layer_parameters = sum(_matrix_elements(layer, spec.hidden_size) for layer in spec.layers)
    return ModelNeeds(
        name=name,
        max_context=spec.max_context,
        packed_bytes=checkpoint.total_weight_bytes // tensor_parallel,
        num_parameters=layer_parameters + spec.vocab_size * spec.hidden_size * (1 if spec.head is None else 2),
        layer_parameters=layer_parameters,
        packed=_packed_formats(checkpoint),
        has_column_order=checkpoint.packing is not None and checkpoint.packing.has_order,
        kv_layers=kv_layers(spec),
        # Where tokens are chosen from all ranks' logits, these are there twice, besides the rank's own.
        num_logits=spec.vocab_size * (1 if tensor_parallel == 1 else 1 + 2 * tensor_parallel),
        activation_elements=max(_activation_elements(layer, spec.hidden_size) for layer in spec.layers),
    )


def _matrix_elements(layer: LayerSpec, hidden_size: int) -> int:
    attention = layer.attention.qkv_width + layer.attention.num_heads * layer.attention.v_head_dim
    return hidden_size * (attention + 3 * layer.mlp.width)


def _packed_formats(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.packing is not None:
        return checkpoint.packing.formats
    stored = {info.dtype.lower() for info in checkpoint.source.tensors.values() if len(info.shape) == 2}
    return tuple(sorted(name for name in stored if name in FORMATS and not FORMATS[name].is_dense))


def _activation_elements(layer: LayerSpec, hidden_size: int) -> int:
    """Numbers per token that are alive at once while the layer is computed, at most."""
    attention = layer.attention.qkv_width + layer.attention.num_heads * layer.attention.v_head_dim
    return 4 * hidden_size + max(attention, 3 * layer.mlp.width)


def build(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    config: ResolvedConfig,
    vocab_size: int,
    progress: Progress | None = None,
) -> EngineParts:
    """Load the weights and allocate the KV cache. `vocab_size`: the tokenizer's."""
    if config.tensor_parallel > 1:
        load = functools.partial(build_part, checkpoint, spec, config, vocab_size, progress=progress)
        return EngineParts(_scheduler(config), lead(checkpoint.path, config, vocab_size, load))
    ops = select_ops(config.device, config.kernels, config.dtype, unpack=config.unpack, threads=config.threads)
    rounding = _rounding(config, spec)
    loader = Loader(checkpoint.source, ops, progress, packing=checkpoint.packing, rounding=rounding)
    model = load_decoder(spec, loader, config.max_context)
    caches = cache_spec(spec, config.kv).allocate(config.num_blocks, config.block_size, ops.device)
    return EngineParts(_scheduler(config), _runner(model, caches, config, vocab_size))


def build_part(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    config: ResolvedConfig,
    vocab_size: int,
    group: ProcessGroup,
    progress: Progress | None = None,
) -> Part:
    """This rank's part of the weights and of the KV cache."""
    return load_part(checkpoint, spec, config, vocab_size, group, _rounding(config, spec), progress)


def _rounding(config: ResolvedConfig, spec: DecoderSpec) -> Rounding | None:
    """On the CPU, whose kernels have a scale for 32 columns at any rate, groups are of this size, and the
    vocabulary's matrices, a large part of small models, are rounded too."""
    if config.weights == "auto":
        return None
    names = frozenset(name for name in (spec.embedding, spec.head) if name is not None)
    if config.device == "cpu":
        return Rounding(config.weights, "int8", names, group_size=32)
    return Rounding(config.weights, None, names)


def _runner(model: Decoder, caches: list[LayerCache], config: ResolvedConfig, vocab_size: int) -> StepRunner:
    ops = model.ops
    forward = record(model, caches, config)
    if isinstance(ops, DeviceOps):
        ops.finish_loading(config.max_logit_rows, model.spec.vocab_size)
        graphs = DecodeGraphs(forward, config, config.block_size, ops.device)
        sample = functools.partial(_sample, ops, vocab_size)
        device = StepDevice(forward, graphs, ops.device, sample, ops.resolve_tokens, rehearsals=rehearsals(config))
        return DeviceRunner(device, config, config.block_size, vocab_size)
    sample_rows = functools.partial(native_sampling.sample, ops.team) if isinstance(ops, CpuOps) else sampling.sample
    return Runner(forward, config.block_size, ops.device, vocab_size, sample_rows)


def _sample(ops: DeviceOps, vocab_size: int, logits_rv: Tensor, *columns: Any) -> Tensor:
    """Models pad their logits beyond the tokenizer's vocabulary."""
    return ops.sample(logits_rv[:, :vocab_size], *columns)


def null_needs() -> ModelNeeds:
    return ModelNeeds("null", 1 << 16, 0, 0, NullModel.cache_spec.layers, NULL_VOCABULARY)


def build_null(config: ResolvedConfig) -> EngineParts:
    """The null model behind a real scheduler and runner."""
    device = torch.device("cpu")
    model = NullModel()
    caches = model.cache_spec.allocate(config.num_blocks, config.block_size, device)
    runner = Runner(lambda batch: model.forward(batch, caches), config.block_size, device, NULL_VOCABULARY)
    return EngineParts(_scheduler(config), runner)


def _scheduler(config: ResolvedConfig) -> Scheduler:
    return Scheduler(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_logit_rows=config.max_logit_rows,
        max_context=config.max_context,
        max_waiting=config.max_waiting,
        prefix_cache=config.prefix_cache,
        drafter=PromptLookup if config.speculation else None,
    )
