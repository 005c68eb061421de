"""Where the draws' uniform numbers come from: a function of the request and the position in its answer."""

from __future__ import annotations

import hashlib
import os

import numpy as np
from numpy.typing import NDArray

from turbolm.types import Request

_SALT = os.urandom(16)  # makes requests without a seed differ between runs
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def stream_key(request: Request) -> int:
    """The 64 bits that a request's draws start from: of its seed and index, or of its id where it has no seed."""
    seed = request.params.seed
    key = _SALT + request.id.encode() if seed is None else str(seed).encode()
    return int.from_bytes(hashlib.blake2b(b"%b/%d" % (key, request.index), digest_size=8).digest(), "little")


def uniform(keys_r: NDArray[np.uint64], positions_r: NDArray[np.int64]) -> NDArray[np.float64]:
    """[r] numbers in [0, 1): the draw of each key's stream at this position. SplitMix64 (Steele, Lea and
    Flood 2014), of which any element can be computed without those before it."""
    with np.errstate(over="ignore"):
        z = keys_r + (positions_r.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    numbers: NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))
    return numbers


def uniform_at(key: int, position: int) -> float:
    """`uniform` of one stream."""
    z = (key + (position + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
