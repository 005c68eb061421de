"""Super-blocks written out by hand, from the formats' description."""

from __future__ import annotations

import struct

import torch

from turbolm.quant import gguf_k


def test_q2_k_block_by_hand() -> None:
    scales = [(5 * i) % 16 for i in range(16)]
    minima = [(3 * i + 1) % 16 for i in range(16)]
    weights = [(i // 3) % 4 for i in range(256)]
    low = [0] * 64
    for i, weight in enumerate(weights):
        half, within = divmod(i, 128)
        low[32 * half + within % 32] |= weight << 2 * (within // 32)
    factors = [scale | minimum << 4 for scale, minimum in zip(scales, minima, strict=True)]
    block = struct.pack("<16B64B2e", *factors, *low, 0.5, 0.25)
    expected = [0.5 * scales[i // 16] * weights[i] - 0.25 * minima[i // 16] for i in range(256)]
    weight = gguf_k.Q2_K.pack(torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(1, -1), (1, 256))
    assert weight.dequantize(torch.float32)[0].tolist() == expected


def test_q3_k_block_by_hand() -> None:
    scales = [(11 * i) % 64 for i in range(16)]  # less 32
    weights = [(5 * i) % 8 for i in range(256)]  # less 4
    low, high = [0] * 64, [0] * 32
    for i, weight in enumerate(weights):
        half, within = divmod(i, 128)
        low[32 * half + within % 32] |= (weight & 3) << 2 * (within // 32)
        high[i % 32] |= (weight >> 2) << i // 32
    packed = [scales[i] & 15 | (scales[i + 8] & 15) << 4 for i in range(8)]
    packed += [sum((scales[i + 4 * j] >> 4) << 2 * j for j in range(4)) for i in range(4)]
    block = struct.pack("<32B64B12Be", *high, *low, *packed, 0.125)
    expected = [0.125 * (scales[i // 16] - 32) * (weights[i] - 4) for i in range(256)]
    weight = gguf_k.Q3_K.pack(torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(1, -1), (1, 256))
    assert weight.dequantize(torch.float32)[0].tolist() == expected


def test_q4_k_block_by_hand() -> None:
    scales = [1, 2, 3, 4, 33, 34, 35, 63]  # six bits; the last four use the split encoding
    minima = [0, 5, 6, 7, 8, 40, 50, 62]
    packed = [scales[i] | (scales[i + 4] >> 4) << 6 for i in range(4)]
    packed += [minima[i] | (minima[i + 4] >> 4) << 6 for i in range(4)]
    packed += [(scales[i + 4] & 15) | (minima[i + 4] & 15) << 4 for i in range(4)]
    weights = [(3 * i) % 16 for i in range(256)]
    nibbles = [weights[64 * g + i] | weights[64 * g + 32 + i] << 4 for g in range(4) for i in range(32)]
    block = struct.pack("<2e12B128B", 0.5, 0.25, *packed, *nibbles)
    expected = [0.5 * scales[i // 32] * weights[i] - 0.25 * minima[i // 32] for i in range(256)]
    weight = gguf_k.Q4_K.pack(torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(1, -1), (1, 256))
    assert weight.dequantize(torch.float32)[0].tolist() == expected


def test_q6_k_block_by_hand() -> None:
    scales = [-128, 127, *range(14)]
    weights = [(7 * i) % 64 for i in range(256)]
    low, high = [0] * 128, [0] * 64
    for i, weight in enumerate(weights):
        half, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        low[half * 64 + (quarter % 2) * 32 + column] |= (weight & 15) << 4 * (quarter // 2)
        high[half * 32 + column] |= (weight >> 4) << 2 * quarter
    block = struct.pack("<128B64B16be", *low, *high, *scales, 0.125)
    expected = [0.125 * scales[i // 16] * (weights[i] - 32) for i in range(256)]
    packed = gguf_k.Q6_K.pack(torch.frombuffer(bytearray(block), dtype=torch.uint8).reshape(1, -1), (1, 256))
    assert packed.dequantize(torch.float32)[0].tolist() == expected
