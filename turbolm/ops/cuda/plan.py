"""How kernels/linear.cu is laid out over a GPU for a shape: the kernel's variant, grid and shared memory.

With weights of 16 bits the kernel is bound by memory, so nearly any layout that keeps enough bytes in flight comes
close. Others must be unpacked, which takes warps about as long as memory takes: there, the units that each warp has
in turn decide. The estimates below weigh what sets layouts apart. Rates are an H200's; only their ratios matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import IntEnum

MAX_TOKENS = 64
X_BUFFERS = 3  # slices of x in shared memory where not all fit
PREFETCH_BYTES = 64 << 10  # of weights per CTA that are brought into L2 before the kernel waits for x
MAX_SPLITS = 16

_SUM_ROW = 20  # floats per token in what warps exchange: 16 and padding
_RESERVED_SHARED = 1024  # bytes per CTA that the system takes

# Microseconds and bytes, of one SM where not said otherwise.
_HBM = 34_500.0
_L2 = 42_000.0
_SHARED = 217_000.0
_LATENCY = 1.0  # of memory under load
_ONE_READER = 100_000.0  # what one CTA reads from L2
_LATE_START = 1.0  # of a kernel that can't share SMs with the one before
_PASS = 0.05  # of adding up over warps
_IMBALANCE = 0.15  # of the time that a CTA works longer than the mean

# The same of weights that are unpacked, fitted to the times of 233 layouts (docs/log.md; rms 6%).
_STREAM = 50_000.0  # what a CTA reads in pieces of its ring
_UNIT = 0.16  # a warp's unit, by 8 tokens
_UNPACKED_PASS = 0.25  # of 8 tokens
_X = 25_000.0  # what a CTA copies of x before it begins
_PART = 0.15  # what another part costs its consumer


class Output(IntEnum):
    """What the kernel writes; the numbers are the kernel's."""

    PARTS = 0  # [p, t, n] float32, to be summed
    ELEMENTS = 1  # [t, n] in the dtype of x
    FLOATS = 2  # [t, n] float32
    GATED = 3  # [t, n / 2]: activation(first half) * second half, in the dtype of x


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that a warp copies and multiplies at once: 16 rows of w by `k` columns."""

    k: int
    num_bytes: int
    weights: int = 0  # the kernel's number of the layout
    groups: int = 0  # of k with a scale each

    @property
    def is_dense(self) -> bool:
        """Whether weights are of the dtype of x."""
        return self.weights == 0


DENSE, INT8, FP8 = Unit(64, 2048), Unit(128, 2048, 2), Unit(128, 2048, 3)
#: Units of 4 bits by columns that share a scale (larger groups are whole units).
INT4 = {128 // groups: Unit(128, 1024 + 64 * groups, 1, groups) for groups in (1, 2, 4)}


@dataclass(frozen=True, slots=True)
class Tile:
    """A variant of the kernel: warps_m * tiles_m row tiles at once, each shared by warps_k warps."""

    tokens: int  # of x, rounded up
    warps_m: int
    warps_k: int
    tiles_m: int  # row tiles per warp
    depth: int  # units in flight per warp and row tile
    unit: Unit = DENSE

    @property
    def num_threads(self) -> int:
        return 32 * self.warps_m * self.warps_k

    @property
    def min_ctas(self) -> int:
        """That an SM's registers must hold: 128 per thread."""
        return 512 // self.num_threads

    @property
    def pass_tiles(self) -> int:
        return self.warps_m * self.tiles_m

    @property
    def slice_units(self) -> int:
        return self.warps_k * self.depth

    @property
    def ring_bytes(self) -> int:
        return self.warps_m * self.warps_k * self.tiles_m * self.depth * self.unit.num_bytes

    @property
    def sum_bytes(self) -> int:
        return 2 * self.pass_tiles * self.warps_k * self.tokens * _SUM_ROW * 4 if self.warps_k > 1 else 0


#: Where a slower variant is never chosen on a GPU with much shared memory, it is there for those with little.
TILES = tuple(
    Tile(*sizes)
    for sizes in (
        *((8, 1, 8, 1, 4), (8, 2, 4, 1, 4), (8, 4, 2, 1, 4)),
        *((16, 1, 8, 1, 4), (16, 2, 4, 1, 4), (16, 4, 2, 1, 4), (16, 8, 1, 1, 4)),
        *((32, 2, 4, 1, 4), (32, 4, 2, 1, 4), (32, 8, 1, 1, 4), (32, 8, 1, 1, 2)),
        *((64, 8, 1, 1, 4), (64, 8, 1, 1, 2), (64, 8, 1, 2, 2), (64, 7, 1, 2, 2)),
    )
)


#: Variants for units of 4 bits. A warp reads x from shared memory once for all its row tiles: there are more of those.
INT4_TILES = tuple(
    Tile(*sizes)
    for sizes in (
        *((8, m, 8 // m, 2, depth) for m in (1, 2, 4) for depth in (2, 4)),
        *((8, 2, 4, 1, 4), (8, 4, 2, 1, 4), (8, 1, 8, 1, 4)),
        *((16, m, 8 // m, 2, depth) for m in (1, 2, 4) for depth in (2, 4)),
        *((16, 2, 4, 1, 4), (16, 4, 2, 1, 4), (16, 8, 1, 1, 4)),
        *((32, 2, 4, 2, 4), (32, 4, 2, 2, 3), (32, 4, 2, 2, 4), (32, 4, 2, 1, 4), (32, 8, 1, 1, 4), (32, 8, 1, 1, 2)),
        *((64, 4, 2, 1, 4), (64, 8, 1, 1, 4), (64, 8, 1, 1, 2)),
    )
)


#: Variants for units of 8 bits, beside `TILES`: more warps, as those unpack.
EIGHT_BIT_TILES = tuple(
    Tile(*sizes)
    for sizes in (
        *((8, m, 16 // m, 1, depth) for m in (1, 2, 4) for depth in (2, 4)),
        *((8, m, 8 // m, 2, 2) for m in (1, 2, 4)),
        *((16, m, 16 // m, 1, 2) for m in (1, 2, 4)),
    )
)


def tiles_of(unit: Unit) -> tuple[Tile, ...]:
    """The variants for a kind of weights."""
    if unit.is_dense:
        return TILES
    return tuple(replace(tile, unit=unit) for tile in (INT4_TILES if unit.groups else (*TILES, *EIGHT_BIT_TILES)))


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a plan needs to know of a GPU. Shared memory in bytes."""

    num_sms: int
    shared_per_cta: int
    shared_per_sm: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch. CTA (g, s) computes the g-th share of the row tiles over the s-th share of the units of k;
    the first shares are one larger where they can't be equal."""

    tile: Tile
    groups: int
    splits: int
    num_tiles: int  # of 16 rows of w (gated: 8 and 8)
    num_units: int  # of k
    resident: bool  # whether shared memory holds a CTA's whole part of x
    prefetch_bytes: int = PREFETCH_BYTES
    alone: bool = False  # whether a CTA asks for more than half of an SM's shared memory, see `needs_sm`

    @property
    def cta_tiles(self) -> int:
        """At most."""
        return -(-self.num_tiles // self.groups)

    @property
    def cta_units(self) -> int:
        """At most."""
        return -(-self.num_units // self.splits)

    @property
    def cta_bytes(self) -> int:
        """Of weights, at most."""
        return self.cta_tiles * self.cta_units * self.tile.unit.num_bytes

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return self.num_tiles * self.num_units * self.tile.unit.num_bytes

    @property
    def passes(self) -> int:
        return -(-self.cta_tiles // self.tile.pass_tiles)

    @property
    def prefetch(self) -> tuple[int, int, int, int]:
        """(first row tile of a CTA, row tiles, first unit of each, units): what follows the first in flight."""
        unit_bytes = self.tile.unit.num_bytes
        if self.cta_units > self.tile.slice_units:
            tiles = min(self.cta_tiles, self.tile.pass_tiles)
            units = min(self.cta_units - self.tile.slice_units, self.prefetch_bytes // (tiles * unit_bytes))
            return 0, tiles, self.tile.slice_units, units
        left = max(0, self.cta_tiles - self.tile.pass_tiles)
        tiles = min(left, self.prefetch_bytes // (self.cta_units * unit_bytes))
        return self.tile.pass_tiles, tiles, 0, self.cta_units

    @property
    def x_bytes(self) -> int:
        units = self.cta_units if self.resident else X_BUFFERS * self.tile.slice_units
        return units * self.tile.tokens * self.tile.unit.k * 2

    @property
    def shared_bytes(self) -> int:
        return self.tile.ring_bytes + self.x_bytes + self.tile.sum_bytes

    def asked_bytes(self, gpu: Gpu) -> int:
        """Of shared memory, at the launch."""
        return max(self.shared_bytes, gpu.shared_per_sm // 2) if self.alone else self.shared_bytes

    def shares_sm(self, gpu: Gpu) -> bool:
        """Whether an SM has room for two CTAs: then the next kernel's may start before this one's ends."""
        return 2 * (self.shared_bytes + _RESERVED_SHARED) <= gpu.shared_per_sm


def needs_sm(num_ctas: int, gpu: Gpu) -> bool:
    """Whether CTAs of a kernel that starts beside the one before it must have an SM each.

    Where an SM has room for two, those SMs that the kernel before left free get two of this one's, which then take
    longest (7B qkv in 4 bits, 128 CTAs, one row: 15.3 µs; 12.0 apart; 11.1 with an SM each). None are left free if the
    CTAs are as many as SMs.
    """
    return num_ctas % gpu.num_sms != 0


def estimate(plan: Plan, output: Output, gpu: Gpu) -> float:
    """Microseconds."""
    return _estimate_dense(plan, output, gpu) if plan.tile.unit.is_dense else _estimate_unpacked(plan, gpu)


def _estimate_unpacked(plan: Plan, gpu: Gpu) -> float:
    tile = plan.tile
    blocks = tile.tokens // 8
    units = plan.passes * tile.tiles_m * -(-plan.cta_units // tile.warps_k)
    x_bytes = plan.cta_units * tile.tokens * tile.unit.k * 2 * (1 if plan.resident else plan.passes)
    work = plan.cta_bytes / _STREAM + units * blocks * _UNIT
    return (
        max(work, plan.num_bytes / (_HBM * gpu.num_sms))
        + x_bytes / _X
        + plan.passes * blocks * _UNPACKED_PASS
        + plan.splits * _PART
    )


def _estimate_dense(plan: Plan, output: Output, gpu: Gpu) -> float:
    tile, unit, grid = plan.tile, plan.tile.unit, plan.groups * plan.splits
    features = plan.num_tiles * (8 if output is Output.GATED else 16)
    x_unit = tile.tokens * unit.k * 2
    parts = plan.splits if output is Output.PARTS else 0
    x_reads = grid * plan.cta_units * x_unit * (1 if plan.resident else plan.passes)
    results = tile.tokens * features * (4 * parts or 2)
    used = min(plan.cta_tiles, tile.pass_tiles) / tile.pass_tiles
    used *= min(1.0, plan.cta_units / tile.slice_units)
    bandwidth = max(
        plan.num_bytes / (_HBM * gpu.num_sms),
        plan.cta_bytes / (used * tile.ring_bytes) * _LATENCY,
        (plan.num_bytes + x_reads + results) / (_L2 * gpu.num_sms),
        plan.cta_bytes * (2 + x_unit / (unit.num_bytes * tile.tiles_m)) / _SHARED,
    )
    return (
        bandwidth * (1 + _IMBALANCE * (plan.cta_bytes * grid / plan.num_bytes - 1))
        + plan.x_bytes / _ONE_READER
        + parts * features * 4 / _ONE_READER
        + (0.0 if plan.shares_sm(gpu) else _LATE_START)
        + (plan.passes * _PASS if tile.warps_k > 1 else 0.0)
    )


@functools.cache
def plan_linear(num_tokens: int, n: int, k: int, output: Output, gpu: Gpu, unit: Unit = DENSE) -> Plan | None:
    """The best layout for x [num_tokens, k] and w [n, k]; None where the kernel doesn't run.

    Output.PARTS may come back with one split: then the kernel writes Output.ELEMENTS.
    """
    if not supports_shape(num_tokens, n, k, unit):
        return None
    variants = tiles_of(unit)
    tokens = next(tile.tokens for tile in variants if tile.tokens >= num_tokens)
    num_tiles = -(-n // 16) if output is not Output.GATED else -(-(n // 2) // 8)
    num_units = k // unit.k
    max_splits = min(MAX_SPLITS, num_units, gpu.num_sms) if output is Output.PARTS else 1
    plans = []
    for tile in (tile for tile in variants if tile.tokens == tokens):
        for splits in range(1, max_splits + 1):
            cta_tiles = -(-num_tiles // min(num_tiles, gpu.num_sms // splits))
            groups = -(-num_tiles // cta_tiles)
            alone = needs_sm(groups * splits, gpu)
            plans.append(Plan(tile, groups, splits, num_tiles, num_units, resident=True, alone=alone))
            if plans[-1].cta_units > X_BUFFERS * tile.slice_units:
                plans.append(replace(plans[-1], resident=False))
    fitting = [plan for plan in plans if plan.shared_bytes <= gpu.shared_per_cta]
    # Of equals, the one with the most in flight: much of that is there before x is.
    return min(fitting, key=lambda plan: (estimate(plan, output, gpu), -plan.tile.ring_bytes), default=None)


def supports_shape(num_tokens: int, n: int, k: int, unit: Unit = DENSE) -> bool:
    """k in whole units; of 4 bits, n in whole tiles; offsets within a matrix in 31 bits."""
    whole_tiles = not unit.groups or n % 16 == 0
    return (
        1 <= num_tokens <= MAX_TOKENS and n >= 2 and whole_tiles and k >= unit.k and k % unit.k == 0 and n * k < 1 << 31
    )
