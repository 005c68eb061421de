"""GGUF block formats: the table of ggml's types, and the formats with blocks of 32 weights.

A row is a sequence of blocks; a block is packed integers with their scales (layouts: ggml-common.h
of ggml). Matrices stay packed, as uint8 [n, bytes per row].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from turbolm.quant.rows import RowFormat
from turbolm.weights import Weight


class GgmlType(NamedTuple):
    """How ggml stores elements: `block_size` of them in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


#: Every type id that a GGUF file may hold, whether turbolm computes with it or not (9 and 15, Q8_1 and
#: Q8_K, exist only while ggml computes).
GGML_TYPES: Mapping[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
    40: GgmlType("NVFP4", 64, 36),
    41: GgmlType("Q1_0", 128, 18),
}

_CHUNK_ELEMENTS = 1 << 18  # unpacked at a time, so that the temporaries stay within a few megabytes

#: The 16 levels of IQ4_NL and IQ4_XS.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockFormat(RowFormat):
    """One of ggml's packed types; `unpack` maps blocks uint8 [b, block bytes] to float32
    [b, block size], with the operations in ggml's order, so that the values are exactly ggml's."""

    is_dense = False
    storage_dtype = torch.uint8

    def __init__(self, type_id: int, unpack: Callable[[Tensor], Tensor]) -> None:
        ggml_type = GGML_TYPES[type_id]
        self.name = ggml_type.name.lower()
        self.block_size = ggml_type.block_size
        self.block_width = ggml_type.block_bytes
        self.unpack = unpack

    def dequantize(self, weight: Weight, dtype: torch.dtype) -> Tensor:
        """[n, k]: ggml's float32 values, rounded to `dtype`."""
        n, k = weight.shape
        data = weight.tensors["data"]
        result_nk = torch.empty((n, k), dtype=dtype, device=data.device)
        rows = max(1, _CHUNK_ELEMENTS // max(k, 1))
        for start in range(0, n, rows):
            blocks = data[start : start + rows].reshape(-1, self.block_width)
            result_nk[start : start + rows] = self.unpack(blocks).reshape(-1, k)
        return result_nk


def read_float16(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at this byte of every block → float32 [b, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def split_bits(bytes_bgw: Tensor, bits: int) -> Tensor:
    """Groups of w bytes [b, g, w] → [b, g * 8 / bits, w]: all lowest `bits` bits of a group, then
    the next ones, and so on (the order of K-quants and of nibbles)."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=bytes_bgw.device)
    parts = (bytes_bgw.unsqueeze(2) >> shifts.view(1, 1, -1, 1)) & ((1 << bits) - 1)
    return parts.flatten(1, 2)


def look_up_iq4(indices: Tensor) -> Tensor:
    """4-bit indices of any shape → float32 levels."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=indices.device)
    return levels[indices.long()]


def _nibbles(blocks: Tensor, offset: int) -> Tensor:
    """16 bytes → [b, 32]: low nibbles, then high ones."""
    return split_bits(blocks[:, None, offset : offset + 16], 4).flatten(1)


def _fifth_bits(blocks: Tensor, offset: int) -> Tensor:
    """4 bytes, one bit per weight → [b, 32], as bit 4."""
    return split_bits(blocks[:, offset : offset + 4, None], 1).flatten(1) << 4


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    return read_float16(blocks, 0) * (_nibbles(blocks, 2).float() - 8)


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    return read_float16(blocks, 0) * _nibbles(blocks, 4).float() + read_float16(blocks, 2)


def _unpack_q5_0(blocks: Tensor) -> Tensor:
    return read_float16(blocks, 0) * ((_nibbles(blocks, 6) | _fifth_bits(blocks, 2)).float() - 16)


def _unpack_q5_1(blocks: Tensor) -> Tensor:
    q = (_nibbles(blocks, 8) | _fifth_bits(blocks, 4)).float()
    return read_float16(blocks, 0) * q + read_float16(blocks, 2)


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    return read_float16(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _unpack_iq4_nl(blocks: Tensor) -> Tensor:
    return read_float16(blocks, 0) * look_up_iq4(_nibbles(blocks, 2))


Q4_0 = BlockFormat(2, _unpack_q4_0)
Q4_1 = BlockFormat(3, _unpack_q4_1)
Q5_0 = BlockFormat(6, _unpack_q5_0)
Q5_1 = BlockFormat(7, _unpack_q5_1)
Q8_0 = BlockFormat(8, _unpack_q8_0)
IQ4_NL = BlockFormat(20, _unpack_iq4_nl)
