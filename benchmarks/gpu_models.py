"""Random weights in Hugging Face's format, in the shapes of known models: what speed is measured on.

python benchmarks/gpu_models.py SHAPE --out DIR     # SHAPE: one of gpu_models.SHAPES, e.g. llama-3-8b

Matrices are normal with standard deviation 0.02, norms are 1, seeds are fixed. The tokenizer has a
token per byte and fills the rest of the vocabulary, so that every id decodes to text. Made on the GPU
where there is one, written by several threads: 16 GB into memory-backed storage take seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

Kind = Literal["normal", "ones", "bits", "scales"]

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}
CHUNK = 32 << 20  # elements made at once
AWQ_GROUP = 128


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, named as in its config.json."""

    architecture: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float = 1e-5
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    awq: bool = False  # 4-bit matrices in groups of 128, as AutoAWQ's "gemm" files have them

    @property
    def has_qk_norm(self) -> bool:
        return self.architecture == "Qwen3ForCausalLM"

    @property
    def is_internlm2(self) -> bool:
        return self.architecture == "InternLM2ForCausalLM"

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        names = (
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("intermediate_size", "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
        )
        family = self.architecture.removesuffix("ForCausalLM").lower()
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": family}
        config |= {name: getattr(self, name) for name in names}
        config |= {"bias": False} if self.is_internlm2 else {"attention_bias": False}
        if self.is_internlm2:
            del config["head_dim"]
        config |= {"tie_word_embeddings": self.tied, "hidden_act": "silu", "torch_dtype": str(self.dtype)[6:]}
        config |= {"eos_token_id": self.vocab_size - 1}
        if self.awq:
            method = {"quant_method": "awq", "bits": 4, "group_size": AWQ_GROUP, "zero_point": True, "version": "gemm"}
            config["quantization_config"] = method
        return config


LLAMA_3_8B = Shape("LlamaForCausalLM", 4096, 32, 32, 8, 128, 14336, 128256, 16384, 5e5)
SHAPES = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": replace(
        LLAMA_3_8B, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672
    ),
    "llama-2-7b-awq": Shape(
        *("LlamaForCausalLM", 4096, 32, 32, 32, 128, 11008, 32000, 4096, 1e4), dtype=torch.float16, awq=True
    ),
    "qwen3-0.6b": Shape(
        *("Qwen3ForCausalLM", 1024, 28, 16, 8, 128, 3072, 151936, 40960, 1e6), rms_norm_eps=1e-6, tied=True
    ),
    "internlm2-20b": Shape("InternLM2ForCausalLM", 6144, 48, 48, 8, 128, 16384, 92544, 32768, 1e6),
    "tiny": Shape("LlamaForCausalLM", 256, 2, 4, 2, 64, 512, 16384, 16384, 1e4),
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(shape: Shape) -> list[list[TensorPlan]]:
    """All tensors, by file: the embedding, the head, and every two layers."""
    names = _names(shape)
    table = (shape.vocab_size, shape.hidden_size)
    ends = [TensorPlan(f"{names['embedding']}.weight", table, shape.dtype, "normal")]
    if not shape.tied:
        ends.append(TensorPlan(f"{names['head']}.weight", table, shape.dtype, "normal"))
    norm = TensorPlan("model.norm.weight", (shape.hidden_size,), shape.dtype, "ones")
    files = [[ends[0], norm], *([plan] for plan in ends[1:])]
    for first in range(0, shape.num_hidden_layers, 2):
        last = min(first + 2, shape.num_hidden_layers)
        files.append([plan for layer in range(first, last) for plan in _layer(shape, f"model.layers.{layer}")])
    return files


def _names(shape: Shape) -> dict[str, str]:
    if shape.is_internlm2:
        return {"embedding": "model.tok_embeddings", "head": "output"}
    return {"embedding": "model.embed_tokens", "head": "lm_head"}


def _layer(shape: Shape, prefix: str) -> Iterator[TensorPlan]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    q_width, kv_width = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    if shape.is_internlm2:
        matrices = {
            "attention.wqkv": (hidden, q_width + 2 * kv_width), "attention.wo": (q_width, hidden),
            "feed_forward.w1": (hidden, width), "feed_forward.w3": (hidden, width), "feed_forward.w2": (width, hidden),
        }  # fmt: skip
        norms = {"attention_norm": hidden, "ffn_norm": hidden}
    else:
        matrices = {
            "self_attn.q_proj": (hidden, q_width), "self_attn.k_proj": (hidden, kv_width),
            "self_attn.v_proj": (hidden, kv_width), "self_attn.o_proj": (q_width, hidden),
            "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden),
        }  # fmt: skip
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if shape.has_qk_norm:
        norms |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
    for name, (inputs, outputs) in matrices.items():
        yield from _matrix(shape, f"{prefix}.{name}", inputs, outputs)
    for name, size in norms.items():
        yield TensorPlan(f"{prefix}.{name}.weight", (size,), shape.dtype, "ones")


def _matrix(shape: Shape, name: str, inputs: int, outputs: int) -> Iterator[TensorPlan]:
    if not shape.awq:
        yield TensorPlan(f"{name}.weight", (outputs, inputs), shape.dtype, "normal")
        return
    groups = inputs // AWQ_GROUP
    yield TensorPlan(f"{name}.qweight", (inputs, outputs // 8), torch.int32, "bits")
    yield TensorPlan(f"{name}.qzeros", (groups, outputs // 8), torch.int32, "bits")
    yield TensorPlan(f"{name}.scales", (groups, outputs), torch.float16, "scales")


def write_model(shape: Shape, folder: Path, *, device: str = "auto", threads: int = 8) -> int:
    """Config, tokenizer and weights into `folder`; the bytes of the weights."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1) + "\n")
    byte_vocabulary(shape.vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}) + "\n")
    files = shards(shape)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(_write_file, folder / name, plans, device, seed)
            for seed, (name, plans) in enumerate(zip(names, files, strict=True))
        ]
        total = sum(job.result() for job in jobs)
    weight_map = {plan.name: name for name, plans in zip(names, files, strict=True) for plan in plans}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return total


def header(plans: list[TensorPlan]) -> tuple[bytes, int]:
    """How a safetensors file begins: the length of what follows (8 bytes) and a JSON object that says where each
    tensor lies; and the bytes of all tensors, which come next, end to end."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        place = [offset, offset + plan.num_bytes]
        entries[plan.name] = {"dtype": DTYPES[plan.dtype], "shape": list(plan.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offset


def _write_file(path: Path, plans: list[TensorPlan], device: str, seed: int) -> int:
    start, num_bytes = header(plans)
    generator = torch.Generator(device).manual_seed(seed)
    # Pinned memory is what makes copies from a GPU fast; one buffer serves the whole file.
    largest = max(min(math.prod(plan.shape), CHUNK) * plan.dtype.itemsize for plan in plans)
    buffer = torch.empty(largest, dtype=torch.uint8, pin_memory=device == "cuda")
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(start))
        for plan in plans:
            count = math.prod(plan.shape)
            for first in range(0, count, CHUNK):
                made = _values(plan, min(CHUNK, count - first), device, generator).view(torch.uint8)
                part = buffer[: made.numel()]
                part.copy_(made)
                _write_all(file, memoryview(part.numpy()))
    return num_bytes


def _values(plan: TensorPlan, count: int, device: str, generator: torch.Generator) -> torch.Tensor:
    if plan.kind == "ones":
        return torch.ones(count, dtype=plan.dtype, device=device)
    if plan.kind == "bits":
        return torch.randint(-(1 << 31), 1 << 31, (count,), dtype=plan.dtype, device=device, generator=generator)
    if plan.kind == "scales":
        return torch.empty(count, device=device).uniform_(0.001, 0.003, generator=generator).to(plan.dtype)
    return torch.empty(count, dtype=plan.dtype, device=device).normal_(0, 0.02, generator=generator)


def _write_all(file: Any, data: memoryview) -> None:
    """A raw file's `write` takes at most 2 GB at once, and may take less."""
    while data:
        data = data[file.write(data) :]


def byte_vocabulary(size: int) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of exactly `size` tokens: the bytes, words that no text becomes, "<|end|>"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size <= len(letters):
        raise SystemExit(f"the vocabulary has {size} tokens; a byte-level tokenizer needs {len(letters) + 1} or more")
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {f"Ġw{i}": i for i in range(len(letters), size - 1)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model's folder")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where numbers are drawn")
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    start = time.perf_counter()
    size = write_model(SHAPES[options.shape], options.out, device=options.device, threads=options.threads)
    print(f"{options.out}: {options.shape}, {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
