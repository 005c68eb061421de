"""Choosing a token per row of logits with native kernels: no sort, one pass or two over the row."""

from __future__ import annotations

import torch
from torch import Tensor

from turbolm.ops.cpu import library


def argmax(team: library.Team, logits_rv: Tensor) -> Tensor:
    """int64 [r] the likeliest token of each row, the first of equals; -1 where a row holds NaN, or
    nothing above -inf."""
    tokens = torch.empty(logits_rv.shape[0], dtype=torch.int64)
    _check(logits_rv, torch.float32)
    rows, vocabulary = logits_rv.shape
    library.library().turbolm_argmax(team.handle, logits_rv.data_ptr(), rows, vocabulary, tokens.data_ptr())
    return tokens


def sample(
    team: library.Team,
    logits_rv: Tensor,
    temperature_r: Tensor,
    top_k_r: Tensor,
    top_p_r: Tensor,
    min_p_r: Tensor,
    uniform_r: Tensor,
) -> Tensor:
    """int64 [r] chosen token ids, as `turbolm.ops.sampling.sample` defines them; -1 where a row has
    no distribution (it holds NaN, or nothing above -inf). A row's token depends on that row alone."""
    tokens = torch.empty(logits_rv.shape[0], dtype=torch.int64)
    _check(logits_rv, torch.float32)
    columns = (temperature_r, top_k_r, top_p_r, min_p_r, uniform_r)
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.float64)
    for column, dtype in zip(columns, dtypes, strict=True):
        _check(column, dtype)
        assert column.shape == (logits_rv.shape[0],), "one parameter per row"
    addresses = [column.data_ptr() for column in columns]
    rows, vocabulary = logits_rv.shape
    library.library().turbolm_sample(team.handle, logits_rv.data_ptr(), rows, vocabulary, *addresses, tokens.data_ptr())
    return tokens


def _check(tensor: Tensor, dtype: torch.dtype) -> None:
    assert tensor.dtype == dtype and tensor.is_contiguous(), f"a contiguous {dtype} tensor is needed"
