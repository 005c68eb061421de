"""What calibration keeps of the inputs of linear layers, and the errors that it measures.

t  tokens      k  input channels      n  rows of a matrix
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_ROWS = 512  # of a point's inputs that are kept as they are
_CHUNK = 1 << 25  # numbers of a temporary


@dataclass(slots=True)
class Statistics:
    """Sums over all tokens of one input. `num_tokens` 0: no token came this way."""

    gram: Tensor  # [k, k] float32, the sum of x xᵀ
    mean_abs: Tensor  # [k] float32; a sum until `finish`
    max_abs: Tensor  # [k] float32
    rows: list[Tensor]  # some of the inputs, [·, k] float32
    share: float  # of the tokens that are kept in `rows`
    num_tokens: int = 0
    num_dropped: int = 0  # tokens with numbers that are not finite

    @classmethod
    def empty(cls, width: int, expected_tokens: int, device: torch.device) -> Statistics:
        zeros = torch.zeros(width, device=device)
        gram = torch.zeros(width, width, device=device)
        return cls(gram, zeros, zeros.clone(), [], min(1.0, _MAX_ROWS / max(expected_tokens, 1)))

    def add(self, x_tk: Tensor) -> None:
        x = x_tk.float()
        finite = torch.isfinite(x).all(1)
        if not bool(finite.all()):
            self.num_dropped += int((~finite).sum())
            x = x[finite]
        if not x.shape[0]:
            return
        self.gram.addmm_(x.T, x)
        self.mean_abs += x.abs().sum(0)
        self.max_abs = torch.maximum(self.max_abs, x.abs().amax(0))
        count = max(1, round(x.shape[0] * self.share))
        self.rows.append(x[:: -(-x.shape[0] // count)].clone())
        self.num_tokens += x.shape[0]

    def finish(self) -> None:
        """Sums become means."""
        if self.num_tokens:
            self.gram /= self.num_tokens
            self.mean_abs /= self.num_tokens

    def scale(self, scales_k: Tensor) -> None:
        """The input was divided by `scales_k`."""
        self.gram /= scales_k
        self.gram /= scales_k[:, None]
        self.mean_abs = self.mean_abs / scales_k
        self.max_abs = self.max_abs / scales_k
        self.rows = [rows / scales_k for rows in self.rows]

    @property
    def num_dead(self) -> int:
        """Channels that are zero for all tokens."""
        return int((self.max_abs == 0).sum())

    def sampled(self) -> Tensor:
        """Some of the inputs, [·, k]."""
        return torch.cat(self.rows)


def output_power(matrix_nk: Tensor, gram_kk: Tensor | None) -> Tensor:
    """The mean over tokens of ‖W x‖², as a 0-dimensional tensor; without a gram of ‖W‖², as if all channels
    were independent and alike."""
    if gram_kk is None:
        return matrix_nk.square().sum()
    step = max(1, _CHUNK // matrix_nk.shape[1])
    parts = [((rows @ gram_kk) * rows).sum() for rows in torch.split(matrix_nk, step)]
    return torch.stack(parts).sum()


def relative_error(matrix_nk: Tensor, rounded_nk: Tensor, gram_kk: Tensor | None) -> float:
    """‖(W - W') x‖² / ‖W x‖² over all tokens."""
    power = float(output_power(matrix_nk, gram_kk))
    return float(output_power(matrix_nk - rounded_nk, gram_kk)) / power if power > 0 else 0.0
