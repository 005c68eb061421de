"""4-bit codes, two to a byte: the low nibble is the even column."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, k/2] → uint8 [n, k]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [n, k] of 0..15 → uint8 [n, k/2]."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def bytes_of_words(words: Tensor) -> Tensor:
    """int32 [n, c] → uint8 [n, 4c], lowest byte first: eight nibbles of a word are eight columns."""
    return words.contiguous().flatten().view(torch.uint8).view(words.shape[0], -1)


def words_of_bytes(packed: Tensor) -> Tensor:
    """uint8 [n, 4c] → int32 [n, c]."""
    return packed.contiguous().flatten().view(torch.int32).view(packed.shape[0], -1)
