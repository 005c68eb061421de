"""Choosing tokens from logits of which each rank has a part of the vocabulary, without moving them.

As in `sampling.py`: the largest logit and the sum of weights of each group of tokens tell which group a draw falls
into. Ranks tell each other these, and then all read the group's logits where they are. The choice is the one that
`sampling.py` makes of whole logits, bit for bit: parts are whole groups.

    r  rows    g  groups of one rank's part    s  ranks
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.triton.filters import ALL_KEYS, GROUP, inverse_of
from turbolm.ops.triton.launch import await_inputs, pdl_options
from turbolm.ops.triton.peers import MAX_POLLS, PeerMemory, hear, say
from turbolm.ops.triton.sampling import _GROUPS_PER_PROGRAM, _draw, _group_kernel

_NUM_FIELDS = 3  # of a group: largest logit, sum of weights, the largest's token


@dataclass(frozen=True, slots=True)
class SharedLogits:
    """Every rank's logits, and where ranks tell each other of them."""

    logits: PeerMemory  # float32 [max_rows, width]
    inbox: PeerMemory
    counts: Tensor  # int64 [max_rows]: choices so far
    rank: int
    size: int
    max_rows: int
    width: int  # of a part, a multiple of GROUP
    vocab_size: int  # tokens that may be chosen, of all parts

    @property
    def num_groups(self) -> int:
        """Of a part."""
        return self.width // int(GROUP.value)

    @staticmethod
    def inbox_bytes(size: int, max_rows: int, width: int) -> int:
        """Two places per row with every rank's groups, then a count (int64) per rank and row."""
        return size * max_rows * (2 * _NUM_FIELDS * (width // int(GROUP.value)) * 4 + 8)


@triton.jit
def _choose_kernel(
    logits, addresses, counts, temperature, uniform, maxima, tokens, sums, out, vocab_size,
    NUM_GROUPS: tl.constexpr, OWN_BLOCK: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr, COUNTS: tl.constexpr, MAX_POLLS: tl.constexpr, ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits, addresses: int64 [SIZE], where each rank's logits and inbox begin. maxima, tokens, sums: [r,
    NUM_GROUPS], of this rank. → out [r]; a row per program. BLOCK: SIZE * NUM_GROUPS, padded."""
    row = tl.program_id(0).to(tl.int64)
    own = tl.arange(0, OWN_BLOCK)
    is_own = own < NUM_GROUPS
    await_inputs(PDL)
    count = tl.load(counts + row) + 1
    place = ((count % 2) * MAX_ROWS + row) * 3 * SIZE * NUM_GROUPS
    own_top = tl.load(maxima + row * NUM_GROUPS + own, mask=is_own)
    own_sum = tl.load(sums + row * NUM_GROUPS + own, mask=is_own)
    own_token = tl.load(tokens + row * NUM_GROUPS + own, mask=is_own) + RANK * NUM_GROUPS * GROUP
    for peer in tl.static_range(SIZE):
        inbox = tl.load(addresses + peer).to(tl.pointer_type(tl.float32)) + place + RANK * NUM_GROUPS + own
        tl.store(inbox, own_top, mask=is_own)
        tl.store(inbox + SIZE * NUM_GROUPS, own_sum, mask=is_own)
        ids = (inbox + 2 * SIZE * NUM_GROUPS).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(ids, own_token, mask=is_own)
    say(addresses, COUNTS, row, count, RANK, SIZE, MAX_ROWS)
    tl.store(counts + row, count)
    hear(addresses, COUNTS, row, count, RANK, SIZE, MAX_ROWS, MAX_POLLS, ON_GPU)
    group = tl.arange(0, BLOCK)
    is_group = group < SIZE * NUM_GROUPS
    inbox = tl.load(addresses + RANK).to(tl.pointer_type(tl.float32)) + place
    tops = tl.load(inbox + group, mask=is_group, other=float("-inf"), cache_modifier=".cg")
    num_nan = tl.sum((tops != tops).to(tl.int32), 0)  # noqa: PLR0124
    tops = tl.where(tops != tops, float("-inf"), tops)  # noqa: PLR0124
    top, best = tl.max(tops, 0, return_indices=True)
    is_valid = (num_nan == 0) & (top > float("-inf"))
    ids = (inbox + 2 * SIZE * NUM_GROUPS).to(tl.pointer_type(tl.int32), bitcast=True)
    token = tl.load(ids + best, cache_modifier=".cg")
    t = tl.load(temperature + row)
    if (t > 0) & is_valid & (top < float("inf")):
        inverse = inverse_of(t)
        masses = tl.load(inbox + SIZE * NUM_GROUPS + group, mask=is_group, other=0.0, cache_modifier=".cg")
        masses = tl.where(tops == float("-inf"), 0.0, masses * tl.exp((tops - top) * inverse)).to(tl.float64)
        target = tl.load(uniform + row).to(tl.float64) * tl.sum(masses, 0)
        is_past = (tl.cumsum(masses, 0) > target) & (masses > 0)
        last = tl.max(tl.where(masses > 0, group, 0), 0)
        chosen = tl.minimum(tl.min(tl.where(is_past, group, BLOCK), 0), last)
        before = tl.sum(tl.where(group < chosen, masses, 0.0), 0)
        # What is left of the target is a uniform number within the group.
        draw = (target - before) / tl.sum(tl.where(group == chosen, masses, 0.0), 0)
        owner = chosen // NUM_GROUPS
        x_row = tl.load(logits + owner).to(tl.pointer_type(tl.float32)) + row * NUM_GROUPS * GROUP
        first = chosen * GROUP
        size_left = tl.minimum(vocab_size - first, GROUP)
        x_group = x_row + (chosen - owner * NUM_GROUPS) * GROUP
        token = first + _draw(x_group, size_left, draw, ALL_KEYS, 0.0, top, inverse)
    tl.store(out + row, tl.where(is_valid, token, -1))


def sample(num_rows: int, temperature_r: Tensor, uniform_r: Tensor, shared: SharedLogits) -> Tensor:
    """int32 [r] token ids, as `sampling.sample` chooses them without filters, of the first rows of `shared`: the same
    on every rank. Every rank must call this at the same places with the same numbers."""
    device, width, num_groups = shared.counts.device, shared.width, shared.num_groups
    own = shared.logits.local.view(torch.float32).view(-1, width)
    num_own = min(max(shared.vocab_size - shared.rank * width, 0), width)
    out = torch.empty(num_rows, dtype=torch.int32, device=device)
    if num_rows == 0:
        return out
    maxima, sums = own.new_empty(2, num_rows, num_groups)
    tokens = torch.empty_like(maxima, dtype=torch.int32)
    options = pdl_options(device)
    _group_kernel[(triton.cdiv(num_groups, _GROUPS_PER_PROGRAM.value), num_rows)](
        own, temperature_r, maxima, tokens, sums, maxima, maxima, width, num_own, num_groups,
        DRAW=True, FILTER=False, num_warps=4, **options,
    )  # fmt: skip
    all_groups = shared.size * num_groups
    _choose_kernel[(num_rows,)](
        shared.logits.addresses, shared.inbox.addresses, shared.counts, temperature_r, uniform_r, maxima, tokens, sums,
        out, shared.vocab_size,
        NUM_GROUPS=num_groups, OWN_BLOCK=triton.next_power_of_2(num_groups), BLOCK=triton.next_power_of_2(all_groups),
        RANK=shared.rank, SIZE=shared.size, MAX_ROWS=shared.max_rows,
        COUNTS=2 * _NUM_FIELDS * shared.max_rows * all_groups * 4, MAX_POLLS=MAX_POLLS, ON_GPU=out.is_cuda,
        num_warps=4, **options,
    )  # fmt: skip
    return out
