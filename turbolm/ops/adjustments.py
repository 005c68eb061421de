"""Penalties, biases and bans on rows of logits, where the device knows what the answers hold: the contract, and the
reference in plain torch.

    r  rows    v  vocabulary    s  slots: one per sequence with penalties    c  tokens to count    e  entries

A slot counts a sequence's tokens, [v] int32: how often each occurs in the answer, plus PROMPT if it is in the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PROMPT = 1 << 30


class Adjustments(NamedTuple):
    """What is done to a step's logits before tokens are chosen, in this order."""

    counted_slots: Tensor  # int32 [c] where a token is counted
    counted_tokens: Tensor  # int32 [c] which; below 0: entry -1 - id of what an earlier step sampled
    counted_amounts: Tensor  # int32 [c] 1, or PROMPT
    slots: Tensor  # int32 [r] the row's penalties are by the counts of this slot; -1: none
    drafts: Tensor  # int32 [r, d] tokens that count for this row alone; -1: none
    repetition: Tensor  # float32 [r] divides positive and multiplies negative logits of tokens that occur
    presence: Tensor  # float32 [r] subtracted for tokens of the answer
    frequency: Tensor  # float32 [r] subtracted once per occurrence in the answer
    rows: Tensor  # int32 [e] whose logit …
    tokens: Tensor  # int32 [e] … of this token …
    values: Tensor  # float32 [e] … gets this added (-inf: it is banned)
    sources: Tensor  # int32 [e] only if this entry of what an earlier step sampled …
    wanted: Tensor  # int32 [e] … is this token; sources below 0: always


#: Columns of each field: int32 but for those, float32.
FLOATS = frozenset({"repetition", "presence", "frequency", "values"})


def adjust(logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor, first: int = 0) -> None:
    """Counts the tokens, in `counts_sv`, and changes the logits (float32), both in place. `previous_r`: int32, what an
    earlier step sampled; below 0: nothing. v may be a part of the vocabulary, which begins at the token `first`: what
    bears on other tokens is left to whoever has them."""
    a, previous = adjustments, previous_r.long()
    tokens = a.counted_tokens.long()
    tokens = torch.where(tokens < 0, previous[(-1 - tokens).clamp(0, previous.shape[0] - 1)], tokens)
    tokens = torch.where(tokens < 0, -1, tokens - first)
    for slot, token, amount in zip(a.counted_slots.tolist(), tokens.tolist(), a.counted_amounts.tolist(), strict=True):
        if 0 <= token < counts_sv.shape[1]:
            counts_sv[slot, token] = counts_sv[slot, token] | PROMPT if amount == PROMPT else counts_sv[slot, token] + 1
    for row, slot in enumerate(a.slots.tolist()):
        if slot >= 0:
            counted = counts_sv[slot].clone()
            for draft in a.drafts[row].tolist():
                if draft >= 0 and 0 <= draft - first < counts_sv.shape[1]:
                    counted[draft - first] += 1
            _penalize(logits_rv[row], counted, a.repetition[row], a.presence[row], a.frequency[row])
    meets = (a.sources < 0) | (previous[a.sources.long().clamp(0, previous.shape[0] - 1)] == a.wanted)
    places = a.tokens.long() - first
    chosen = (meets & (places >= 0) & (places < logits_rv.shape[1])).nonzero().squeeze(1)
    logits_rv.index_put_((a.rows.long()[chosen], places[chosen]), a.values[chosen], accumulate=True)


def _penalize(logits_v: Tensor, counted_v: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> None:
    in_answer = (counted_v & (PROMPT - 1)).float()
    divided = torch.where(logits_v > 0, logits_v / repetition, logits_v * repetition)
    penalized = torch.where(counted_v > 0, divided, logits_v)
    logits_v.copy_(penalized - (frequency * in_answer + presence * (in_answer > 0)))
