"""From a checkpoint and a resolved config to a scheduler and a runner that are ready to step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turbolm.config import ResolvedConfig
from turbolm.drafts import LOGIT_ROWS, MAX_DRAFTED
from turbolm.engine.adapters import AdapterRoom, Adapters
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.draft import DraftModel, PairedRunner
from turbolm.engine.engine import StepRunner
from turbolm.engine.graph import DecodeGraphs, plain_steps, record
from turbolm.engine.part import Part, allocate_caches, lead, load_part
from turbolm.engine.rehearsal import rehearsals
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import CPU_COSTS, GPU_COSTS, Costs, PromptLookup
from turbolm.engine.step_device import StepDevice
from turbolm.kv import KvFormat
from turbolm.kv_scales import find_scales
from turbolm.memory import ModelNeeds, num_counted
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.converted import ConvertedLoader
from turbolm.models.decoder import Decoder, kv_layers, load_decoder, vocabulary_names
from turbolm.models.loader import Loader, Progress
from turbolm.models.null import NULL_VOCABULARY, NullModel
from turbolm.models.peft import module_shapes
from turbolm.models.sharding import shard_spec
from turbolm.models.spec import DecoderSpec, LayerSpec
from turbolm.ops import DeviceOps, LayerCache, Ops, sampling
from turbolm.ops.cpu import sampling as native_sampling
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.select import select_ops
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.shard import Shard
from turbolm.quant import FORMATS
from turbolm.quant.rounding import Rounding


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model's files."""

    checkpoint: Checkpoint
    spec: DecoderSpec


@dataclass(frozen=True, slots=True)
class EngineParts:
    scheduler: Scheduler
    runner: StepRunner
    adapters: Adapters | None = None  # where there is room for some


def model_needs(name: str, checkpoint: Checkpoint, spec: DecoderSpec, tensor_parallel: int = 1) -> ModelNeeds:
    """What one rank's part of the model takes, from headers alone. Raises ConfigError where `tensor_parallel` doesn't
    divide it."""
    spec = shard_spec(spec, Shard(0, tensor_parallel))
    layer_parameters = sum(_matrix_elements(layer, spec.hidden_size) for layer in spec.layers)
    return ModelNeeds(
        name=name,
        max_context=spec.max_context,
        packed_bytes=checkpoint.total_weight_bytes // (tensor_parallel if checkpoint.manifest is None else 1),
        conversion=None if checkpoint.manifest is None else checkpoint.manifest.conversion,
        num_parameters=layer_parameters + spec.vocab_size * spec.hidden_size * (1 if spec.head is None else 2),
        layer_parameters=layer_parameters,
        packed=_packed_formats(checkpoint),
        has_column_order=checkpoint.packing is not None and checkpoint.packing.has_order,
        kv_layers=kv_layers(spec),
        kv_scales=find_scales(checkpoint.path),
        # Where tokens are chosen from all ranks' logits, these are there twice, besides the rank's own.
        num_logits=spec.vocab_size * (1 if tensor_parallel == 1 else 1 + 2 * tensor_parallel),
        adapter_elements=sum(n + k for n, k in module_shapes(spec).values()),
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
    draft: Draft | None = None,
) -> EngineParts:
    """Load the weights and allocate the KV cache. `vocab_size`: the tokenizer's."""
    runner: StepRunner
    room: AdapterRoom | None
    if config.tensor_parallel > 1:
        load = functools.partial(build_part, checkpoint, spec, config, vocab_size, progress=progress)
        runner, room = lead(checkpoint.path, config, vocab_size, load)
        ops = None
    else:
        model = _load(checkpoint, spec, config, _ops(config), progress)
        caches = allocate_caches(spec, config, model.ops.device, Shard())
        room = AdaptedDecoder(model, config.max_adapters, config.max_adapter_rank) if config.max_adapters else None
        runner, ops = _runner(model, caches, config, vocab_size), model.ops
    adapters = None if room is None else Adapters(room)
    if draft is None:
        return EngineParts(_scheduler(config), runner, adapters)
    try:
        draft_runner = _draft_runner(draft, config, ops, vocab_size)
    except BaseException:
        runner.close()  # there may be other ranks
        raise
    costs = _costs(config)._replace(draft=config.draft_cost)
    draft_model = DraftModel(draft_runner, config.max_batch_tokens, costs)
    return EngineParts(_scheduler(config, draft_model), PairedRunner(runner, draft_runner), adapters)


def _ops(config: ResolvedConfig) -> Ops:
    return select_ops(
        config.device, config.kernels, config.dtype,
        unpack=config.unpack, threads=config.threads, deterministic=config.deterministic,
    )  # fmt: skip


def _load(
    checkpoint: Checkpoint, spec: DecoderSpec, config: ResolvedConfig, ops: Ops, progress: Progress | None
) -> Decoder:
    rounding = _rounding(config, spec)
    loader = Loader(checkpoint.source, ops, progress, packing=checkpoint.packing, rounding=rounding)
    if checkpoint.manifest is not None:
        loader = ConvertedLoader(checkpoint.path, checkpoint.manifest, ops, progress=progress)
    return load_decoder(spec, loader, config.max_context)


def _draft_runner(draft: Draft, config: ResolvedConfig, ops: Ops | None, vocab_size: int) -> StepRunner:
    """Over a KV cache with as many blocks as the large model's. The CPU's threads serve both models. Where several
    ranks compute the large model, this one has all of the small one. `ops`: of the large model, unless it has ranks."""
    config = replace(
        config, kv=KvFormat.both(config.kv.plain), kv_scales="", weights="auto", max_adapters=0, tensor_parallel=1,
        max_batch_size=min(config.max_batch_size, MAX_DRAFTED), max_logit_rows=LOGIT_ROWS,
    )  # fmt: skip
    model = _load(draft.checkpoint, draft.spec, config, ops if isinstance(ops, CpuOps) else _ops(config), None)
    return _runner(model, allocate_caches(draft.spec, config, model.ops.device, Shard()), config, vocab_size)


def _costs(config: ResolvedConfig) -> Costs:
    return CPU_COSTS if config.device == "cpu" else GPU_COSTS


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
    if config.weights == "auto":
        return None
    return Rounding.at_load(config.weights, config.device, vocabulary_names(spec))


def _runner(model: Decoder, caches: list[LayerCache], config: ResolvedConfig, vocab_size: int) -> StepRunner:
    ops = model.ops
    has_adapters = config.max_adapters > 0
    steps = record(model, caches, config, has_adapters=has_adapters)
    if isinstance(ops, DeviceOps):
        ops.finish_loading(config.max_logit_rows, model.spec.vocab_size)
        graphs = DecodeGraphs(
            steps.forward, config, config.block_size, ops.device,
            has_adapters=has_adapters, max_shared_rows=min(config.max_logit_rows, config.max_batch_tokens),
        )  # fmt: skip
        sample = functools.partial(_sample, ops, vocab_size)
        device = StepDevice(
            steps.forward, graphs, ops.device, sample, ops.resolve_tokens,
            rehearsals=rehearsals(config), forward_hidden=steps.forward_hidden,
            adjust=ops.adjust, counts_shape=(num_counted(config.max_batch_size, vocab_size), vocab_size),
        )  # fmt: skip
        return DeviceRunner(device, config, config.block_size, vocab_size)
    sample_rows = functools.partial(native_sampling.sample, ops.team) if isinstance(ops, CpuOps) else sampling.sample
    return Runner(steps.forward, config.block_size, ops.device, vocab_size, sample_rows, steps.forward_hidden)


def _sample(ops: DeviceOps, vocab_size: int, logits_rv: Tensor, *columns: Any) -> Tensor:
    """Models pad their logits beyond the tokenizer's vocabulary."""
    return ops.sample(logits_rv[:, :vocab_size], *columns)


def null_needs() -> ModelNeeds:
    return ModelNeeds("null", 1 << 16, 0, 0, NullModel.cache_spec.layers, NULL_VOCABULARY)


def build_null(config: ResolvedConfig) -> EngineParts:
    """The null model behind a real scheduler and runner."""
    device = torch.device("cpu")
    torch.set_num_threads(1)  # waking a second thread for so little takes longer than it saves
    model = NullModel()
    caches = model.cache_spec.allocate(config.num_blocks, config.block_size, device)
    steps = plain_steps(model, caches)
    runner = Runner(
        steps.forward, config.block_size, device, NULL_VOCABULARY, forward_hidden=steps.forward_hidden
    )  # fmt: skip
    return EngineParts(_scheduler(config), runner)


def _scheduler(config: ResolvedConfig, draft_model: DraftModel | None = None) -> Scheduler:
    return Scheduler(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_batch_size=config.max_batch_size,
        max_batch_tokens=config.max_batch_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        max_logit_rows=config.max_logit_rows,
        max_context=config.max_context,
        max_waiting=config.max_waiting,
        prefix_cache=config.prefix_cache,
        drafter=functools.partial(PromptLookup, costs=_costs(config)) if config.speculation else None,
        draft_model=draft_model,
    )
