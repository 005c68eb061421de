"""Penalties, biases and bans, as `turbolm.ops.adjustments` defines them: in place on rows of logits."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from turbolm.ops.adjustments import PROMPT, Adjustments
from turbolm.ops.triton.launch import await_inputs, pdl_options

_IN_PROMPT = tl.constexpr(PROMPT)
_FEW = 256  # tokens to count, and entries, per program
_BLOCK = 2048  # of the vocabulary per program


@triton.jit(do_not_specialize=["num_tokens", "num_previous", "vocab_first"])
def _count_kernel(
    counts, slots, tokens, amounts, previous, num_tokens, num_previous, vocab_first, vocab_size, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """counts [s, v] in place, of tokens from vocab_first on. Whole numbers: the order in which a token is counted
    twice doesn't matter."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_tokens
    await_inputs(PDL)
    token = tl.load(tokens + index, mask=inside, other=0)
    source = -1 - token
    follows = inside & (token < 0) & (source < num_previous)
    token = tl.where(token < 0, tl.load(previous + source, mask=follows, other=-1), token)
    inside &= token >= 0
    token -= vocab_first
    inside &= (token >= 0) & (token < vocab_size)
    slot = tl.load(slots + index, mask=inside, other=0).to(tl.int64)
    amount = tl.load(amounts + index, mask=inside, other=0)
    place = counts + slot * vocab_size + token
    tl.atomic_or(place, amount, mask=inside & (amount == _IN_PROMPT))
    tl.atomic_add(place, amount, mask=inside & (amount != _IN_PROMPT))


@triton.jit(do_not_specialize=["vocab_first"])
def _penalize_kernel(
    logits, counts, slots, drafts, repetition, presence, frequency, row_stride, vocab_first, vocab_size,
    BLOCK: tl.constexpr, NUM_DRAFTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [r, v] in place, by counts [s, v] and drafts [r, NUM_DRAFTS]: BLOCK tokens of a row per program."""
    row = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    await_inputs(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        counted = tl.load(counts + slot * vocab_size + token, mask=inside, other=0)
        for i in tl.static_range(NUM_DRAFTS):
            draft = tl.load(drafts + row * NUM_DRAFTS + i)
            counted += ((draft >= 0) & (token == draft - vocab_first)).to(tl.int32)
        place = logits + row.to(tl.int64) * row_stride + token
        x = tl.load(place, mask=inside & (counted > 0), other=0.0)
        in_answer = (counted & (_IN_PROMPT - 1)).to(tl.float32)
        factor = tl.load(repetition + row)
        x = tl.where(x > 0, tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + factor), x * factor)
        x -= tl.load(frequency + row) * in_answer + tl.where(in_answer > 0, tl.load(presence + row), 0.0)
        tl.store(place, x, mask=inside & (counted > 0))


@triton.jit(do_not_specialize=["num_entries", "num_previous", "vocab_first"])
def _add_kernel(
    logits, rows, tokens, values, sources, wanted, previous, num_entries, num_previous, row_stride, vocab_first,
    vocab_size, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Entries [e] to logits [r, v], in place. Of a token's entries one at most is finite: their order is no matter."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_entries
    await_inputs(PDL)
    source = tl.load(sources + index, mask=inside, other=-1)
    depends = inside & (source >= 0) & (source < num_previous)
    sampled = tl.load(previous + source, mask=depends, other=-1)
    token = tl.load(tokens + index, mask=inside, other=0) - vocab_first
    inside &= (source < 0) | (sampled == tl.load(wanted + index, mask=inside, other=0))
    inside &= (token >= 0) & (token < vocab_size)
    row = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    value = tl.load(values + index, mask=inside, other=0.0)
    tl.atomic_add(logits + row * row_stride + token, value, mask=inside)


def adjust(logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor, first: int = 0) -> None:
    """See `turbolm.ops.adjustments.adjust`. Rows of logits may be a part of longer ones; counts: contiguous."""
    a, options = adjustments, pdl_options(logits_rv.device)
    (num_rows, vocab_size), num_previous = logits_rv.shape, previous_r.shape[0]
    assert counts_sv.shape[1] == vocab_size and logits_rv.stride(1) == 1
    num_counted, num_entries = a.counted_tokens.shape[0], a.tokens.shape[0]
    if num_counted:
        _count_kernel[(triton.cdiv(num_counted, _FEW),)](
            counts_sv, a.counted_slots, a.counted_tokens, a.counted_amounts, previous_r, num_counted, num_previous,
            first, vocab_size, BLOCK=_FEW, num_warps=2, **options,
        )  # fmt: skip
    if a.slots.shape[0]:
        _penalize_kernel[(triton.cdiv(vocab_size, _BLOCK), num_rows)](
            logits_rv, counts_sv, a.slots, a.drafts, a.repetition, a.presence, a.frequency, logits_rv.stride(0),
            first, vocab_size, BLOCK=_BLOCK, NUM_DRAFTS=a.drafts.shape[1], num_warps=4, **options,
        )  # fmt: skip
    if num_entries:
        _add_kernel[(triton.cdiv(num_entries, _FEW),)](
            logits_rv, a.rows, a.tokens, a.values, a.sources, a.wanted, previous_r, num_entries, num_previous,
            logits_rv.stride(0), first, vocab_size, BLOCK=_FEW, num_warps=2, **options,
        )  # fmt: skip
