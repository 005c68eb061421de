"""From a checkpoint and a resolved config to a scheduler and a runner that are ready to step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from turbolm.config import ModelNeeds, ResolvedConfig
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.engine import StepRunner
from turbolm.engine.graph import DecodeGraphs, record
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import PromptLookup
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader, Progress
from turbolm.models.null import NULL_VOCABULARY, NullModel
from turbolm.models.spec import DecoderSpec, LayerSpec
from turbolm.ops import DeviceOps, LayerCache, sampling
from turbolm.ops.cpu import sampling as native_sampling
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.select import select_ops


@dataclass(frozen=True, slots=True)
class EngineParts:
    scheduler: Scheduler
    runner: StepRunner


def model_needs(name: str, checkpoint: Checkpoint, spec: DecoderSpec) -> ModelNeeds:
    """What the model takes, from headers alone."""
    return ModelNeeds(
        name=name,
        max_context=spec.max_context,
        packed_bytes=checkpoint.total_weight_bytes,
        num_parameters=sum(math.prod(info.shape) for info in checkpoint.source.tensors.values()),
        kv_elements_per_token=sum(layer.elements_per_token for layer in cache_spec(spec, torch.float32).layers),
        num_logits=spec.vocab_size,
        activation_elements=max(_activation_elements(layer, spec.hidden_size) for layer in spec.layers),
    )


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
    ops = select_ops(config.device, config.kernels, config.dtype, unpack=config.unpack, threads=config.threads)
    model = load_decoder(spec, Loader(checkpoint.source, ops, progress), config.max_context)
    caches = cache_spec(spec, getattr(torch, config.kv_dtype)).allocate(
        config.num_blocks, config.block_size, ops.device
    )
    return EngineParts(_scheduler(config), _runner(model, caches, config, vocab_size))


def _runner(model: Decoder, caches: list[LayerCache], config: ResolvedConfig, vocab_size: int) -> StepRunner:
    ops = model.ops
    forward = record(model, caches, config)
    if isinstance(ops, DeviceOps):
        ops.finish_loading(config.max_logit_rows, model.spec.vocab_size)
        graphs = DecodeGraphs(forward, config, config.block_size, ops.device)
        return DeviceRunner(
            forward, graphs, config, config.block_size, ops.device, vocab_size, ops.sample, ops.resolve_tokens
        )
    sample_rows = functools.partial(native_sampling.sample, ops.team) if isinstance(ops, CpuOps) else sampling.sample
    return Runner(forward, config.block_size, ops.device, vocab_size, sample_rows)


def null_needs() -> ModelNeeds:
    return ModelNeeds("null", 1 << 16, 0, 0, NullModel.cache_spec.layers[0].elements_per_token, NULL_VOCABULARY)


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
