"""A text as one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turbolm.errors import EngineError, RequestError


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    vector: NDArray[np.float32]  # [hidden size], or fewer dimensions where so many were asked for
    num_tokens: int

    @classmethod
    def of(cls, pooled: bytes, num_tokens: int, dimensions: int | None, normalize: bool) -> Embedding:
        """`pooled`: as in `Output`. Its leading `dimensions` (None: all), scaled to length 1 if `normalize`. Raises
        RequestError where there are fewer, EngineError for numbers that are none."""
        vector = np.frombuffer(pooled, "<f4").astype(np.float32)
        if dimensions is not None:
            if type(dimensions) is not int or not 1 <= dimensions <= len(vector):
                raise RequestError(f"dimensions must be from 1 to {len(vector)}, got {dimensions!r}", "dimensions")
            vector = vector[:dimensions]
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not math.isfinite(length):
            raise EngineError("the model's hidden states are not finite: there is no embedding of this text")
        return cls(vector / np.float32(length) if normalize and length else vector, num_tokens)
