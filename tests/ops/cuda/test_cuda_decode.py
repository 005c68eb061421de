"""The decode attention kernel's own source, run on the CPU by decode_emulator.cpp, against plain attention."""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.cuda.compiler import KERNELS
from turbolm.ops.cuda.decode import Arguments, Variant, fill_arguments, variant_for
from turbolm.ops.reference import dequantize_heads, quantize_heads
from turbolm.ops.triton.tiles import pair_tokens

B = torch.bfloat16


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Variant → the kernel and the emulator as a library, compiled once."""

    @functools.cache
    def compiled(variant: Variant) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("kernel")
        for name in ("decode.cu", "codes.cuh", "words.cuh"):
            shutil.copy(KERNELS / name, folder)
        for name in ("ptx.cuh", "warp.cuh"):
            (folder / name).write_text("")  # the emulator brings its own
        defines = [f"-D{name}={value}" for name, value in variant.defines().items()]
        source, library = Path(__file__).parent / "decode_emulator.cpp", folder / "decode_emulator.so"
        command = ["c++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{folder}", *defines]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return compiled


def emulated(build, variant: Variant, q, tables, contexts, cache, spec, ctas: int, order: int) -> torch.Tensor:
    """What the kernel makes of these, [s, num_heads * head_dim]."""
    out = torch.full((len(contexts), spec.q_width), math.nan, dtype=q.dtype)
    counters = torch.zeros(len(contexts) * spec.num_kv_heads, dtype=torch.int32)
    parts = torch.full((2 * ctas, variant.group, spec.head_dim + 2), math.nan)
    arguments = Arguments()
    lengths = torch.tensor(contexts, dtype=torch.int32)
    fill_arguments(arguments, q, tables, lengths, cache, spec, out, counters, parts, ctas)
    pools = [0 if pool is None else pool.nbytes for pool in (cache.k, cache.k_scales)]
    sizes = (ctypes.c_long(size) for size in (variant.shared_bytes, *pools))
    build(variant).emulate(ctypes.byref(arguments), ctas, *sizes, order)
    assert not counters.any()
    return out


def random_tables(contexts: list[int], size: int, generator: torch.Generator) -> torch.Tensor:
    """Block ids, each used once; behind a sequence's last one, ids that nothing may look up."""
    blocks = iter(torch.randperm(sum(-(-context // size) for context in contexts) + 1, generator=generator).tolist())
    tables = torch.full((len(contexts), -(-max(contexts) // size) + 3), 1 << 30, dtype=torch.int32)
    for row, context in enumerate(contexts):
        for column in range(-(-context // size)):
            tables[row, column] = next(blocks)
    return tables


def plain_attention(q, k, v, table, context: int, spec: AttentionSpec) -> torch.Tensor:
    """One row's attention [num_heads, head_dim], float64."""
    size, group = k.shape[2], spec.num_heads // spec.num_kv_heads
    positions = torch.arange(context)
    keys = k[table[positions // size].long(), :, positions % size].double().repeat_interleave(group, 1)
    values = v[table[positions // size].long(), :, positions % size].double().repeat_interleave(group, 1)
    logits = torch.einsum("hd,phd->hp", q.double(), keys) * spec.scale
    if spec.softcap:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    if spec.window:
        logits[:, : max(context - spec.window, 0)] = -math.inf
    return torch.einsum("hp,phd->hd", logits.softmax(1), values)


CASES = {
    # heads, kv heads, dim, block size, contexts, window, softcap, warps, depth, CTAs
    "pairs cut between warps and CTAs": (4, 2, 64, 16, [37, 150, 1], None, None, 2, 3, 3),
    "one long context over all": (2, 1, 64, 32, [700], None, None, 3, 2, 4),
    "rows of padding": (3, 1, 64, 16, [0, 20, 0, 33], None, None, 2, 2, 2),
    "more warps than tiles": (8, 1, 128, 16, [16, 17], None, None, 4, 2, 3),
    "a window": (2, 2, 64, 16, [90, 300, 12], 50, None, 2, 4, 2),
    "a soft cap": (2, 1, 128, 64, [100, 65], None, 20.0, 2, 2, 2),
    "many sequences": (1, 1, 64, 16, [1 + i % 35 for i in range(70)], None, None, 2, 3, 3),
    "more sequences than lanes have at a time": (1, 1, 64, 16, [1 + i % 20 for i in range(1060)], None, None, 4, 2, 4),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", CASES)
def test_decode_attention_equals_plain_attention(build, name, order):
    heads, kv_heads, dim, size, contexts, window, softcap, warps, depth, ctas = CASES[name]
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, window, softcap)
    variant = Variant(dim, heads // kv_heads, kv_heads, size, window or 0, softcap is not None, B, warps, depth)
    generator = torch.Generator().manual_seed(len(name))
    num_blocks = sum(-(-context // size) for context in contexts) + 1
    k, v = (torch.randn(num_blocks, kv_heads, size, dim, generator=generator).to(B) for _ in range(2))
    tables = random_tables(contexts, size, generator)
    for row, context in enumerate(contexts):
        if context % size:  # what follows a sequence in its last block is whatever was there
            k[tables[row, context // size], :, context % size :] = math.nan
            v[tables[row, context // size], :, context % size :] = math.nan
    q = torch.randn(len(contexts), spec.qkv_width, generator=generator).to(B)
    out = emulated(build, variant, q, tables, contexts, LayerCache(k, v), spec, ctas, order)
    for row, context in enumerate(contexts):
        expected = torch.zeros(heads, dim, dtype=torch.float64)
        if context:
            expected = plain_attention(q[row, : heads * dim].view(heads, dim), k, v, tables[row], context, spec)
        torch.testing.assert_close(out[row].view(heads, dim).double(), expected, rtol=2e-2, atol=1e-2)


CODE_CASES = {
    # kind, heads, kv heads, dim, block size, contexts, window, softcap, dtype, warps, depth, CTAs
    "int8": ("int8", 8, 2, 128, 16, [37, 150, 1], None, None, B, 2, 3, 2),
    "int8, small heads": ("int8", 6, 2, 64, 32, [100, 0, 33], 50, None, torch.float16, 2, 2, 2),
    "int8, large heads": ("int8", 2, 1, 256, 16, [70], None, 20.0, B, 2, 2, 2),
    "int4": ("int4", 8, 1, 128, 64, [130, 17], None, None, B, 2, 3, 2),
    "int4, large heads": ("int4", 3, 1, 256, 16, [40, 0, 90], 30, None, torch.float16, 2, 2, 2),
    "fp8": ("fp8", 4, 2, 128, 16, [90, 18], None, 30.0, B, 2, 2, 2),
    "fp8, small heads": ("fp8", 8, 1, 64, 16, [65], None, None, torch.float16, 2, 3, 3),
}


@pytest.mark.parametrize("name", CODE_CASES)
def test_codes_are_attended_to_as_the_numbers_that_they_stand_for(build, name):
    kind, heads, kv_heads, dim, size, contexts, window, softcap, dtype, warps, depth, ctas = CODE_CASES[name]
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, window, softcap)
    group = heads // kv_heads
    variant = Variant(dim, group, kv_heads, size, window or 0, softcap is not None, dtype, warps, depth, kind)
    generator = torch.Generator().manual_seed(len(name))
    tables = random_tables(contexts, size, generator)
    num_blocks = sum(-(-context // size) for context in contexts) + 1
    k, v = (torch.randn(num_blocks, kv_heads, size, dim, generator=generator) for _ in range(2))
    v += torch.arange(dim) / dim  # so that dimensions differ
    (k_codes, k_scales), (v_codes, v_scales) = quantize_heads(k, kind), quantize_heads(v, kind)
    k, v = dequantize_heads(k_codes, k_scales, kind), dequantize_heads(v_codes, v_scales, kind)
    for row, context in enumerate(contexts):
        if context % size and k_scales is not None:
            for scales in (k_scales, v_scales):
                scales[tables[row, context // size], :, context % size :] = math.nan
    q = 3 * torch.randn(len(contexts), spec.qkv_width, generator=generator).to(dtype)
    cache = pair_tokens(LayerCache(k_codes, v_codes, k_scales, v_scales, kind, kind))
    out = emulated(build, variant, q, tables, contexts, cache, spec, ctas, 1 if len(name) % 2 else -1)
    for row, context in enumerate(contexts):
        expected = torch.zeros(heads, dim, dtype=torch.float64)
        if context:
            expected = plain_attention(q[row, : heads * dim].view(heads, dim), k, v, tables[row], context, spec)
        torch.testing.assert_close(out[row].view(heads, dim).double(), expected, rtol=1e-2, atol=1e-2)


def test_there_is_a_variant_for_the_heads_that_models_have():
    for heads, kv_heads, dim in ((32, 8, 128), (16, 8, 128), (64, 8, 128), (32, 32, 128), (32, 8, 64), (8, 4, 256)):
        spec = AttentionSpec(heads, kv_heads, dim, dim, 1.0)
        for shared in (99 << 10, 227 << 10):  # consumer GPUs, an H200
            for kind in ("bfloat16", "int8", "int4", "fp8"):
                variant = variant_for(spec, 64, B, shared, kind)
                assert (variant is None) == (kind == "int4" and dim == 64), (heads, kv_heads, dim, shared, kind)
                assert variant is None or variant.shared_bytes <= shared
    assert variant_for(AttentionSpec(9, 3, 80, 80, 1.0), 64, B, 227 << 10) is None
    assert variant_for(AttentionSpec(71, 1, 64, 64, 1.0), 64, B, 227 << 10) is None
    assert variant_for(AttentionSpec(8, 8, 64, 64, 1.0), 8, B, 227 << 10) is None
