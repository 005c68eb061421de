"""What the attention kernels share: tiles of K and V out of a paged cache, and the online softmax.

A tile is TILE consecutive positions of one sequence and one kv head. KIND says how the cache keeps it: NUMBERS
(in the dtype of the activations), INT8, INT4 or FP8.

Codes are not turned into the numbers that they stand for. As float16 they are factors of the products, to which
scale s and minimum m of a position are applied:

    q·k = s (q·code) + m sum(q)              sum of p v = sum of (p s) code + sum of (p m)

They are read as 16-bit numbers of two bytes, which cost one instruction for two codes to take apart. In K the two
bytes are neighbouring dimensions, in V two neighbouring positions (`rotary.py` stores them so); each byte, or with
INT4 each nibble, of all numbers is one factor of a product over the half, or quarter, that it makes up:

    INT8, FP8   byte b of K: dimension 2i + b            of V: position 2j + b
    INT4        nibble n of K: dimension 2i + n // 2 + n % 2 * DIM / 2
                of V: position 2j + n // 2, dimension i + n % 2 * V_DIM / 2
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, assignment"
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.kv import KvKind
from turbolm.ops import AttentionSpec, LayerCache

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
NUMBERS: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
INT4: tl.constexpr = tl.constexpr(2)
FP8: tl.constexpr = tl.constexpr(3)

_IN_PTX: tl.constexpr = tl.constexpr(not triton.knobs.runtime.interpret)
# Weights times the scales of V are multiplied by this, so that scales of small values are not lost in float16.
RAISE: tl.constexpr = tl.constexpr(16.0)
UNITS: tl.constexpr = tl.constexpr(2.0**24)  # of codes as `codes_of` gives them, but for odd nibbles, in 1


def kind_of(kind: KvKind) -> int:
    """The constant of these kernels for a kind of numbers."""
    constants = {"int8": INT8, "int4": INT4, "fp8": FP8}
    return int(constants.get(kind, NUMBERS).value)


def stored(pool: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """A pool as the kernels read it: codes two bytes at a time, (scale, minimum) as one number."""
    if pool.itemsize > 1:
        return pool, pool
    pairs = pool.view(torch.int16)
    return pairs, pairs if scales is None else scales.view(torch.int32)


def pair_tokens(cache: LayerCache) -> LayerCache:
    """A cache that is laid out as `LayerCache` says, as these kernels keep it: codes of v lie side by side for two
    positions, [.., block_size / 2, bytes of a head, 2]."""
    if cache.v.itemsize > 1:
        return cache
    *rows, size, num_bytes = cache.v.shape
    pairs = cache.v.view(torch.uint8).view(*rows, size // 2, 2, num_bytes).transpose(-1, -2)
    return replace(cache, v=pairs.reshape(cache.v.shape).view(cache.v.dtype))


def shapes(cache: LayerCache, spec: AttentionSpec) -> dict[str, float]:
    """The constants of a kernel that reads this cache. Columns are numbers of the size that it reads in a row of a
    tile, widths what tiles have."""
    k_columns = spec.head_dim // {"int8": 2, "fp8": 2, "int4": 4}.get(cache.kind_k, 1)
    v_columns = spec.v_head_dim // (2 if cache.kind_v == "int4" else 1)
    return {
        "KV_HEADS": spec.num_kv_heads, "BLOCK_SIZE": cache.block_size, "DIM": spec.head_dim, "V_DIM": spec.v_head_dim,
        "K_COLUMNS": k_columns, "WIDTH": padded_dim(k_columns), "V_COLUMNS": v_columns,
        "V_WIDTH": padded_dim(v_columns), "K_KIND": kind_of(cache.kind_k), "V_KIND": kind_of(cache.kind_v),
        "WINDOW": spec.window or 0, "SOFTCAP": spec.softcap or 0.0,
    }  # fmt: skip


def result_width(cache: LayerCache, spec: AttentionSpec) -> int:
    """Columns of a result: those of a tile of V, twice with int4."""
    return padded_dim(spec.v_head_dim // 2) * 2 if cache.kind_v == "int4" else padded_dim(spec.v_head_dim)


@triton.jit
def find_blocks(table, first, offset, context, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of the positions `first` + offset of a tile: one if the tile lies within a block, else a vector.
    Positions from `context` on are not looked up. Call it a tile ahead, so that K and V don't wait for it."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + first // BLOCK_SIZE, mask=first < context, other=0)
    else:
        position = first + offset
        block = tl.load(table + position // BLOCK_SIZE, mask=position < context, other=0)
    return block


@triton.jit
def value_offsets(TILE: tl.constexpr, KIND: tl.constexpr):
    """Positions of the rows of a tile of V, from the tile's first; with codes, of the first of each two."""
    if KIND == NUMBERS:
        position = tl.arange(0, TILE)
    else:
        position = 2 * tl.arange(0, TILE // 2)
    return position


@triton.jit
def _load(pool, block, row, valid, block_stride, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[rows, WIDTH] of a pool whose pointer is already at the kv head; WIDTH pads COLUMNS with zeros. If MASKED,
    rows that are not valid become zeros."""
    column = tl.arange(0, WIDTH)
    pointers = pool + (block.to(tl.int64) * block_stride + row * COLUMNS)[:, None] + column[None, :]
    if MASKED and WIDTH != COLUMNS:
        tile = tl.load(pointers, mask=valid[:, None] & (column < COLUMNS)[None, :], other=0)
    elif MASKED:
        tile = tl.load(pointers, mask=valid[:, None], other=0)
    elif WIDTH != COLUMNS:
        tile = tl.load(pointers, mask=(column < COLUMNS)[None, :], other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_keys(pool, block, position, context, block_stride, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
              WIDTH: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """A tile of K, [TILE, WIDTH]. What a block's unused slots hold must not reach a product if it may be NaN, as
    codes can't be."""
    row = position % BLOCK_SIZE
    return _load(pool, block, row, position < context, block_stride, COLUMNS, WIDTH, MASKED and KIND == NUMBERS)


@triton.jit
def load_values(pool, block, position, context, block_stride, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr,
                WIDTH: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """A tile of V: [TILE, WIDTH] numbers, or [TILE / 2, WIDTH] pairs of codes."""
    row = position % BLOCK_SIZE
    if KIND != NUMBERS:
        row = row // 2
    return _load(pool, block, row, position < context, block_stride, COLUMNS, WIDTH, MASKED and KIND == NUMBERS)


@triton.jit
def load_scales(pool, block, position, context, block_stride, BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr):
    """(scale, minimum) of each position as one number; 0 from `context` on."""
    if KIND == INT8 or KIND == INT4:  # noqa: PLR1714, SIM109 (Triton knows no "in")
        pointers = pool + block.to(tl.int64) * block_stride + position % BLOCK_SIZE
        words = tl.load(pointers, mask=position < context, other=0)
    else:
        words = tl.zeros(position.shape, tl.int32)
    return words


@triton.jit
def load_tile(
    k_pool, v_pool, k_scales, v_scales, key_block, value_block, position, value_position, context, k_stride, v_stride,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    V_COLUMNS: tl.constexpr, V_WIDTH: tl.constexpr, MASKED: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
):  # fmt: skip
    """K at `position` and V at `value_position`, and scales of both at `position`, out of pools that point at the kv
    head."""
    stride: tl.constexpr = KV_HEADS * BLOCK_SIZE
    keys = load_keys(k_pool, key_block, position, context, k_stride, BLOCK_SIZE, K_COLUMNS, WIDTH, MASKED, K_KIND)
    key_scales = load_scales(k_scales, key_block, position, context, stride, BLOCK_SIZE, K_KIND)
    values = load_values(
        v_pool, value_block, value_position, context, v_stride, BLOCK_SIZE, V_COLUMNS, V_WIDTH, MASKED, V_KIND
    )
    value_scales = load_scales(v_scales, key_block, position, context, stride, BLOCK_SIZE, V_KIND)
    return keys, key_scales, values, value_scales


@triton.jit
def scale_of(words):
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def minimum_of(words):
    return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_query(pointers, present, DIM: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Rows of q at `pointers` [rows], as the factors of K's parts; zeros where not present. For codes, as float16
    between -1 and 1, to be multiplied by what is returned with it; and their sums [rows]."""
    column = tl.arange(0, WIDTH)
    mask = present[:, None] & (column < COLUMNS)[None, :]
    if KIND == NUMBERS:
        whole = tl.load(pointers[:, None] + column[None, :], mask=mask, other=0.0)
        parts = (whole,)
        largest = 1.0
        sums = tl.zeros(present.shape, tl.float32)
    elif KIND == INT4:
        at = pointers[:, None] + 2 * column[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + DIM // 2, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(at + 1 + DIM // 2, mask=mask, other=0.0).to(tl.float32)
        largest = tl.max(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))))
        factor = 1 / tl.where(largest == 0, 1.0, largest)
        odd = factor / 16  # beside odd nibbles
        parts = (
            (a * factor).to(tl.float16), (b * odd).to(tl.float16), (c * factor).to(tl.float16), (d * odd).to(tl.float16)
        )  # fmt: skip
        sums = tl.sum(parts[0].to(tl.float32) + parts[2].to(tl.float32), 1)
        sums += 16 * tl.sum(parts[1].to(tl.float32) + parts[3].to(tl.float32), 1)
    else:
        at = pointers[:, None] + 2 * column[None, :]
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)))
        factor = 1 / tl.where(largest == 0, 1.0, largest)
        parts = ((a * factor).to(tl.float16), (b * factor).to(tl.float16))
        sums = tl.sum(parts[0].to(tl.float32) + parts[1].to(tl.float32), 1)
    return parts, sums, largest


@triton.jit
def codes_of(pairs, PART: tl.constexpr, KIND: tl.constexpr):
    """Byte PART of 16-bit numbers (INT4: nibble PART, the lowest first) as float16. Codes of INT8 and INT4 stay where
    they are, a subnormal float16: code · 2^-24, or code · 2^-20 for odd nibbles."""
    if KIND == FP8:
        SELECT: tl.constexpr = "0x0020" if PART == 0 else "0x0031"
        if _IN_PTX:
            codes = _two(
                "{ .reg .b32 x; .reg .b16 a, b; prmt.b32 x, $1, 0, " + SELECT
                + "; mov.b32 {a, b}, x; cvt.rn.f16x2.e4m3x2 $0, a; }", pairs,
            )  # fmt: skip
        else:
            codes = ((pairs >> (8 * PART)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        BITS: tl.constexpr = 255 if KIND == INT8 else (240 if PART % 2 else 15)
        SHIFT: tl.constexpr = 8 * (PART if KIND == INT8 else PART // 2)
        if _IN_PTX:
            MASK: tl.constexpr = "0x00ff00ff" if BITS == 255 else ("0x00f000f0" if BITS == 240 else "0x000f000f")
            if SHIFT == 0:
                codes = _two("and.b32 $0, $1, " + MASK + ";", pairs)
            elif KIND == INT8:
                codes = _two("prmt.b32 $0, $1, 0, 0x4341;", pairs)
            else:
                codes = _two("{ .reg .b32 x; shr.b32 x, $1, 8; and.b32 $0, x, " + MASK + "; }", pairs)
        else:
            codes = ((pairs >> SHIFT) & BITS).to(tl.int16).to(tl.float16, bitcast=True)
    return codes


@triton.jit
def _two(PTX: tl.constexpr, pairs):
    """Two 16-bit numbers at a time → float16."""
    return tl.inline_asm_elementwise(PTX, "=r,r", [pairs], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def attend_tile(
    query, query_sum, keys, key_scales, values, value_scales, visible, peak, total, low, high, rest, scale,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, 2018) over a tile, in powers of two.

    query and query_sum as `load_query` gives them, the rest as the other loads do; visible [rows, TILE] counts if
    MASKED. State, float32: peak [rows] (largest logit · log2 e so far), total [rows], and, for `finish`, low and high
    [rows, width] and rest [rows]; all but the peak are relative to it.
    """
    # With a softcap, tanh(x) = 1 - 2 / (exp(2x) + 1).
    factor = scale * (2 * LOG2_E / SOFTCAP if SOFTCAP > 0 else LOG2_E)
    if K_KIND == NUMBERS:
        logits = tl.dot(query[0], tl.trans(keys), input_precision="ieee") * factor
    else:
        logits = tl.dot(query[0], tl.trans(codes_of(keys, 0, K_KIND)))
        logits = tl.dot(query[1], tl.trans(codes_of(keys, 1, K_KIND)), logits)
        if K_KIND == INT4:
            logits = tl.dot(query[2], tl.trans(codes_of(keys, 2, K_KIND)), logits)
            logits = tl.dot(query[3], tl.trans(codes_of(keys, 3, K_KIND)), logits)
        if K_KIND == FP8:
            logits = logits * factor
        else:
            shift = query_sum[:, None] * (minimum_of(key_scales) * factor)[None, :]
            logits = logits * (scale_of(key_scales) * (factor * UNITS))[None, :] + shift
    if SOFTCAP > 0:
        logits = (1 - 2 / (tl.exp2(logits) + 1)) * (SOFTCAP * LOG2_E)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    highest = tl.maximum(peak, tl.max(logits, 1))
    # A row that has seen nothing yet has no peak: -inf minus -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    low = low * shrink[:, None]
    if V_KIND == NUMBERS:
        low = tl.dot(weights.to(values.dtype), values, low, input_precision="ieee")
    else:
        if V_KIND != FP8:
            rest = rest * shrink + tl.sum(weights * minimum_of(value_scales)[None, :], 1)
            weights = weights * (scale_of(value_scales) * RAISE)[None, :]
        pairs = tl.reshape(weights.to(tl.float16), (weights.shape[0], weights.shape[1] // 2, 2))
        first, second = tl.split(pairs)
        low = tl.dot(first, codes_of(values, 0, V_KIND), low)
        if V_KIND == INT4:
            high = tl.dot(first, codes_of(values, 1, V_KIND), high * shrink[:, None])
            low = tl.dot(second, codes_of(values, 2, V_KIND), low)
            high = tl.dot(second, codes_of(values, 3, V_KIND), high)
        else:
            low = tl.dot(second, codes_of(values, 1, V_KIND), low)
    return highest, total, low, high, rest


@triton.jit
def finish(low, high, rest, V_KIND: tl.constexpr):
    """The state's weighted sum of values, [rows, columns], whose dimensions `dimension_of` says."""
    if V_KIND == INT4:
        low = tl.reshape(tl.join(low, high / 16), (low.shape[0], 2 * low.shape[1]))
    if V_KIND == INT4 or V_KIND == INT8:  # noqa: PLR1714, SIM109
        low = low * (UNITS / RAISE) + rest[:, None]
    return low


@triton.jit
def dimension_of(column, DIM: tl.constexpr, V_KIND: tl.constexpr):
    """The dimensions of result columns; -1: none."""
    if V_KIND == INT4:
        dim = tl.where(column // 2 < DIM // 2, column // 2 + column % 2 * (DIM // 2), -1)
    else:
        dim = tl.where(column < DIM, column, -1)
    return dim


def padded_count(num_sequences: int) -> int:
    """The size of a kernel's vectors over sequences: a power of 4, so that few variants are compiled."""
    padded = 16
    while padded < num_sequences:
        padded *= 4
    return padded


def padded_dim(dim: int) -> int:
    """The width of a tile for rows of `dim`: a power of 2 that a product can have as its depth."""
    return max(16, int(triton.next_power_of_2(dim)))
