"""`convert`: a model with its matrices in the layout of a backend's kernels, divided over ranks, so that loading
reads them as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from turbolm.compress.export import Exporter
from turbolm.compress.partial import write_tensors
from turbolm.compress.samples import tokenizer_of
from turbolm.config import EngineConfig, choose_backend, format_size
from turbolm.errors import CapacityError, ConfigError
from turbolm.hub import fetch
from turbolm.kv_scales import NAME as KV_SCALES
from turbolm.kv_scales import find_scales
from turbolm.memory import Conversion
from turbolm.models.checkpoint import Checkpoint, open_checkpoint, refuse_converted
from turbolm.models.converted import Manifest, rank_folder
from turbolm.models.decoder import load_decoder, vocabulary_names
from turbolm.models.loader import Loader, Progress
from turbolm.models.registry import decoder_spec
from turbolm.models.sharding import ShardLoader, cuts, shard_spec
from turbolm.models.spec import DecoderSpec
from turbolm.ops import PreparedLinear
from turbolm.ops.hardware import probe
from turbolm.ops.select import select_layout
from turbolm.ops.sharded import ShardedOps
from turbolm.ops.stored import Layout, StoredLinear
from turbolm.parallel.shard import Shard
from turbolm.quant.rounding import Rounding

_FILE_BYTES = 512 << 20  # of tensors, from which on a file is written


def convert(
    model: str,
    output: str | Path,
    *,
    device: str = "auto",
    weights: str = "auto",
    dtype: str = "auto",
    tensor_parallel: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `model` (any name that `LLM` takes) into the folder `output` as the kernels for `device` keep it, for so
    many ranks; `weights` rounds an unquantized one, as at load. No GPU is needed.

    The options are those of `EngineConfig`; `progress` is called with (bytes read, bytes in all), of each rank. Raises
    ConfigError for options or a folder that can't be used, CapacityError for a full disk, UnsupportedModelError for a
    model that was converted before, and the errors of loading.
    """
    made = _conversion(EngineConfig.of(device=device, weights=weights, dtype=dtype, tensor_parallel=tensor_parallel))
    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} is not an empty folder: give a new one, or delete it first")
    checkpoint = open_checkpoint(fetch(model).path)
    refuse_converted(checkpoint)
    if made.weights != "auto" and checkpoint.packing is not None:
        raise ConfigError(f"weights is '{made.weights}', but {checkpoint.path} is quantized already; leave weights out")
    spec = decoder_spec(checkpoint.config)
    for rank in range(made.tensor_parallel):
        shard_spec(spec, Shard(rank, made.tensor_parallel))  # whether it can be divided so
    output.mkdir(parents=True, exist_ok=True)
    layout = select_layout(made.device)
    matrices: dict[str, Any] = {}
    try:
        for rank in range(made.tensor_parallel):
            writer = _Writer(rank_folder(output, rank))
            matrices = _convert_rank(checkpoint, spec, made, layout, rank, writer, progress)
            writer.finish()
    except BaseException:
        for rank in range(made.tensor_parallel):
            shutil.rmtree(rank_folder(output, rank), ignore_errors=True)
        raise
    exporter = Exporter(checkpoint, spec, tokenizer_of(checkpoint), None, torch.bfloat16)
    exporter.write_tokenizer(output)
    if find_scales(checkpoint.path):
        shutil.copyfile(find_scales(checkpoint.path), output / KV_SCALES)
    Manifest(made, layout.fingerprint, model, matrices).write(output)
    exporter.write_config(output)


def _conversion(config: EngineConfig) -> Conversion:
    """What is made, decided without the GPU that it may be for."""
    if config.device == "cuda" or (config.device == "auto" and probe().gpus):
        if config.dtype == "float32":
            raise ConfigError("dtype is 'float32', and the kernels for GPUs compute in bfloat16 or float16")
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        return Conversion("cuda", dtype, config.weights, config.tensor_parallel)
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel is {config.tensor_parallel}, and the CPU's kernels run in one process: use 1, or device "
            "'cuda'"
        )
    if config.dtype != "auto":
        raise ConfigError(f"dtype is '{config.dtype}', which unpacks weights on the CPU: leave dtype out")
    return Conversion("cpu", choose_backend(EngineConfig(device="cpu"), probe()).dtype, config.weights, 1)


def _convert_rank(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    made: Conversion,
    layout: Layout,
    rank: int,
    writer: _Writer,
    progress: Progress | None,
) -> dict[str, Any]:
    """What describes each matrix."""
    shard = Shard(rank, made.tensor_parallel)
    ops = layout.make_ops(getattr(torch, made.dtype), probe().physical_cores, shard.rank, shard.size)
    rounding = None
    if made.weights != "auto":
        rounding = Rounding.at_load(cast(Any, made.weights), made.device, vocabulary_names(spec))
    options: dict[str, Any] = {"packing": checkpoint.packing, "rounding": rounding}
    loader: Loader
    if shard.size == 1:
        loader = _StoringLoader(writer, layout, checkpoint.source, ops, progress, **options)
    else:
        parts = cuts(spec, shard)
        loader = _StoringShardLoader(
            writer, layout, checkpoint.source, cast(ShardedOps, ops), parts, progress, **options
        )
    load_decoder(shard_spec(spec, shard), loader, max_context=1)
    return writer.matrices


class _Writer:
    """A rank's files."""

    def __init__(self, folder: Path) -> None:
        self.matrices: dict[str, Any] = {}
        self._folder = folder
        self._names: set[str] = set()
        self._tensors: dict[str, Tensor] = {}  # of the next file
        self._num_bytes = 0
        self._files: list[Path] = []
        folder.mkdir()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            return  # vectors of several layers: rotary factors
        self._names.add(name)
        self._tensors[name] = tensor.cpu().contiguous()
        self._num_bytes += tensor.numel() * tensor.element_size()
        if self._num_bytes >= _FILE_BYTES:
            self._flush()

    def add_linear(self, name: str, stored: StoredLinear) -> None:
        self.matrices[name] = dict(stored.about)
        for part, tensor in stored.tensors.items():
            self.add(f"{name}:{part}", tensor)

    def _flush(self) -> None:
        path = self._folder / f"{len(self._files)}.tmp"
        free = shutil.disk_usage(self._folder).free
        if free < self._num_bytes:
            raise CapacityError(
                f"{self._folder} has {format_size(free)} free, and the next file takes {format_size(self._num_bytes)}: "
                "free some space, or give another folder"
            )
        write_tensors(self._tensors, path)
        self._files.append(path)
        self._tensors, self._num_bytes = {}, 0

    def finish(self) -> None:
        if self._tensors:
            self._flush()
        for number, path in enumerate(self._files, 1):
            path.rename(self._folder / f"model-{number:05d}-of-{len(self._files):05d}.safetensors")


@dataclass(frozen=True, slots=True)
class _Written:
    """A matrix that is on disk by now."""

    out_features: int
    in_features: int
    num_bytes: int = 0


class _StoringLoader(Loader):
    """Writes what it prepares."""

    def __init__(self, writer: _Writer, layout: Layout, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._writer = writer
        self._layout = layout

    def linear(
        self, prefixes: Sequence[str], shape: tuple[int, int], has_bias: bool, rows: Sequence[int] | None = None
    ) -> PreparedLinear:
        prepared = super().linear(prefixes, shape, has_bias, rows)
        self._writer.add_linear("+".join(prefixes), self._layout.store(prepared))
        return _Written(*shape)

    def embedding(self, prefix: str, shape: tuple[int, int]) -> PreparedLinear:
        stored = self._layout.store(super().embedding(prefix, shape))
        if self._layout.has_tables:
            self._writer.add_linear(prefix, stored)
        else:
            self._writer.add(f"{prefix}.weight", stored.tensors["weight"])
        return _Written(*shape)

    def vector(self, name: str, size: int | None = None) -> Tensor:
        tensor = super().vector(name, size)
        if not name.endswith(".bias"):  # these are with their matrices
            self._writer.add(name, tensor)
        return tensor


class _StoringShardLoader(_StoringLoader, ShardLoader):
    """Of one rank's part."""
