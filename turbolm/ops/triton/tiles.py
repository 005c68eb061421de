"""What the attention kernels share: tiles of K and V out of a paged cache, and the online softmax.

A tile is TILE consecutive positions of one sequence and one kv head. Loading K and V is one function
each, so that a cache of another format changes nothing but them.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def find_blocks(table, first, context, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block ids of positions first … first+TILE-1: one if a tile lies within a block, else [TILE]. Positions
    from `context` on are not looked up. Call it a tile ahead, so that K and V don't wait for it."""
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + first // BLOCK_SIZE, mask=first < context, other=0)
    else:
        position = first + tl.arange(0, TILE)
        block = tl.load(table + position // BLOCK_SIZE, mask=position < context, other=0)
    return block


@triton.jit
def _load(pool, block, position, valid, block_stride, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
          WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """[TILE, WIDTH] of a pool whose pointer is already at the kv head; WIDTH pads DIM with zeros. Rows that
    are not valid become zeros: what a block's unused slots hold (NaN perhaps) must not reach a dot."""
    dim = tl.arange(0, WIDTH)
    row = block.to(tl.int64) * block_stride + position % BLOCK_SIZE * DIM
    pointers = pool + row[:, None] + dim[None, :]
    if MASKED and WIDTH != DIM:
        tile = tl.load(pointers, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=valid[:, None], other=0.0)
    elif WIDTH != DIM:
        tile = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_keys(pool, block, position, valid, block_stride, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
              WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """A tile of K, [TILE, WIDTH]."""
    return _load(pool, block, position, valid, block_stride, BLOCK_SIZE, DIM, WIDTH, MASKED)


@triton.jit
def load_values(pool, block, position, valid, block_stride, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr,
                WIDTH: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """A tile of V, [TILE, WIDTH]."""
    return _load(pool, block, position, valid, block_stride, BLOCK_SIZE, DIM, WIDTH, MASKED)


@triton.jit
def attend_tile(
    query, keys, values, visible, peak, total, mixed, scale, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, 2018) over a tile, in powers of two.

    query [rows, d], keys [TILE, d], values [TILE, e]; visible [rows, TILE] counts if MASKED. State, float32:
    peak [rows] (largest logit · log2 e so far), total [rows], mixed [rows, e] (both relative to the peak).
    """
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        logits = tl.exp2(logits * (scale * (2 * LOG2_E / SOFTCAP)))
        logits = (1 - 2 / (logits + 1)) * (SOFTCAP * LOG2_E)
    else:
        logits = logits * (scale * LOG2_E)
    if MASKED:
        logits = tl.where(visible, logits, float("-inf"))
    highest = tl.maximum(peak, tl.max(logits, 1))
    # A row that has seen nothing yet has no peak: -inf minus -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision="ieee")
    return highest, total, mixed


def padded_count(num_sequences: int) -> int:
    """The size of a kernel's vectors over sequences: a power of 4, so that few variants are compiled."""
    padded = 16
    while padded < num_sequences:
        padded *= 4
    return padded


def padded_dim(dim: int) -> int:
    """The width of a tile for heads of `dim`: a power of 2 that a product can have as its depth."""
    return max(16, int(triton.next_power_of_2(dim)))
