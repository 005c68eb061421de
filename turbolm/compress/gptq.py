"""GPTQ: columns are rounded one after the other, and what rounding one changes in the output is made up for by
those that follow.

Source: Frantar et al., GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.compress.grid import Grid, Rounded, search_grid
from turbolm.compress.recipe import Order
from turbolm.quant.rounding import int4_codes

_BLOCK = 64  # columns between updates of all that follow


def gptq(matrix_nk: Tensor, gram_kk: Tensor, grid: Grid, order: Order, damping: float) -> Rounded | None:
    """Round a matrix [n, k] (any number of matrices with the same input, stacked by rows). None: the gram is too
    nearly singular for any damping up to 1."""
    k = matrix_nk.shape[1]
    gram, matrix = gram_kk.clone(), matrix_nk
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0  # such a column is rounded by itself
    by_activation = torch.argsort(gram.diagonal(), descending=True)
    in_order = torch.arange(k, device=gram.device)
    stored = by_activation if order == "group" else in_order  # the input feature of each stored column
    turn = by_activation if order == "static" else in_order  # the stored column of each step
    if order == "group":
        gram, matrix = gram[stored][:, stored], matrix[:, stored]
    scales, zeros = search_grid(matrix.contiguous(), gram, grid)
    inverse = _inverse_factor(gram[turn][:, turn] if order == "static" else gram, damping)
    if inverse is None:
        return None
    groups = turn // grid.width(k)
    codes = torch.empty_like(matrix, dtype=torch.uint8)
    codes[:, turn] = _round_columns(matrix.T[turn], inverse, scales.T[groups], zeros.T[groups]).T
    return Rounded(codes, scales, zeros.to(torch.uint8), stored if order == "group" else None)


def _inverse_factor(gram_kk: Tensor, damping: float) -> Tensor | None:
    """The upper Cholesky factor of the inverse of the damped gram, each row divided by its diagonal entry."""
    mean = gram_kk.diagonal().mean()
    while damping <= 1:
        damped = gram_kk.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed) and bool(torch.isfinite(upper).all()):
                factor: Tensor = upper / upper.diagonal().unsqueeze(1)
                return factor
        damping *= 10
    return None


def _round_columns(columns_kn: Tensor, inverse_kk: Tensor, scales_kn: Tensor, zeros_kn: Tensor) -> Tensor:
    """uint8 codes [k, n] of columns in the order of their turns, which are overwritten; with each one's scales."""
    k = columns_kn.shape[0]
    codes = torch.empty_like(columns_kn, dtype=torch.uint8)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = torch.empty_like(columns_kn[start:stop])
        for turn in range(start, stop):
            column, scale, zero = columns_kn[turn], scales_kn[turn], zeros_kn[turn]
            nearest = int4_codes(column, scale, zero)
            codes[turn] = nearest
            error = torch.sub(column, (nearest - zero) * scale, out=errors[turn - start])
            columns_kn[turn + 1 : stop].addr_(inverse_kk[turn, turn + 1 : stop], error, alpha=-1)
        columns_kn[stop:].addmm_(inverse_kk[start:stop, stop:].T, errors, alpha=-1)
    return codes
