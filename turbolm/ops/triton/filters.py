"""Top-k, top-p and min-p without a sort: where does the part of a row that they keep begin?

    r  rows    v  vocabulary    g  groups of a row

Logits above a border are kept; the border is the smallest t for which fewer than k logits, or logits of
less than p of the mass, lie above t. Both measures fall as t grows, so t is found by trying several t at
once, again and again. That is cheap over a short list, and a histogram says which logits can matter: a
group's tokens are counted by their distance from its maximum in quarters of a nat; from the counts of
all groups follow a lower bound of the border, how many tokens lie above the bound, and where each group
puts its own in the list. A row with too many of them (nearly flat), or whose logits / T are too large for
float32 to tell bins apart, is searched as a whole.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.launch import await_inputs, pdl_options

GROUP = tl.constexpr(1024)  # tokens
BINS = tl.constexpr(64)  # of a histogram; the last counts everything further away
CAPACITY = tl.constexpr(8192)  # candidates per row
ALL_KEYS = tl.constexpr(-(2**31))  # below every key

_BINS_PER_NAT = tl.constexpr(4)
_FARTHEST_BIN = tl.constexpr(1e9)  # bins beyond are this one; the difference of two still fits int32
_FARTHEST_TOP = tl.constexpr(2.0**19)  # up to here a bin's border is right to an eighth of it
_TILE = tl.constexpr(2048)
_NUM_PIVOTS = tl.constexpr(8)


@triton.jit
def key_of(x):
    """int32 in the order of float32; the zeros are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_of(temperature):
    return 1.0 / tl.maximum(temperature, 1e-30)


@triton.jit
def bin_of(x, inverse):
    """int32; never falls where x grows."""
    scaled = tl.floor(x * (inverse * _BINS_PER_NAT))
    return tl.minimum(tl.maximum(scaled, -_FARTHEST_BIN), _FARTHEST_BIN).to(tl.int32)


@triton.jit
def filters_of(top_k, top_p, min_p, row, vocab_size):
    """A row's top-k (0: all), top-p, min-p, and whether there is any."""
    k = tl.load(top_k + row)
    k = tl.where(k < vocab_size, k, 0).to(tl.int32)
    p = tl.load(top_p + row)
    m = tl.load(min_p + row)
    return k, p, m, (k > 0) | (p < 1) | (m > 0)


@triton.jit
def _bound_kernel(
    temperature, top_k, top_p, min_p, maxima, sums, histograms, bounds, starts, num_candidates,
    vocab_size, num_groups, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """→ bounds [r], the lowest bin of candidates; num_candidates [r] (-1: not listed); starts [r, g], the place
    of each group's first candidate in the list."""
    row = tl.program_id(0)
    await_inputs(PDL)
    found = -1
    t = tl.load(temperature + row)
    k, p, m, has_any = filters_of(top_k, top_p, min_p, row, vocab_size)
    if (t > 0) & has_any:
        inverse = inverse_of(t)
        group = tl.arange(0, GROUPS)
        place = row * num_groups + group
        is_group = group < num_groups
        tops = tl.load(maxima + place, mask=is_group, other=float("-inf"))
        top = tl.max(tops, 0)
        # Tokens by distance from the row's maximum: a group's counts, moved by its own maximum's distance.
        distance = tl.arange(0, BINS)
        local = distance[None, :] - (bin_of(top, inverse) - bin_of(tops, inverse))[:, None]
        is_counted = is_group[:, None] & (local >= 0) & (local < BINS) & (distance < BINS - 1)[None, :]
        counts = tl.load(histograms + place.to(tl.int64)[:, None] * BINS + local, mask=is_counted, other=0)
        near = tl.sum(counts, 0)
        far = vocab_size - tl.sum(near, 0)
        reach = BINS + 0
        if k > 0:
            reach = tl.sum((tl.cumsum(near, 0) < k).to(tl.int32), 0)
        elif p < 1:
            masses = tl.load(sums + place, mask=is_group, other=0.0)
            mass = tl.sum(tl.where(tops == float("-inf"), 0.0, masses * tl.exp((tops - top) * inverse)), 0)
            # At distance d a weight is below exp((1 - d) / bins per nat), but for the borders' rounding.
            weight = tl.exp((1 - distance).to(tl.float32) / _BINS_PER_NAT)
            most = tl.where(distance < BINS - 1, near, far).to(tl.float32) * weight
            beyond = tl.sum(tl.where(distance[None, :] > distance[:, None], most[None, :], 0.0), 1)
            reach = tl.sum((beyond > 0.9 * (1 - p) * mass).to(tl.int32), 0)
        if (m > 0) & ((k == 0) | (p == 1)):  # top-p after top-k is a part of all that top-k left
            reach = tl.minimum(reach, (-tl.log(m) * _BINS_PER_NAT).to(tl.int32) + 2)
        reach = tl.where(tl.abs(top) * (inverse * _BINS_PER_NAT) < _FARTHEST_TOP, reach, BINS)
        own = tl.sum(tl.where((distance <= reach)[None, :], counts, 0), 1)
        size = tl.sum(own, 0)
        tl.store(starts + place, tl.cumsum(own, 0) - own, mask=is_group)
        tl.store(bounds + row, bin_of(top, inverse) - reach)
        found = tl.where((reach < BINS - 1) & (size <= CAPACITY), size, -1)
    tl.store(num_candidates + row, found)


@triton.jit
def _collect_kernel(
    logits, temperature, maxima, bounds, starts, num_candidates, values, ids, row_stride, vocab_size, num_groups,
    PDL: tl.constexpr,
):  # fmt: skip
    """logits [r, v] → values and ids [r, CAPACITY] of candidates, in the order of their ids; a group per program."""
    row = tl.program_id(1)
    group = tl.program_id(0)
    place = row * num_groups + group
    await_inputs(PDL)
    if tl.load(num_candidates + row) >= 0:
        inverse = inverse_of(tl.load(temperature + row))
        bound = tl.load(bounds + row)
        if bin_of(tl.load(maxima + place), inverse) >= bound:
            token = group * GROUP + tl.arange(0, GROUP)
            inside = token < vocab_size
            x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=inside, other=float("-inf"))
            is_candidate = inside & (bin_of(x, inverse) >= bound)
            at = tl.load(starts + place) + tl.cumsum(is_candidate.to(tl.int32), 0) - 1
            is_candidate &= at < CAPACITY
            tl.store(values + row * CAPACITY + at, x, mask=is_candidate)
            tl.store(ids + row * CAPACITY + at, token, mask=is_candidate)


def candidates(
    logits_rv: Tensor,
    temperature_r: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    min_p_r: Tensor,
    maxima_rg: Tensor,
    sums_rg: Tensor,
    histograms_rgb: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [r, CAPACITY] float32, ids [r, CAPACITY] int32, how many [r] int32) of tokens that the filters may
    keep, and some more, by rising id; -1 where a row has no filters or too many candidates."""
    num_rows, vocab_size = logits_rv.shape
    num_groups = maxima_rg.shape[1]
    values = logits_rv.new_empty(num_rows, CAPACITY.value)
    ids = torch.empty_like(values, dtype=torch.int32)
    starts = torch.empty_like(maxima_rg, dtype=torch.int32)
    bounds, num_candidates = ids.new_empty(2, num_rows)
    options = pdl_options(logits_rv.device)
    _bound_kernel[(num_rows,)](
        temperature_r, top_k_r, top_p_r, min_p_r, maxima_rg, sums_rg, histograms_rgb, bounds, starts, num_candidates,
        vocab_size, num_groups, GROUPS=triton.next_power_of_2(num_groups), num_warps=8, **options,
    )  # fmt: skip
    _collect_kernel[(num_groups, num_rows)](
        logits_rv, temperature_r, maxima_rg, bounds, starts, num_candidates, values, ids,
        logits_rv.stride(0), vocab_size, num_groups, num_warps=4, **options,
    )  # fmt: skip
    return values, ids, num_candidates


@triton.jit
def _totals(x_list, size, top, inverse):
    """The mass of a list of logits, and the smallest key."""
    position = tl.arange(0, _TILE)
    mass = tl.zeros((), tl.float32)
    least = key_of(top)
    for start in range(0, size, _TILE):
        inside = start + position < size
        x = tl.load(x_list + start + position, mask=inside, other=float("-inf"))
        mass += tl.sum(tl.exp((x - top) * inverse), 0)
        least = tl.minimum(least, tl.min(tl.where(inside, key_of(x), 0x7FFFFFFF), 0))
    return mass, least


@triton.jit
def _search(x_list, size, low, count, mass, target, top, inverse, BY_MASS: tl.constexpr):
    """The border in a list of logits: their number, or mass, above `low` reaches the target. Narrows (low, high]
    until its elements are equal → low, high, and the number and the mass above low. What is above low is kept."""
    position = tl.arange(0, _TILE)
    pivot = tl.arange(0, _NUM_PIVOTS)
    high = key_of(top).to(tl.int64)
    num_above = tl.zeros((), tl.int32)  # above high
    while (high - low > 1) & (count - num_above > 1):
        keys = low + (high - low) * (pivot + 1) // (_NUM_PIVOTS + 1)
        keys_32 = keys.to(tl.int32)
        counts = tl.zeros((_NUM_PIVOTS,), tl.int32)
        masses = tl.zeros((_NUM_PIVOTS,), tl.float32)
        for start in range(0, size, _TILE):
            inside = start + position < size
            x = tl.load(x_list + start + position, mask=inside, other=float("-inf"))
            is_above = (key_of(x)[:, None] > keys_32[None, :]) & inside[:, None]
            counts += tl.sum(is_above.to(tl.int32), 0)
            masses += tl.sum(tl.where(is_above, tl.exp((x - top) * inverse)[:, None], 0.0), 0)
        if BY_MASS:
            is_reached = masses >= target
        else:
            is_reached = counts >= target
        count = tl.min(tl.where(is_reached, counts, count), 0)
        mass = tl.min(tl.where(is_reached, masses, mass), 0)
        num_above = tl.max(tl.where(is_reached, num_above, counts), 0)
        # `keys` ends below the old high, so both moves are safe in this order.
        new_low = tl.max(tl.where(is_reached, keys, low), 0)
        high = tl.min(tl.where(is_reached, high, keys), 0)
        low = new_low
    return low, high, count, mass


@triton.jit
def find_border(x_list, size, k, p, whole, top, inverse):
    """The key above which top-k and top-p keep logits of a list; `whole`: the mass of the row."""
    mass, least = _totals(x_list, size, top, inverse)
    low = least.to(tl.int64) - 1
    count = size + tl.zeros((), tl.int32)
    if k > 0:
        if k < size:
            low, high, count, mass = _search(x_list, size, low, count, mass, k, top, inverse, False)
            # Of equals at the border, top-p counts only those among the k.
            whole = mass - (count - k).to(tl.float32) * tl.exp((_value_of(high.to(tl.int32)) - top) * inverse)
        else:
            whole = mass
    if (p < 1) & (mass >= p * whole):
        low, high, count, mass = _search(x_list, size, low, count, mass, p * whole, top, inverse, True)
    return low.to(tl.int32)
