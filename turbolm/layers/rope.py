"""Rotary position embedding: the rotation angles of every scaling that checkpoints name.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); dynamic NTK as in
transformers; YaRN (2309.00071); Llama 3.1's frequency-dependent scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turbolm.ops import RopeTable


@dataclass(frozen=True, slots=True)
class Linear:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNtk:
    """A base that grows with the context beyond `original_context`. The longest context that the
    engine allows decides it once, so that cached keys of all requests agree."""

    factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, the ones between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """NTK-by-parts with an attention factor on cos and sin."""

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Factors:
    """A divisor per frequency, as GGUF files carry it."""

    tensor: str  # name of the float32 [rotary_dim / 2] tensor


Scaling = Linear | DynamicNtk | Llama3 | Yarn | Factors


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One layer's rotation."""

    rotary_dim: int  # leading dimensions of a head that rotate
    theta: float
    scaling: Scaling | None = None
    interleaved: bool = False
    factors: tuple[float, ...] = field(default=())  # the values that `Factors` names, once read


def rope_table(spec: RopeSpec, max_context: int, device: torch.device) -> RopeTable:
    """cos and sin for positions 0 .. max_context-1, float32 (angles computed in float64)."""
    inverse, scale = _inverse_frequencies(spec, max_context)
    angles = torch.outer(torch.arange(max_context, dtype=torch.float64), inverse)
    cos, sin = (angles.cos() * scale).float(), (angles.sin() * scale).float()
    return RopeTable(cos.to(device).contiguous(), sin.to(device).contiguous(), spec.interleaved)


def _inverse_frequencies(spec: RopeSpec, max_context: int) -> tuple[Tensor, float]:
    """(radians per position for each pair of dimensions, factor on cos and sin)."""
    dim, scaling = spec.rotary_dim, spec.scaling
    theta = spec.theta
    if isinstance(scaling, DynamicNtk) and max_context > scaling.original_context:
        stretch = scaling.factor * max_context / scaling.original_context - (scaling.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if isinstance(scaling, Linear):
        return inverse / scaling.factor, 1.0
    if isinstance(scaling, Llama3):
        return _llama3(inverse, scaling), 1.0
    if isinstance(scaling, Yarn):
        return _yarn(inverse, spec.theta, dim, scaling), scaling.attention_factor
    if isinstance(scaling, Factors):
        return inverse / torch.tensor(spec.factors, dtype=torch.float64), 1.0
    return inverse, 1.0


def _llama3(inverse: Tensor, scaling: Llama3) -> Tensor:
    wavelength = 2 * math.pi / inverse
    blend = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blend = blend.clamp(0, 1)  # 0: divided by factor, 1: kept
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def _yarn(inverse: Tensor, theta: float, dim: int, scaling: Yarn) -> Tensor:
    def dimension(rotations: float) -> float:
        """The pair that turns `rotations` times within the original context."""
        return dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return inverse / scaling.factor * interpolated + inverse * (1 - interpolated)
