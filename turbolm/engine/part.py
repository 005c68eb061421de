"""One rank's part of a model, from the checkpoint to a device that computes steps; and the process that leads all."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from turbolm.config import ResolvedConfig
from turbolm.engine.batch import StepArrays
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.graph import DecodeGraphs, record
from turbolm.engine.rank_adapters import SpreadAdapters
from turbolm.engine.ranks import FAILED, LOAD, LoadOrder, Ranks
from turbolm.engine.rehearsal import rehearsals
from turbolm.engine.step_device import StepDevice
from turbolm.errors import EngineError
from turbolm.kv_scales import read_scales
from turbolm.memory import num_counted
from turbolm.models.adapters import AdaptedDecoder
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.converted import ConvertedLoader
from turbolm.models.decoder import Decoder, cache_spec, kv_layers, load_decoder
from turbolm.models.loader import Loader, Progress
from turbolm.models.sharding import ShardLoader, cuts, shard_spec
from turbolm.models.spec import DecoderSpec
from turbolm.ops import LayerCache
from turbolm.ops.select import select_sharded_ops
from turbolm.ops.sharded import ShardedOps
from turbolm.parallel.collectives import ProcessGroup
from turbolm.parallel.processes import RankProcesses
from turbolm.parallel.shard import Shard
from turbolm.quant.rounding import Rounding

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """Loaded weights and an empty KV cache."""

    model: Decoder
    ops: ShardedOps
    caches: list[LayerCache]
    config: ResolvedConfig
    adapted: AdaptedDecoder | None = None  # where there is room for adapters

    def step_device(self) -> StepDevice:
        """Waits for the other ranks, which must do the same."""
        ops, config, width = self.ops, self.config, self.model.spec.vocab_size
        ops.finish_loading(config.max_logit_rows, width)
        has_adapters = self.adapted is not None
        steps = record(self.model, self.caches, config, has_adapters=has_adapters)
        graphs: DecodeGraphs | None = None
        first_steps: Iterator[StepArrays] = iter(())
        if ops.device.type == "cuda" and config.kernels == "native":
            graphs = DecodeGraphs(
                steps.forward, config, config.block_size, ops.device,
                has_adapters=has_adapters, max_shared_rows=min(config.max_logit_rows, config.max_batch_tokens),
            )  # fmt: skip
            first_steps = rehearsals(config)
        return StepDevice(
            steps.forward, graphs, ops.device, ops.sample, ops.resolve_tokens, ops.gather_logits, first_steps,
            steps.forward_hidden, ops.adjust, (num_counted(config.max_batch_size, width), width),
        )  # fmt: skip


def device_of(config: ResolvedConfig, rank: int) -> torch.device:
    """Rank r's GPU is the r-th."""
    return torch.device(config.device, rank) if config.device == "cuda" else torch.device(config.device)


def allocate_caches(spec: DecoderSpec, config: ResolvedConfig, device: torch.device, shard: Shard) -> list[LayerCache]:
    """The KV pool of a rank. `spec`: the whole model's. Raises CheckpointError for static scales that don't fit it."""
    kept = cache_spec(shard_spec(spec, shard), config.kv)
    if config.kv_scales:
        _log.info("the KV cache has static scales: %s", config.kv_scales)
        shapes = kv_layers(spec)
        whole = read_scales(Path(config.kv_scales), shapes)
        parts = (layer.part(*shard.copy_of(shape.num_heads)) for layer, shape in zip(whole, shapes, strict=True))
        kept = replace(kept, ranges=tuple(parts))
    return kept.allocate(config.num_blocks, config.block_size, device)


def load_part(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    config: ResolvedConfig,
    vocab_size: int,
    group: ProcessGroup,
    rounding: Rounding | None,
    progress: Progress | None = None,
) -> Part:
    """`spec`: the whole model's. `vocab_size`: tokens that may be chosen. Doesn't wait for other ranks."""
    shard = Shard(group.rank, group.size)
    device = device_of(config, group.rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, config.threads // group.size))
    ops = select_sharded_ops(
        device, config.kernels, config.dtype, group, vocab_size, spec.hidden_size, deterministic=config.deterministic
    )
    own_cuts = cuts(spec, shard)
    loader: Loader = ShardLoader(
        checkpoint.source, ops, own_cuts, progress, packing=checkpoint.packing, rounding=rounding
    )
    if checkpoint.manifest is not None:
        loader = ConvertedLoader(checkpoint.path, checkpoint.manifest, ops, group.rank, progress)
    model = load_decoder(shard_spec(spec, shard), loader, config.max_context)
    caches = allocate_caches(spec, config, device, shard)
    places, rank = config.max_adapters, config.max_adapter_rank
    adapted = AdaptedDecoder(model, places, rank, spec, own_cuts) if places else None
    return Part(model, ops, caches, config, adapted)


def lead(
    path: Path, config: ResolvedConfig, vocab_size: int, load: Callable[[ProcessGroup], Part]
) -> tuple[DeviceRunner, SpreadAdapters | None]:
    """Start the other ranks, load this process's part by `load` while they load theirs, and lead them: what runs steps,
    and room for adapters if there is some. `path`: the checkpoint. Raises EngineError naming a rank that fails."""
    size = config.tensor_parallel
    folder = tempfile.TemporaryDirectory(prefix="turbolm-")  # private to this user
    store = Path(folder.name) / "store"
    processes = RankProcesses("turbolm.engine.rank", size)
    group = None
    try:
        processes.send(LOAD, [LoadOrder(path, config, vocab_size, store).encode()])
        _await(processes)
        with processes.watching():
            group = ProcessGroup(Shard(0, size), device_of(config, 0), store)
        part = load(group)
        _await(processes)
        with processes.watching():
            device = part.step_device()
    except BaseException:
        processes.close()
        if group is not None:
            group.abort()
        folder.cleanup()
        raise
    ranks = Ranks(processes, group, folder)
    adapters = None if part.adapted is None else SpreadAdapters(part.adapted, ranks)
    return DeviceRunner(device, config, config.block_size, vocab_size, ranks), adapters


def _await(processes: RankProcesses) -> None:
    """The next message of all ranks."""
    for rank, message in enumerate(processes.receive(), 1):
        if message.kind == FAILED:
            raise EngineError(f"rank {rank}: {bytes(message.body).decode()}")
