"""Weight formats: how a matrix lies on disk and in memory, and what it means.

A `Weight` is a matrix [n, k] (out features, in features) in one format; `ops` backends know fast layouts for some
formats and fall back to `dequantize` for the others. Formats of one tensor whose dtype says all (dense ones, GGUF's
blocks) are in `FORMATS`, by one line each. Formats of several tensors (int4, int8, fp8) are packed on disk in the
ways of `PACKINGS`, which a checkpoint's quantization_config chooses between, by one line each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.quant import dense, gguf_blocks, gguf_k
from turbolm.quant.awq import Awq
from turbolm.quant.compressed_tensors import CompressedTensors
from turbolm.quant.gptq import Gptq
from turbolm.quant.hf_fp8 import HfFp8
from turbolm.quant.method import ADVICE
from turbolm.quant.rows import RowFormat
from turbolm.weights import Packing, Weight, WeightReader, WeightSource

#: Formats of one tensor by name, in the order in which they are tried.
FORMATS: Mapping[str, RowFormat] = {
    "f32": dense.F32,
    "f16": dense.F16,
    "bf16": dense.BF16,
    "q4_0": gguf_blocks.Q4_0,
    "q4_1": gguf_blocks.Q4_1,
    "q5_0": gguf_blocks.Q5_0,
    "q5_1": gguf_blocks.Q5_1,
    "q8_0": gguf_blocks.Q8_0,
    "iq4_nl": gguf_blocks.IQ4_NL,
    "q2_k": gguf_k.Q2_K,
    "q3_k": gguf_k.Q3_K,
    "q4_k": gguf_k.Q4_K,
    "q5_k": gguf_k.Q5_K,
    "q6_k": gguf_k.Q6_K,
    "iq4_xs": gguf_k.IQ4_XS,
}

#: `quant_method` of a quantization_config → what reads it, or raises UnsupportedModelError.
PACKINGS: Mapping[str, Callable[[Mapping[str, Any]], Packing]] = {
    "awq": Awq.read_config,
    "gptq": Gptq.read_config,
    "compressed-tensors": CompressedTensors.read_config,
    "fp8": HfFp8.read_config,
}


def read_packing(config: Any) -> Packing:
    """How a checkpoint with this quantization_config (or compression_config) packs its matrices.

    Raises UnsupportedModelError for a method or a variant of one that turbolm doesn't read, CheckpointError for a
    config that is broken.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(method, str) or method not in PACKINGS:
        raise UnsupportedModelError(
            f"the weights are quantized by {str(method)!r}, which turbolm doesn't read (it reads "
            f"{', '.join(PACKINGS)}); {ADVICE}"
        )
    return PACKINGS[method](config)


def find_reader(source: WeightSource, prefix: str, packing: Packing | None = None) -> WeightReader:
    """What reads the matrix `prefix` (a module name, without ".weight"). `packing`: the checkpoint's.

    Raises CheckpointError where there is no such matrix, UnsupportedModelError where no format knows it.
    """
    if packing is not None and packing.detect(source, prefix):
        return packing
    for weight_format in FORMATS.values():
        if weight_format.detect(source, prefix):
            return weight_format
    parts = [info for name, info in source.tensors.items() if name.startswith(f"{prefix}.")]
    if not parts:
        raise CheckpointError(f"the checkpoint has no tensor {prefix}.weight")
    stored = ", ".join(f"{info.name} as {info.dtype}" for info in parts[:4])
    method = "no quantization_config" if packing is None else f"the quantization_config of {packing.method}"
    raise UnsupportedModelError(
        f"no weight format of turbolm reads {stored} (with {method}); known formats: {', '.join(FORMATS)}, and "
        f"those of {', '.join(PACKINGS)}. Get the model in one of these"
    )


def load_weight(source: WeightSource, prefix: str, packing: Packing | None = None) -> Weight:
    """The matrix `prefix` in whatever format `source` holds it. `packing`: the checkpoint's."""
    return find_reader(source, prefix, packing).load(source, prefix)
