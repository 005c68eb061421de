from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from turbolm.engine.rehearsal import rehearsal, rehearsals
from turbolm.engine.step_device import Draws, StepDevice
from turbolm.types import Batch

CPU = torch.device("cpu")


@dataclass
class Limits:
    max_batch_tokens: int = 8192
    max_batch_size: int = 256
    max_context: int = 4096
    block_size: int = 64


@given(st.builds(Limits, st.integers(1, 9000), st.integers(1, 300), st.integers(1, 5000), st.sampled_from([8, 64])))
def test_rehearsals_stay_within_the_limits_and_store_nothing(limits: Limits) -> None:
    for arrays in rehearsals(limits):
        assert len(arrays.token_ids) <= limits.max_batch_tokens
        assert len(arrays.context_lens) <= limits.max_batch_size
        assert arrays.max_context == arrays.context_lens.max() <= limits.max_context
        assert (arrays.slots == -1).all()


def test_a_rehearsal_is_laid_out_like_a_step() -> None:
    arrays = rehearsal([1, 3, 5], 1, 4)
    assert arrays.query_start.tolist() == [0, 1, 4, 9]
    assert arrays.positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 3, 4]
    assert arrays.logit_rows.tolist() == [0, 3, 8]
    assert arrays.chunks == ((1, 3, 3), (4, 5, 5))
    assert arrays.block_tables.shape == (3, 2)
    assert (arrays.num_decodes, arrays.max_query, arrays.max_context) == (1, 5, 5)


def test_rehearsals_come_before_graphs_and_leave_the_last_tokens_alone() -> None:
    seen: list[int] = []

    def forward(batch: Batch) -> torch.Tensor:
        seen.append(batch.num_tokens)
        return torch.zeros(len(batch.logit_rows), 8)

    def choose(logits: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.full((logits.shape[0],), 3, dtype=torch.int32)

    def resolve(token_ids: torch.Tensor, previous: torch.Tensor) -> None:
        token_ids.copy_(torch.where(token_ids < 0, previous[(-1 - token_ids).clamp(0)], token_ids))

    steps = [rehearsal([4], 0, 8), rehearsal([2, 2, 2], 0, 8)]
    device = StepDevice(forward, None, CPU, choose, resolve, rehearsals=steps)
    first = rehearsal([1], 1, 8)
    assert device.compute(first, Draws.plain(1, has_filters=False), gathers=False).download().wait() == [3]
    assert device.warm_up() and device.warm_up() and not device.warm_up()
    assert seen == [1, 4, 6]
    following = first._replace(token_ids=np.array([-1], np.int32))
    device.compute(following, None, gathers=False)  # the token that `first` chose is still known
