"""GGUF formats with super-blocks of 256 weights: the K-quants, and IQ4_XS.

A super-block has a float16 scale (and, for some, a float16 minimum) that small integers, one per 16
or 32 weights, multiply.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.quant.gguf_blocks import BlockFormat, look_up_iq4, read_float16, split_bits


def _unpack_q2_k(blocks: Tensor) -> Tensor:
    """Bytes: 16 of (4-bit scale, 4-bit minimum), 64 of 2-bit weights, scale, minimum."""
    packed = blocks[:, :16]
    scale = (read_float16(blocks, 80) * (packed & 15).float()).unsqueeze(2)
    minimum = (read_float16(blocks, 82) * (packed >> 4).float()).unsqueeze(2)
    q = split_bits(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return (scale * q.float() - minimum).flatten(1)


def _unpack_q3_k(blocks: Tensor) -> Tensor:
    """Bytes: 32 of high bits, 64 of 2-bit weights, 12 of 6-bit scales, scale."""
    low = split_bits(blocks[:, None, 96:104], 4).reshape(-1, 16)
    high = split_bits(blocks[:, None, 104:108], 2).reshape(-1, 16)
    scale = read_float16(blocks, 108) * ((low | high << 4).float() - 32)
    q = split_bits(blocks[:, 32:96].reshape(-1, 2, 32), 2)
    is_high = split_bits(blocks[:, None, :32], 1)
    values = (q | is_high << 2).float() - 4  # a clear high bit takes 4 away
    return (scale.unsqueeze(2) * values.reshape(-1, 16, 16)).flatten(1)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's header: two float16, then 12 bytes with eight 6-bit scales and eight 6-bit
    minima → float32 [b, 8, 1] each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1)
    minimum = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1)
    return (
        (read_float16(blocks, 0) * scale.float()).unsqueeze(2),
        (read_float16(blocks, 2) * minimum.float()).unsqueeze(2),
    )


def _unpack_q4_k(blocks: Tensor) -> Tensor:
    """Bytes: 16 of header, 128 of 4-bit weights."""
    scale, minimum = _scales_and_minima(blocks)
    q = split_bits(blocks[:, 16:].reshape(-1, 4, 32), 4)
    return (scale * q.float() - minimum).flatten(1)


def _unpack_q5_k(blocks: Tensor) -> Tensor:
    """Bytes: 16 of header, 32 of high bits, 128 of low 4 bits."""
    scale, minimum = _scales_and_minima(blocks)
    high = split_bits(blocks[:, None, 16:48], 1)
    q = split_bits(blocks[:, 48:].reshape(-1, 4, 32), 4) | high << 4
    return (scale * q.float() - minimum).flatten(1)


def _unpack_q6_k(blocks: Tensor) -> Tensor:
    """Bytes: 128 of low 4 bits, 64 of high 2 bits, 16 of 8-bit scales, scale."""
    scale = read_float16(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    low = split_bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = split_bits(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    values = (low | high << 4).float() - 32
    return (scale.unsqueeze(2) * values.reshape(-1, 16, 16)).flatten(1)


def _unpack_iq4_xs(blocks: Tensor) -> Tensor:
    """Bytes: scale, 2 of high 2 bits of the scales, 4 of their low 4 bits, 128 of 4-bit indices."""
    high = split_bits(blocks[:, 2:4, None], 2).flatten(1)
    low = split_bits(blocks[:, 4:8, None], 4).flatten(1)
    scale = read_float16(blocks, 0) * ((low | high << 4).float() - 32)
    levels = look_up_iq4(split_bits(blocks[:, 8:].reshape(-1, 8, 16), 4))
    return (scale.unsqueeze(2) * levels.reshape(-1, 8, 32)).flatten(1)


Q2_K = BlockFormat(10, _unpack_q2_k)
Q3_K = BlockFormat(11, _unpack_q3_k)
Q4_K = BlockFormat(12, _unpack_q4_k)
Q5_K = BlockFormat(13, _unpack_q5_k)
Q6_K = BlockFormat(14, _unpack_q6_k)
IQ4_XS = BlockFormat(23, _unpack_iq4_xs)
