"""Small GGUF models written with the `gguf` package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

HIDDEN, HEADS, KV_HEADS, WIDTH, VOCAB = 64, 4, 2, 96, 40

WriteGGUF = Callable[..., Path]


def model_tensors() -> dict[str, np.ndarray]:
    """The tensors of a one-layer model with a tied head, by llama.cpp's names."""
    rng = np.random.default_rng(1)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (VOCAB, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_up.weight": (WIDTH, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, WIDTH),
        "output_norm.weight": (HIDDEN,),
    }
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def model_metadata(architecture: str) -> dict[str, Any]:
    return {
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": WIDTH,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """write(architecture="llama", metadata={changes; None removes}, tensors={changes}, packed={name:
    (bytes, type)}, **writer options) → path of a model file."""

    def write(
        architecture: str = "llama",
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray | None] | None = None,
        packed: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
        alignment: int | None = None,
        name: str = "model.gguf",
        **options: Any,
    ) -> Path:
        writer = gguf.GGUFWriter(None, architecture, **options)
        if alignment:
            writer.add_custom_alignment(alignment)
        for key, value in (model_metadata(architecture) | dict(metadata or {})).items():
            if value is not None:
                _add(writer, key, value)
        packed = packed or {}
        for tensor_name, tensor in (model_tensors() | dict(tensors or {})).items():
            if tensor is not None and tensor_name not in packed:
                writer.add_tensor(tensor_name, tensor)
        for tensor_name, (data, data_type) in packed.items():
            writer.add_tensor(tensor_name, data, raw_dtype=data_type)
        path = tmp_path / name
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
