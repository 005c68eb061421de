"""Choosing a token per row of logits: the reference in plain torch.

    r  rows    v  vocabulary

The draw is the inverse of the cumulative distribution over the kept tokens in token-id order, at a
uniform number that the caller gives: the same number and logits choose the same token on every
backend and in every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are rarely spread wider than this: sorting so many candidates replaces sorting the vocabulary.
_CANDIDATES = 1024


def sample(
    logits_rv: Tensor, temperature_r: Tensor, top_k_r: Tensor, top_p_r: Tensor, min_p_r: Tensor, uniform_r: Tensor
) -> Tensor:
    """int64 [r] chosen token ids; -1 where a row has no distribution (it holds NaN, or nothing above -inf).

    float32 temperatures (0: the likeliest token), int64 top_k (0: all), float32 top_p and min_p,
    float64 uniform numbers in [0, 1). Filters apply in the order temperature, top-k, top-p (of what
    top-k left), min-p.
    """
    valid = logits_rv.amax(-1) > -torch.inf  # the largest of a row with NaN is NaN
    greedy = torch.where(valid, logits_rv.argmax(-1), -1)
    drawn = (temperature_r > 0) & valid
    if not bool(drawn.any()):
        return greedy
    rows = drawn.nonzero().squeeze(1)
    scaled = logits_rv[rows] / temperature_r[rows].unsqueeze(1)
    probs = torch.softmax(scaled, dim=-1)
    cutoff = _cutoff(probs, top_k_r[rows], top_p_r[rows], min_p_r[rows])
    probs = torch.where(probs >= cutoff.unsqueeze(1), probs, 0.0)
    cumulative = probs.double().cumsum(-1)
    target = uniform_r[rows] * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    # Rounding can leave the target past the last kept token.
    last = probs.shape[1] - 1 - (probs.flip(1) > 0).int().argmax(-1)
    greedy[rows] = torch.minimum(chosen, last)
    return greedy


def _cutoff(probs_rv: Tensor, top_k_r: Tensor, top_p_r: Tensor, min_p_r: Tensor) -> Tensor:
    """[r] the smallest probability that the filters keep."""
    cutoff = min_p_r * probs_rv.amax(-1)
    if bool((top_k_r > 0).any() | (top_p_r < 1).any()):
        num = min(_CANDIDATES, probs_rv.shape[1])
        if bool((top_k_r > num).any()):
            num = probs_rv.shape[1]
        best = torch.topk(probs_rv, num).values  # [r, num], falling
        if num < probs_rv.shape[1] and bool((((top_k_r == 0) & (best.sum(-1) < top_p_r)) & (top_p_r < 1)).any()):
            best = torch.sort(probs_rv, descending=True).values
        cutoff = torch.maximum(cutoff, _top_k_top_p(best, top_k_r, top_p_r))
    return cutoff


def _top_k_top_p(best_rn: Tensor, top_k_r: Tensor, top_p_r: Tensor) -> Tensor:
    """[r] the smallest probability kept, from the falling best probabilities of each row."""
    index = torch.arange(best_rn.shape[1], device=best_rn.device)
    in_k = (top_k_r.unsqueeze(1) == 0) | (index < top_k_r.unsqueeze(1))
    kept = torch.where(in_k, best_rn, 0.0)
    # What top-k left is the whole that top_p is a part of; without top-k, the whole is 1.
    whole = torch.where(top_k_r > 0, kept.sum(-1), 1.0)
    before = kept.double().cumsum(-1) - kept
    in_p = (before < (top_p_r * whole).unsqueeze(1)) | (index == 0)
    in_p |= (top_p_r == 1).unsqueeze(1)
    cutoff = torch.where(in_k & in_p, best_rn, torch.inf).amin(-1)
    unfiltered = (top_k_r == 0) & (top_p_r == 1)
    return torch.where(unfiltered, 0.0, cutoff)
