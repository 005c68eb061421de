"""Choosing a token per row of logits, as `turbolm.ops.sampling` defines it, without a sort.

    r  rows    v  vocabulary    g  groups of a row: 1024 tokens each

1. Programs find the groups' largest logits and the sums of their weights, exp((logit - largest) / T).
2. For rows with filters, `filters.py` lists the few tokens among which the filters' border must be.
3. A program per row puts the groups together: the likeliest token; or, after the filters' border, the
   group that holds the target of the draw, then the token in that group.

Plain rows are read once, and one group of them twice; so are greedy rows, without the sums. A row's
token depends on that row alone, to the bit: groups are the same in every batch.

Rounding: weights and their sums within a group are float32, sums over groups and the draw itself
float64, from a float64 uniform number; so a token's probability is right to about 1e-6 of itself for any
size of vocabulary. The borders of top-p and min-p are right to 1e-6 of the mass, that of top-k exact.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.filters import (
    ALL_KEYS,
    CAPACITY,
    GROUP,
    PEAKS,
    bracket,
    filters_of,
    find_border,
    inverse_of,
    key_of,
    mass_between,
    units_of,
)
from turbolm.ops.triton.launch import await_inputs, pdl_options

_DRAW_TILE = tl.constexpr(1024)
_GROUPS_PER_PROGRAM = tl.constexpr(2)
_NUM_PIVOTS = tl.constexpr(8)


@triton.jit
def _group_kernel(
    logits, temperature, maxima, tokens, sums, minima, peaks, row_stride, vocab_size, num_groups,
    DRAW: tl.constexpr, FILTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [r, v] → maxima (NaN: the group holds one), tokens (the maximum's), sums [r, g]; for filters, the
    minima above -inf [r, g] and the maxima of the groups' parts [r, g, PEAKS]."""
    row = tl.program_id(1)
    group = tl.program_id(0) * _GROUPS_PER_PROGRAM + tl.arange(0, _GROUPS_PER_PROGRAM)
    is_group = group < num_groups
    place = row * num_groups + group
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    await_inputs(PDL)
    x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < vocab_size, other=float("-inf"))
    is_nan = tl.max((x != x).to(tl.int32), 1)  # noqa: PLR0124
    x = tl.where(x != x, float("-inf"), x)  # noqa: PLR0124
    top, index = tl.max(x, 1, return_indices=True)
    tl.store(maxima + place, tl.where(is_nan > 0, float("nan"), top), mask=is_group)
    tl.store(tokens + place, group * GROUP + index, mask=is_group)
    if DRAW:
        t = tl.load(temperature + row)
        if t > 0:
            base = tl.where(top == float("-inf"), 0.0, top)  # -inf minus -inf would be NaN
            weights = tl.exp((x - base[:, None]) * inverse_of(t))
            tl.store(sums + place, tl.sum(weights, 1), mask=is_group)
            if FILTER:
                least = tl.min(tl.where(x > float("-inf"), x, float("inf")), 1)
                tl.store(minima + place, least, mask=is_group)
                parts = tl.max(tl.reshape(x, (_GROUPS_PER_PROGRAM, PEAKS, GROUP // PEAKS)), 2)
                part = place.to(tl.int64)[:, None] * PEAKS + tl.arange(0, PEAKS)[None, :]
                tl.store(peaks + part, parts, mask=is_group[:, None])


@triton.jit
def _draw(x_list, size, uniform, lowest, least_weight, top, inverse):
    """Position in a list of logits of the first whose cumulative weight exceeds `uniform` times the whole. Those
    up to `lowest`, and of less than the least weight, don't count."""
    position = tl.arange(0, _DRAW_TILE)
    whole = tl.zeros((), tl.float64)
    for start in range(0, size, _DRAW_TILE):
        x = tl.load(x_list + start + position, mask=start + position < size, other=float("-inf"))
        weight = tl.exp((x - top) * inverse)
        whole += tl.sum(tl.where((key_of(x) > lowest) & (weight >= least_weight), weight, 0.0).to(tl.float64), 0)
    target = uniform * whole
    before = tl.zeros((), tl.float64)
    chosen = size + tl.zeros((), tl.int32)  # none yet
    last = 0
    start = 0
    while (start < size) & (chosen == size):
        x = tl.load(x_list + start + position, mask=start + position < size, other=float("-inf"))
        weight = tl.exp((x - top) * inverse)
        weight = tl.where((key_of(x) > lowest) & (weight >= least_weight), weight, 0.0)
        cumulative = before + tl.cumsum(weight.to(tl.float64), 0)
        is_past = (cumulative > target) & (weight > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(is_past, start + position, size), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, start + position, 0), 0))
        before += tl.sum(weight.to(tl.float64), 0)
        start += _DRAW_TILE
    return tl.where(chosen < size, chosen, last)  # rounding can leave the target past the last kept


@triton.jit
def _choose_group(masses, group, num_groups, x_list, ids, has_ids, size, low, high, least_weight, draw, top, inverse):
    """The group of the drawn token, and a uniform number within it. Masses of groups in units, to which the list's
    logits in (low, high] of at least the least weight are added; without ids, a logit's place is its id."""
    position = tl.arange(0, _DRAW_TILE)
    pivot = tl.arange(0, _NUM_PIVOTS)
    whole = tl.sum(masses, 0) + mass_between(x_list, size, low, high, least_weight, top, inverse)
    target = draw * whole.to(tl.float64)
    first = tl.full((), -1, tl.int32)  # the mass up to this group doesn't exceed the target
    last = num_groups - 1 + tl.zeros((), tl.int32)  # up to this one it does
    before = tl.zeros((), tl.int64)
    until = whole
    while last - first > 1:
        ends = first + (last - first) * (pivot + 1) // (_NUM_PIVOTS + 1)
        sums = tl.sum(tl.where(group[:, None] <= ends[None, :], masses[:, None], 0), 0)
        for start in range(0, size, _DRAW_TILE):
            inside = start + position < size
            x = tl.load(x_list + start + position, mask=inside, other=float("-inf"))
            token = tl.load(ids + start + position, mask=inside & has_ids, other=0)
            token = tl.where(has_ids, token, start + position)
            key = key_of(x)
            weight = tl.exp((x - top) * inverse)
            units = tl.where((key > low) & (key <= high) & (weight >= least_weight), units_of(weight), 0)
            sums += tl.sum(tl.where((token // GROUP)[:, None] <= ends[None, :], units[:, None], 0), 0)
        is_past = sums.to(tl.float64) > target
        until = tl.min(tl.where(is_past, sums, until), 0)
        before = tl.max(tl.where(is_past, before, sums), 0)
        new_first = tl.max(tl.where(is_past, first, ends), 0)
        last = tl.min(tl.where(is_past, ends, last), 0)
        first = new_first
    return last, (target - before.to(tl.float64)) / (until - before).to(tl.float64)


@triton.jit(do_not_specialize=["num_groups"])  # Triton 3.6 fails to compile it where it knows that there is one
def _choose_kernel(
    logits, temperature, top_k, top_p, min_p, uniform, maxima, group_tokens, sums,
    brackets, above, targets, values, ids, num_listed, kept, out, row_stride, vocab_size, num_groups,
    GROUPS: tl.constexpr, DRAW: tl.constexpr, FILTER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """→ out [r]; a row per program. GROUPS: num_groups, padded."""
    row = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    is_group = group < num_groups
    await_inputs(PDL)
    tops = tl.load(maxima + row * num_groups + group, mask=is_group, other=float("-inf"))
    num_nan = tl.sum((tops != tops).to(tl.int32), 0)  # noqa: PLR0124
    tops = tl.where(tops != tops, float("-inf"), tops)  # noqa: PLR0124
    top, best = tl.max(tops, 0, return_indices=True)
    is_valid = (num_nan == 0) & (top > float("-inf"))
    token = tl.load(group_tokens + row * num_groups + best)
    if DRAW:
        t = tl.load(temperature + row)
        if (t > 0) & is_valid & (top < float("inf")):
            inverse = inverse_of(t)
            x_row = logits + row.to(tl.int64) * row_stride
            draw = tl.load(uniform + row).to(tl.float64)
            lowest = ALL_KEYS + tl.zeros((), tl.int32)
            least_weight = tl.zeros((), tl.float32)
            chosen = tl.zeros((), tl.int32)
            has_any = False
            if FILTER:
                k, p, m, has_any = filters_of(top_k, top_p, min_p, row, vocab_size)
            if not has_any:
                masses = tl.load(sums + row * num_groups + group, mask=is_group, other=0.0)
                masses = tl.where(tops == float("-inf"), 0.0, masses * tl.exp((tops - top) * inverse)).to(tl.float64)
                target = draw * tl.sum(masses, 0)
                is_past = (tl.cumsum(masses, 0) > target) & (masses > 0)
                last = tl.max(tl.where(masses > 0, group, 0), 0)
                chosen = tl.minimum(tl.min(tl.where(is_past, group, GROUPS), 0), last)
                before = tl.sum(tl.where(group < chosen, masses, 0.0), 0)
                # What is left of the target is a uniform number within the group.
                draw = (target - before) / tl.sum(tl.where(group == chosen, masses, 0.0), 0)
            elif FILTER:
                least_weight = m
                low = tl.load(brackets + 4 * row)
                high = tl.load(brackets + 4 * row + 1)
                num_above = tl.load(above + row)
                target = tl.load(targets + row)
                units = units_of(tl.load(kept + row * num_groups + group, mask=is_group, other=0.0).to(tl.float64))
                size = tl.load(num_listed + row)
                x_list = values + row * CAPACITY
                is_listed = size <= CAPACITY
                if not is_listed:
                    x_list = x_row
                    size = vocab_size
                lowest = find_border(x_list, size, low, high, num_above, target, k, p, top, inverse)
                chosen, draw = _choose_group(
                    units, group, num_groups, x_list, ids + row * CAPACITY, is_listed, size, lowest, high, m, draw, top,
                    inverse,
                )  # fmt: skip
            first = chosen * GROUP
            size_left = tl.minimum(vocab_size - first, GROUP)
            token = first + _draw(x_row + first, size_left, draw, lowest, least_weight, top, inverse)
    tl.store(out + row, tl.where(is_valid, token, -1))


def sample(
    logits_rv: Tensor,
    temperature_r: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    min_p_r: Tensor,
    uniform_r: Tensor,
    *,
    has_filters: bool = True,
) -> Tensor:
    """int32 [r] chosen token ids; -1 where a row has no distribution (it holds NaN, or nothing above -inf).

    float32 logits whose rows may be a part of longer ones, float32 temperatures (0: the likeliest token),
    int64 top_k (0: all), float32 top_p and min_p, float64 uniform numbers in [0, 1): as `ops.sampling.sample`
    takes them. A row with +inf gives its first. `has_filters=False` says that no row has filters, and saves
    five launches.
    """
    return _sample(logits_rv, temperature_r, top_k_r, top_p_r, min_p_r, uniform_r, True, has_filters)


def argmax(logits_rv: Tensor) -> Tensor:
    """int32 [r]: `sample` with all temperatures 0."""
    return _sample(logits_rv, *(logits_rv,) * 5, False, False)


def _sample(
    logits_rv: Tensor,
    temperature_r: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    min_p_r: Tensor,
    uniform_r: Tensor,
    is_drawn: bool,
    is_filtered: bool,
) -> Tensor:
    assert logits_rv.dtype == torch.float32 and logits_rv.stride(1) == 1
    num_rows, vocab_size = logits_rv.shape
    num_groups = triton.cdiv(vocab_size, GROUP.value)
    out = torch.empty(num_rows, dtype=torch.int32, device=logits_rv.device)
    if num_rows == 0:
        return out
    maxima, sums, minima = logits_rv.new_empty(3, num_rows, num_groups)
    tokens = torch.empty_like(maxima, dtype=torch.int32)
    peaks = logits_rv.new_empty(num_rows, num_groups, PEAKS.value) if is_filtered else maxima
    parameters = (temperature_r, top_k_r, top_p_r, min_p_r)
    options = {"DRAW": is_drawn, "FILTER": is_filtered, **pdl_options(logits_rv.device)}
    _group_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM.value), num_rows)](
        logits_rv, temperature_r, maxima, tokens, sums, minima, peaks, logits_rv.stride(0), vocab_size, num_groups,
        num_warps=4, **options,
    )  # fmt: skip
    filtered: tuple[Tensor, ...] = (out,) * 7
    if is_filtered:
        b = bracket(logits_rv, parameters, maxima, minima, sums, peaks)
        filtered = (b.brackets, b.above, b.targets, b.values, b.ids, b.num_listed, b.kept)
    _choose_kernel[(num_rows,)](
        logits_rv, *parameters, uniform_r, maxima, tokens, sums, *filtered, out,
        logits_rv.stride(0), vocab_size, num_groups,
        GROUPS=triton.next_power_of_2(num_groups), num_warps=8, **options,
    )  # fmt: skip
    return out
