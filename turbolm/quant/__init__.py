"""Weight formats: how a matrix lies on disk and in memory, and what it means.

One entry per format in `FORMATS`. A `Weight` is a matrix [n, k] (out features, in features) in one
format; `ops` backends know fast layouts for some formats and fall back to `dequantize` for the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.quant import dense, gguf_blocks, gguf_k
from turbolm.weights import Weight, WeightFormat, WeightSource

#: Every format by its name, in the order in which they are tried.
FORMATS: Mapping[str, WeightFormat] = {
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

#: What `quantization_config.quant_method` of a checkpoint may say: the methods that a format serves.
CHECKPOINT_METHODS: frozenset[str] = frozenset()


def detect_format(source: WeightSource, prefix: str) -> WeightFormat:
    """The format in which `source` holds the matrix `prefix` (a module name, without ".weight").

    Raises CheckpointError where there is no such matrix, UnsupportedModelError where no format
    knows it.
    """
    for weight_format in FORMATS.values():
        if weight_format.detect(source, prefix):
            return weight_format
    parts = [info for name, info in source.tensors.items() if name.startswith(f"{prefix}.")]
    if not parts:
        raise CheckpointError(f"the checkpoint has no tensor {prefix}.weight")
    stored = ", ".join(f"{info.name} as {info.dtype}" for info in parts[:4])
    raise UnsupportedModelError(
        f"no weight format of turbolm reads {stored}; known formats: {', '.join(FORMATS)}. "
        "Get the model in one of these"
    )


def load_weight(source: WeightSource, prefix: str) -> Weight:
    """The matrix `prefix` in whatever format `source` holds it."""
    return detect_format(source, prefix).load(source, prefix)
