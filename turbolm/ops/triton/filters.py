"""Top-k, top-p and min-p without a sort: where does the part of a row that they keep begin?

    r  rows    v  vocabulary    g  groups of a row    c  chunks of a row

Logits above a border are kept; the border is the smallest t for which fewer than k logits, or logits of
less than p of the mass, lie above t. Both measures fall as t grows, so t is found by trying several t at
once, again and again, between two values that enclose it:

1. Bounds. k groups of tokens whose maxima lie above t hold k tokens above t; and tokens that all together
   weigh less than 1 - p of the mass are not needed. Both give a t below the border.
2. Passes over the row, all its chunks at once, for as long as the bounds may enclose more tokens than
   CAPACITY. Their number is fixed; rows that need none cost next to nothing.
3. A list of the enclosed tokens, and the mass that each group has above them.
4. The exact search, in the list, by the program that draws. In the rare case that the list is too short,
   it searches the row itself.

The list is in no order, so what is added up over it is whole numbers: 2**-42 of the likeliest token's weight.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.launch import await_inputs, pdl_options

GROUP = tl.constexpr(1024)  # tokens
PEAKS = tl.constexpr(8)  # parts of a group whose maxima bound top-k
CAPACITY = tl.constexpr(8192)  # of a row's list
ALL_KEYS = tl.constexpr(-(2**31))  # below every key
NUM_PASSES = 3

_CHUNK_GROUPS = tl.constexpr(4)
_CHUNK = tl.constexpr(4096)
_TILE = tl.constexpr(1024)
_NUM_PIVOTS = tl.constexpr(8)
_UNITS = tl.constexpr(2.0**42)  # of the likeliest token; 2**20 such fit int64


@triton.jit
def key_of(x):
    """int32 in the order of float32; the zeros are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value_of(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def units_of(weight):
    return (weight * _UNITS).to(tl.int64)


@triton.jit
def inverse_of(temperature):
    return 1.0 / tl.maximum(temperature, 1e-30)


@triton.jit
def filters_of(top_k, top_p, min_p, row, vocab_size):
    """A row's top-k (0: all), top-p, min-p, and whether there is any."""
    k = tl.load(top_k + row)
    k = tl.where(k < vocab_size, k, 0).to(tl.int32)
    p = tl.load(top_p + row)
    m = tl.load(min_p + row)
    return k, p, m, (k > 0) | (p < 1) | (m > 0)


@triton.jit
def _search(x_list, size, low, high, target, enough, top, inverse, BY_MASS: tl.constexpr):
    """Of a list of logits those up to the key `high` count. Narrows (low, high] to the border: the number, or mass
    in units, above low reaches the target, above high it doesn't. Ends when its elements are equal or no more
    than `enough` lie above low → low, high, number above low. What is above low is kept."""
    position = tl.arange(0, _TILE)
    pivot = tl.arange(0, _NUM_PIVOTS)
    ceiling = high
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    count = size + tl.zeros((), tl.int32)
    num_above = tl.zeros((), tl.int32)  # above high
    while (high - low > 1) & (count - num_above > 1) & (count > enough):
        keys = low + (high - low) * (pivot + 1) // (_NUM_PIVOTS + 1)
        counts = tl.zeros((_NUM_PIVOTS,), tl.int32)
        masses = tl.zeros((_NUM_PIVOTS,), tl.int64)
        for start in range(0, size, _TILE):
            inside = start + position < size
            x = tl.load(x_list + start + position, mask=inside, other=float("-inf"))
            key = key_of(x)
            is_above = (key[:, None] > keys.to(tl.int32)[None, :]) & (inside & (key <= ceiling))[:, None]
            counts += tl.sum(is_above.to(tl.int32), 0)
            if BY_MASS:
                units = units_of(tl.exp((x - top) * inverse))
                masses += tl.sum(tl.where(is_above, units[:, None], 0), 0)
        if BY_MASS:
            is_reached = masses >= target
        else:
            is_reached = counts >= target
        count = tl.min(tl.where(is_reached, counts, count), 0)
        num_above = tl.max(tl.where(is_reached, num_above, counts), 0)
        # `keys` ends below the old high, so both moves are safe in this order.
        new_low = tl.max(tl.where(is_reached, keys, low), 0)
        high = tl.min(tl.where(is_reached, high, keys), 0)
        low = new_low
    return low.to(tl.int32), high.to(tl.int32), count


@triton.jit
def mass_between(x_list, size, low, high, least_weight, top, inverse):
    """Units of a list's logits in (low, high], but for those of less than the least weight."""
    position = tl.arange(0, _TILE)
    mass = tl.zeros((), tl.int64)
    for start in range(0, size, _TILE):
        x = tl.load(x_list + start + position, mask=start + position < size, other=float("-inf"))
        key = key_of(x)
        weight = tl.exp((x - top) * inverse)
        is_kept = (key > low) & (key <= high) & (weight >= least_weight)
        mass += tl.sum(tl.where(is_kept, units_of(weight), 0), 0)
    return mass


@triton.jit
def find_border(x_list, size, low, high, above, target, k, p, top, inverse):
    """The key above which top-k and top-p keep logits. It is in [low, high), and the list holds (low, high];
    the number (k > 0) or mass of those above high, and what the search's is to reach with it, are given."""
    border = low
    if k > 0:
        count = k
        equal = high
        missing = k - above.to(tl.int32)
        if missing <= size:
            border, equal, count = _search(x_list, size, low, high, missing, missing, top, inverse, False)
            count += k - missing
        if p < 1:  # then nothing is above high
            # Of equals at the border, top-p counts only those among the k.
            whole = mass_between(x_list, size, border, high, 0.0, top, inverse)
            whole -= (count - k) * units_of(tl.exp((_value_of(equal) - top) * inverse))
            wanted = (p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
            border, _, _ = _search(x_list, size, border, high, wanted, 0, top, inverse, True)
    elif p < 1:
        border, _, _ = _search(x_list, size, low, high, units_of(target - above), 0, top, inverse, True)
    return border


@triton.jit
def _bound_kernel(
    temperature, top_k, top_p, min_p, maxima, minima, sums, peaks, brackets, above, targets, tops, num_listed,
    vocab_size, num_groups, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """→ brackets [r, 4]: the keys low and high that enclose the border, and how many tokens they may enclose (-1:
    a row without filters, or without a distribution); above, targets [r]: as `find_border` takes them; tops [r],
    the largest logits. num_listed [r] becomes 0."""
    row = tl.program_id(0)
    await_inputs(PDL)
    low = tl.zeros((), tl.int32)
    high = tl.zeros((), tl.int32)
    inside = tl.full((), -1, tl.int32)
    target = tl.zeros((), tl.float64)
    t = tl.load(temperature + row)
    k, p, m, has_any = filters_of(top_k, top_p, min_p, row, vocab_size)
    group = tl.arange(0, GROUPS)
    place = row * num_groups + group
    is_group = group < num_groups
    maxima_g = tl.load(maxima + place, mask=is_group, other=float("-inf"))
    has_nan = tl.max((maxima_g != maxima_g).to(tl.int32), 0)  # noqa: PLR0124
    maxima_g = tl.where(maxima_g != maxima_g, float("-inf"), maxima_g)  # noqa: PLR0124
    top = tl.max(maxima_g, 0)
    if (t > 0) & has_any & (has_nan == 0) & (tl.abs(top) < float("inf")):
        inverse = inverse_of(t)
        high = key_of(top)
        lowest = tl.min(tl.load(minima + place, mask=is_group, other=float("inf")), 0)
        low = key_of(lowest) - 1
        inside = vocab_size + tl.zeros((), tl.int32)
        if k > 0:
            target += k
            num_peaks = num_groups * PEAKS
            if k <= num_peaks:
                peaks_row = peaks + row.to(tl.int64) * num_peaks
                bound, _, _ = _search(peaks_row, num_peaks, low, high, k, k + k // 2 + 8, top, inverse, False)
                low = tl.maximum(low, bound)
                inside = tl.where(4 * k <= num_peaks, 0, inside)  # then the bound is close
        elif p < 1:
            masses = tl.load(sums + place, mask=is_group, other=0.0)
            masses = tl.where(maxima_g == float("-inf"), 0.0, masses * tl.exp((maxima_g - top) * inverse))
            whole = tl.sum(masses.to(tl.float64), 0)
            target += p * whole
            # Weights below this add up to less than 1 - p of the whole.
            least = 0.9 * (1 - p) * whole.to(tl.float32) / vocab_size
            low = tl.maximum(low, key_of(top + tl.log(least) * 1.001 / inverse) - 2)
        if (m > 0) & ((k == 0) | (p == 1)):  # top-p after top-k is a part of all that top-k left
            low = tl.maximum(low, key_of(top + (tl.log(m) * 1.001 - 0.001) / inverse) - 2)
        low = tl.minimum(low, high - 1)
        if (k == 0) & (p >= 1):  # the weight alone decides
            high = low
            inside = tl.zeros((), tl.int32)
    tl.store(brackets + 4 * row, low)
    tl.store(brackets + 4 * row + 1, high)
    tl.store(brackets + 4 * row + 2, inside)
    tl.store(above + row, tl.zeros((), tl.float64))
    tl.store(targets + row, target)
    tl.store(tops + row, top)
    tl.store(num_listed + row, 0)


@triton.jit
def _pivots_of(low, high):
    """Logits that divide a bracket into equal parts; the first is its low end."""
    share = tl.arange(0, _NUM_PIVOTS).to(tl.float32) / _NUM_PIVOTS
    first = _value_of(low)
    last = _value_of(high)
    return tl.minimum(tl.maximum(first * (1 - share) + last * share, first), last)


@triton.jit
def _bracket_of(
    brackets, above, measures, targets, tops, k, p, inverse, row, num_chunks, CHUNKS: tl.constexpr,
    MEASURED: tl.constexpr,
):  # fmt: skip
    """A row's low, high, inside, above: those given, or after a pass, what its measures [c, pivots] say of them."""
    low = tl.load(brackets + 4 * row)
    high = tl.load(brackets + 4 * row + 1)
    inside = tl.load(brackets + 4 * row + 2)
    num_above = tl.load(above + row)
    if MEASURED:  # noqa: SIM102 - known to the compiler
        if inside > CAPACITY:
            chunk = tl.arange(0, CHUNKS)
            place = (row * num_chunks + chunk)[:, None] * _NUM_PIVOTS + tl.arange(0, _NUM_PIVOTS)[None, :]
            measured = tl.load(measures + place, mask=(chunk < num_chunks)[:, None], other=0.0)
            measured = tl.sum(measured.to(tl.float64), 0)
            keys = key_of(_pivots_of(low, high))
            is_reached = measured >= tl.load(targets + row)
            low = tl.max(tl.where(is_reached, keys, low), 0)
            at_low = tl.min(tl.where(is_reached, measured, 1e300), 0)
            if (k == 0) | (p == 1):
                high = tl.min(tl.where(is_reached, high, keys), 0)
                num_above = tl.maximum(tl.max(tl.where(is_reached, 0.0, measured), 0), num_above)
            num_inside = at_low - num_above
            if k == 0:  # each weighs more than one at the low end
                num_inside /= tl.maximum(tl.exp((_value_of(low) - tl.load(tops + row)) * inverse), 1e-30)
            inside = tl.where(low < high, tl.minimum(num_inside, 2.0**30), 0.0).to(tl.int32)
    return low, high, inside, num_above


@triton.jit
def _store_bracket(brackets, above, row, low, high, inside, num_above):
    tl.store(brackets + 4 * row, low)
    tl.store(brackets + 4 * row + 1, high)
    tl.store(brackets + 4 * row + 2, inside)
    tl.store(above + row, num_above)


@triton.jit
def _pass_kernel(
    logits, temperature, top_k, top_p, min_p, brackets, above, measures, targets, tops,
    next_brackets, next_above, next_measures, row_stride, vocab_size, num_chunks,
    CHUNKS: tl.constexpr, MEASURED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Brackets after the pass before → next ones; and of those that may enclose too many tokens, what each chunk
    has above each pivot: next_measures [r, c, pivots], numbers or masses."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    await_inputs(PDL)
    inverse = inverse_of(tl.load(temperature + row))
    k, p, _, _ = filters_of(top_k, top_p, min_p, row, vocab_size)
    low, high, inside, num_above = _bracket_of(
        brackets, above, measures, targets, tops, k, p, inverse, row, num_chunks, CHUNKS, MEASURED
    )
    if MEASURED:  # noqa: SIM102
        if chunk == 0:
            _store_bracket(next_brackets, next_above, row, low, high, inside, num_above)
    if inside > CAPACITY:
        token = chunk * _CHUNK + tl.arange(0, _CHUNK)
        x = tl.load(logits + row.to(tl.int64) * row_stride + token, mask=token < vocab_size, other=float("-inf"))
        weight = tl.where(k > 0, 1.0, tl.exp((x - tl.load(tops + row)) * inverse))
        pivot = tl.arange(0, _NUM_PIVOTS)
        pivots = _pivots_of(low, high)
        measured = tl.zeros((_NUM_PIVOTS,), tl.float32)
        for i in tl.static_range(_NUM_PIVOTS):  # one by one: in two dimensions, x would go through shared memory
            border = tl.sum(tl.where(pivot == i, pivots, 0.0), 0)
            measured = tl.where(pivot == i, tl.sum(tl.where(x > border, weight, 0.0), 0), measured)
        tl.store(next_measures + (row * num_chunks + chunk) * _NUM_PIVOTS + pivot, measured)


@triton.jit
def _list_kernel(
    logits, temperature, top_k, top_p, min_p, maxima, brackets, above, measures, targets, tops,
    next_brackets, next_above, values, ids, num_listed, kept, row_stride, vocab_size, num_groups, num_chunks,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Brackets after the last pass → next ones; values and ids [r, CAPACITY] of the logits enclosed, in no order,
    num_listed [r] counts all; kept [r, g] mass above them that min-p keeps."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    await_inputs(PDL)
    inverse = inverse_of(tl.load(temperature + row))
    k, p, m, _ = filters_of(top_k, top_p, min_p, row, vocab_size)
    low, high, inside, num_above = _bracket_of(
        brackets, above, measures, targets, tops, k, p, inverse, row, num_chunks, CHUNKS, True
    )
    if chunk == 0:
        _store_bracket(next_brackets, next_above, row, low, high, inside, num_above)
    if inside >= 0:
        group = chunk * _CHUNK_GROUPS + tl.arange(0, _CHUNK_GROUPS)
        is_group = group < num_groups
        place = row * num_groups + group
        is_read = is_group & (key_of(tl.load(maxima + place, mask=is_group, other=float("-inf"))) > low)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(
            logits + row.to(tl.int64) * row_stride + token,
            mask=is_read[:, None] & (token < vocab_size),
            other=float("-inf"),
        )
        key = key_of(x)
        weight = tl.exp((x - tl.load(tops + row)) * inverse)
        mass = tl.sum(tl.where((key > high) & (weight >= m), weight, 0.0), 1)
        tl.store(kept + place, mass, mask=is_group)
        is_listed = (key > low) & (key <= high)
        counts = tl.sum(is_listed.to(tl.int32), 1)
        count = tl.sum(counts, 0)
        if count > 0:
            starts = tl.atomic_add(num_listed + row, count) + tl.cumsum(counts, 0) - counts
            at = starts[:, None] + tl.cumsum(is_listed.to(tl.int32), 1) - 1
            is_listed &= at < CAPACITY
            tl.store(values + row * CAPACITY + at, x, mask=is_listed)
            tl.store(ids + row * CAPACITY + at, token, mask=is_listed)


@dataclass(frozen=True, slots=True)
class Bracketed:
    """What is left for the program that draws from a row with filters."""

    brackets: Tensor  # [r, 4] int32: low and high key; how many tokens they may enclose (-1: no filters)
    above: Tensor  # [r] float64: number (top-k) or mass of the tokens above high
    targets: Tensor  # [r] float64: number or mass of the tokens above the border
    values: Tensor  # [r, CAPACITY] float32, in no order
    ids: Tensor  # [r, CAPACITY] int32
    num_listed: Tensor  # [r] int32; more than CAPACITY: not all are listed
    kept: Tensor  # [r, g] float32: mass above high that min-p keeps


def bracket(
    logits_rv: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor], maxima_rg: Tensor, minima_rg: Tensor,
    sums_rg: Tensor, peaks: Tensor,
) -> Bracketed:  # fmt: skip
    """Enclose the borders of rows. `parameters`: temperature, top_k, top_p, min_p. The smallest logits above -inf
    of groups (+inf: none), and peaks [r, g * PEAKS], the maxima of groups' parts."""
    num_rows, vocab_size = logits_rv.shape
    num_groups, num_chunks = maxima_rg.shape[1], triton.cdiv(vocab_size, _CHUNK.value)
    brackets = torch.empty(NUM_PASSES + 1, num_rows, 4, dtype=torch.int32, device=logits_rv.device)
    above = logits_rv.new_empty(NUM_PASSES + 1, num_rows, dtype=torch.float64)
    measures = logits_rv.new_empty(NUM_PASSES, num_rows, num_chunks, _NUM_PIVOTS.value)
    targets, tops = above.new_empty(num_rows), logits_rv.new_empty(num_rows)
    values = logits_rv.new_empty(num_rows, CAPACITY.value)
    ids = torch.empty_like(values, dtype=torch.int32)
    num_listed, kept = brackets.new_empty(num_rows), torch.empty_like(maxima_rg)
    options = pdl_options(logits_rv.device)
    _bound_kernel[(num_rows,)](
        *parameters, maxima_rg, minima_rg, sums_rg, peaks, brackets[0], above[0], targets, tops, num_listed,
        vocab_size, num_groups, GROUPS=triton.next_power_of_2(num_groups), num_warps=8, **options,
    )  # fmt: skip
    options = {**options, "CHUNKS": triton.next_power_of_2(num_chunks)}
    grid = (num_chunks, num_rows)
    for index in range(NUM_PASSES):
        before = max(0, index - 1)  # the first pass takes the bounds as they are
        _pass_kernel[grid](
            logits_rv, *parameters, brackets[before], above[before], measures[before], targets, tops,
            brackets[index], above[index], measures[index], logits_rv.stride(0), vocab_size, num_chunks,
            MEASURED=index > 0, num_warps=4, maxnreg=128, **options,
        )  # fmt: skip
    _list_kernel[grid](
        logits_rv, *parameters, maxima_rg, brackets[-2], above[-2], measures[-1], targets, tops, brackets[-1],
        above[-1], values, ids, num_listed, kept, logits_rv.stride(0), vocab_size, num_groups, num_chunks,
        num_warps=4, **options,
    )  # fmt: skip
    return Bracketed(brackets[-1], above[-1], targets, values, ids, num_listed, kept)
