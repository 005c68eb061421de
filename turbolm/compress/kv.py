"""`calibrate_kv`: the range of each head's keys and values over calibration data, for static scales of a KV cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from turbolm.compress.calibration import Calibration, RecordingOps, calibration_device
from turbolm.compress.layer import LayerTensors
from turbolm.compress.samples import load_samples, tokenizer_of
from turbolm.errors import CheckpointError, ConfigError
from turbolm.hub import fetch
from turbolm.kv_scales import NAME, LayerRanges, Ranges, scales_path, write_scales
from turbolm.models.checkpoint import open_checkpoint, refuse_converted
from turbolm.models.registry import decoder_spec

#: What `calibrate_kv` takes of a `Recipe`.
OPTIONS = ("data", "samples", "context", "device")


def calibrate_kv(
    model: str,
    output: str | Path | None = None,
    *,
    data: str = "",
    samples: int = 128,
    context: int = 512,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, tuple[str, ...]]:
    """Write the static scales of `model` (any name that `LLM` takes) to `output`, a folder or a .json file; by default
    beside the model, where loading finds them. → the file, and warnings.

    The other options are those of `Recipe`; `progress` is called with (layers done, layers in all). Raises ConfigError
    for options, data or an output that can't be used, CheckpointError naming a layer whose keys or values are not
    finite, and the errors of loading a model.
    """
    checkpoint = open_checkpoint(fetch(model).path)
    refuse_converted(checkpoint)
    spec = decoder_spec(checkpoint.config)
    if not 1 <= context <= spec.max_context:
        raise ConfigError(f"context is {context}; allowed: 1 to {spec.max_context}, which the model was made for")
    if samples < 1:
        raise ConfigError(f"samples is {samples}; allowed: 1 or more")
    target = _target(output, checkpoint.path)
    found = load_samples(data, tokenizer_of(checkpoint), samples, context)
    layers = []
    with tempfile.TemporaryDirectory(prefix="turbolm-") as folder:
        ops = RecordingOps(*calibration_device(device))
        calibration = Calibration(spec, checkpoint.source, found, ops, Path(folder))
        calibration.embed(checkpoint.packing)
        for index, layer_spec in enumerate(spec.layers):
            if progress is not None:
                progress(index, len(spec.layers))
            layer = LayerTensors.read(layer_spec, checkpoint.source, ops.device, checkpoint.packing)
            extremes = _Extremes()
            ops.observe_kv = extremes.add
            calibration.advance(index, layer)
            layers.append(extremes.ranges(f"layer {index} of {checkpoint.path}"))
    if progress is not None:
        progress(len(spec.layers), len(spec.layers))
    write_scales(target, layers, found.num_tokens, found.source)
    return target, found.warnings


def _target(output: str | Path | None, model: Path) -> Path:
    if output is None:
        return scales_path(model)
    path = Path(output).expanduser()
    return path if path.suffix == ".json" else path / NAME


class _Extremes:
    """Of each head of one layer."""

    def __init__(self) -> None:
        self._found: tuple[list[Tensor], list[Tensor]] = ([], [])  # of keys, of values: [heads, 2] of each batch

    def add(self, k_thd: Tensor, v_thd: Tensor) -> None:
        for found, heads in zip(self._found, (k_thd, v_thd), strict=True):
            low, high = heads.float().aminmax(dim=2)
            found.append(torch.stack([low.amin(0), high.amax(0)], 1).cpu())

    def ranges(self, where: str) -> LayerRanges:
        return LayerRanges(*(_merged(torch.stack(found), where) for found in self._found))


def _merged(found: Tensor, where: str) -> Ranges:
    """[batches, heads, 2]"""
    if not torch.isfinite(found).all():
        raise CheckpointError(f"{where}: some keys or values are NaN or infinite; the model is broken")
    low, high = found[:, :, 0].amin(0).tolist(), found[:, :, 1].amax(0).tolist()
    return tuple(zip(low, high, strict=True))
