"""`quantize`: a model in, a folder with the quantized model out."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from turbolm.compress.calibration import Calibration, RecordingOps, calibration_device
from turbolm.compress.export import Exporter
from turbolm.compress.layer import LayerTensors, points_of
from turbolm.compress.methods import compress_layer
from turbolm.compress.partial import FOLDER, Partial
from turbolm.compress.recipe import Recipe
from turbolm.compress.report import MatrixReport, Report, matrix_from_json, warnings_of
from turbolm.compress.samples import Samples, load_samples, tokenizer_of
from turbolm.config import format_size
from turbolm.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModelError
from turbolm.hub import fetch
from turbolm.models.checkpoint import Checkpoint, open_checkpoint, refuse_converted
from turbolm.models.registry import decoder_spec
from turbolm.models.spec import DecoderSpec
from turbolm.quant.dense import dense

#: Called with (layers done, layers in total).
Progress = Callable[[int, int], None]

_DENSE = ("F32", "F16", "BF16")


def quantize(
    model: str, output: str | Path, method: str = "awq", *, progress: Progress | None = None, **options: object
) -> Report:
    """Quantize `model` (any name that `LLM` takes) into the folder `output`, which `LLM` and other engines load.

    `options` are the fields of `Recipe`. Work that was cut off goes on where it was when the same call is
    made again. Raises ConfigError for options, data or a folder that can't be used, CapacityError for a full
    disk, and the errors of loading a model.
    """
    recipe = Recipe.of(method, **options)
    output = Path(output).expanduser()
    _check_output(output)
    checkpoint = open_checkpoint(fetch(model).path)
    return _Job(checkpoint, output, recipe).run(progress)


def unpack(model: str, output: str | Path) -> None:
    """Write `model` as 16-bit safetensors into the folder `output`: what quantizing starts from, and what other
    engines read of a GGUF file. Raises as `quantize` does."""
    output = Path(output).expanduser()
    _check_output(output)
    checkpoint = open_checkpoint(fetch(model).path)
    refuse_converted(checkpoint)
    spec = decoder_spec(checkpoint.config)
    num_layers = len(spec.layers)
    partial = Partial(output, {"model": str(checkpoint.path)}, num_layers)
    exporter = Exporter(checkpoint, spec, tokenizer_of(checkpoint), None, _stored_dtype(checkpoint))
    for index in range(len(partial.layers), num_layers):
        layer = LayerTensors.read(spec.layers[index], checkpoint.source, torch.device("cpu"), checkpoint.packing)
        matrices = {module: dense(matrix) for module, matrix in layer.matrices.items()}
        partial.save_weights(index, exporter.layer_tensors(layer, matrices))
        partial.finish_layer(None)
    partial.save_weights(num_layers, exporter.other_tensors())
    exporter.write_tokenizer(output)
    exporter.write_weights(output, partial)
    exporter.write_config(output)
    shutil.rmtree(partial.folder)


class _Job:
    def __init__(self, checkpoint: Checkpoint, output: Path, recipe: Recipe) -> None:
        refuse_converted(checkpoint)
        self.checkpoint = checkpoint
        self.spec = decoder_spec(checkpoint.config)
        if checkpoint.packing is not None:
            raise UnsupportedModelError(
                f"{checkpoint.path} is quantized already (by {checkpoint.packing.method}): give the model with 16-bit "
                "weights"
            )
        self.recipe = recipe.fitted(_widths(checkpoint, self.spec))
        self.warnings = _rounded_before(checkpoint, self.spec)
        if recipe.needs_data and recipe.context > self.spec.max_context:
            raise ConfigError(f"context is {recipe.context}; the model was made for {self.spec.max_context} tokens")
        self.dtype = _stored_dtype(checkpoint)
        self.output = output
        self.tokenizer = tokenizer_of(checkpoint)
        self.samples: Samples | None = None
        if recipe.needs_data:
            self.samples = load_samples(recipe.data, self.tokenizer, recipe.samples, recipe.context)
            self.warnings += self.samples.warnings
        _check_disk(output, checkpoint, 8 * self.spec.hidden_size * self.samples.num_tokens if self.samples else 0)

    def run(self, progress: Progress | None) -> Report:
        start = time.monotonic()
        num_layers = len(self.spec.layers)
        partial = Partial(self.output, self._identity(), num_layers)
        exporter = Exporter(self.checkpoint, self.spec, self.tokenizer, self.recipe, self.dtype)
        ops = RecordingOps(*calibration_device(self.recipe.device))
        calibration = None
        if self.samples is not None:
            calibration = Calibration(self.spec, self.checkpoint.source, self.samples, ops, partial.folder)
            if not partial.layers:
                calibration.embed()
        for index in range(len(partial.layers), num_layers):
            if progress is not None:
                progress(index, num_layers)
            layer = LayerTensors.read(self.spec.layers[index], self.checkpoint.source, ops.device)
            statistics = None if calibration is None else calibration.observe(index, layer)
            done = compress_layer(layer, statistics, self.recipe, self.dtype)
            partial.save_weights(index, exporter.layer_tensors(layer, done.weights))
            if calibration is not None:
                layer.matrices.update({m: w.dequantize(torch.float32) for m, w in done.weights.items()})
                calibration.advance(index, layer)
            partial.finish_layer([asdict(report) for report in done.reports])
        if progress is not None:
            progress(num_layers, num_layers)
        partial.save_weights(num_layers, exporter.other_tensors())
        matrices = tuple(matrix_from_json(value) for layer in partial.layers for value in layer)
        return self._finish(exporter, partial, matrices, start)

    def _finish(self, exporter: Exporter, partial: Partial, matrices: tuple[MatrixReport, ...], start: float) -> Report:
        notes = exporter.write_tokenizer(self.output)
        num_bytes = exporter.write_weights(self.output, partial)
        report = Report(
            recipe=asdict(self.recipe),
            matrices=matrices,
            warnings=(*self.warnings, *warnings_of(matrices), *notes),
            seconds=time.monotonic() - start,
            num_bytes=num_bytes,
            num_bytes_before=self.checkpoint.total_weight_bytes,
            num_samples=0 if self.samples is None else len(self.samples.token_ids),
            num_tokens=0 if self.samples is None else self.samples.num_tokens,
        )
        (self.output / "quantization_report.json").write_text(json.dumps(report.as_json(), indent=1) + "\n")
        exporter.write_config(self.output)
        shutil.rmtree(partial.folder)
        return report

    def _identity(self) -> dict[str, object]:
        """What the result depends on."""
        digest = hashlib.sha256(repr(self.samples.token_ids).encode()).hexdigest() if self.samples else ""
        return {**asdict(self.recipe), "model": str(self.checkpoint.path), "text": digest}


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder to write the model to")
    if output.is_dir() and any(output.iterdir()) and not (output / FOLDER).is_dir():
        raise ConfigError(f"{output} is not empty: give a new folder, or delete it first")


def _rounded_before(checkpoint: Checkpoint, spec: DecoderSpec) -> tuple[str, ...]:
    """A warning where the file's weights are blocks of a few bits."""
    dtypes = {checkpoint.source.tensors[f"{module}.weight"].dtype for module in _modules(spec)}
    packed = sorted(dtype for dtype in dtypes if dtype not in _DENSE)
    if not packed:
        return ()
    return (f"the model's weights were rounded before ({', '.join(packed)}): from a 16-bit model the result is better",)


def _modules(spec: DecoderSpec) -> list[str]:
    return [module for layer in spec.layers for point in points_of(layer) for module in point.modules]


def _widths(checkpoint: Checkpoint, spec: DecoderSpec) -> list[tuple[str, int]]:
    """Every matrix and its input columns."""
    tensors = checkpoint.source.tensors
    found = [(module, tensors.get(f"{module}.weight")) for module in _modules(spec)]
    for module, info in found:
        if info is None or len(info.shape) != 2:
            raise CheckpointError(f"the checkpoint has no matrix {module}.weight")
    return [(module, info.shape[1]) for module, info in found if info is not None]


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of what stays unquantized: float16 where the model is, else bfloat16."""
    name = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    return torch.float16 if name == "float16" else torch.bfloat16


def _check_disk(output: Path, checkpoint: Checkpoint, hidden_bytes: int) -> None:
    """Room for the hidden states, and for 16-bit weights, which are more than the result takes."""
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    parameters = sum(math.prod(info.shape) for info in checkpoint.source.tensors.values())
    needed, free = 2 * parameters + hidden_bytes, shutil.disk_usage(folder).free
    if free < needed:
        raise CapacityError(
            f"{folder} has {format_size(free)} free, and quantizing may take {format_size(needed)}: free some space, "
            "or give another folder"
        )
