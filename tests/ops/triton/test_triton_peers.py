"""Kernels over several ranks, each a process here: sums with everything that follows them, rows of divided tables."""

from __future__ import annotations

import time

import pytest
import torch
from forked_ranks import Memory, on_all_ranks, shared_bytes
from torch import Tensor

from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton import peers, sampling, sharded_sampling
from turbolm.ops.triton.sharded_sampling import SharedLogits

REFERENCE = ReferenceOps(torch.device("cpu"), torch.float32)
MAX_ROWS = 3


@pytest.mark.parametrize(("size", "width", "dtype"), [(2, 48, torch.bfloat16), (3, 64, torch.float16)])
def test_sums_with_residual_and_norm(size: int, width: int, dtype: torch.dtype) -> None:
    """Steps of different sizes one after the other, some as partial sums; a rank that comes late every time."""
    steps = [(3, 1), (1, 3), (1, 1), (3, 2), (2, 1)]  # rows, parts
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = [[random(p, t, width) if p > 1 else random(t, width).to(dtype) for _ in range(size)] for t, p in steps]
    residual, weight = random(MAX_ROWS, width).to(dtype), random(width)
    memories = [shared_bytes(peers.Inbox.num_bytes(size, MAX_ROWS, width, dtype)) for _ in range(size)]
    num_results = sum(2 * t * width for t, _ in steps)
    results = [shared_bytes(num_results * dtype.itemsize).view(dtype) for _ in range(size)]

    def work(rank: int) -> None:
        counts = torch.zeros(MAX_ROWS, dtype=torch.int64)
        inbox = peers.Inbox(Memory(memories, rank), counts, rank, size, MAX_ROWS, width, dtype)
        own_residual, offset = residual.clone(), 0
        for number, (num_rows, _) in enumerate(steps):
            if number % size == rank:
                time.sleep(0.02)
            out, rows = torch.empty(num_rows, width, dtype=dtype), own_residual[:num_rows]
            peers.reduce_add_rms_norm(inputs[number][rank], rows, weight, 1e-5, out, inbox)
            for found in (out, rows):
                results[rank][offset : offset + found.numel()] = found.reshape(-1)
                offset += found.numel()

    on_all_ranks(size, work)
    expected, offset = residual.clone().float(), 0
    for number, (num_rows, num_parts) in enumerate(steps):
        own = [x.sum(0).to(dtype) if num_parts > 1 else x for x in inputs[number]]
        rows = expected[:num_rows]
        rows.copy_((rows + sum(x.float() for x in own)).to(dtype))
        normed = REFERENCE.rms_norm(rows, weight, 1e-5)
        for wanted in (normed, rows):
            found = results[0][offset : offset + wanted.numel()].view(wanted.shape).float()
            torch.testing.assert_close(found, wanted, rtol=2e-2, atol=4e-2)
            offset += wanted.numel()
    for other in results[1:]:
        assert torch.equal(other, results[0]), "all ranks get the same bits"


def test_rows_of_a_divided_table() -> None:
    size, num_rows, width = 3, 5, 40
    tables = [torch.randn(num_rows, width).to(torch.bfloat16) for _ in range(size)]
    addresses = torch.tensor([table.data_ptr() for table in tables])
    ids = torch.tensor([0, 4, 5, 14, 9, -1, 15, 2**31 - 1], dtype=torch.int32)
    out = torch.empty(len(ids), width, dtype=torch.bfloat16)
    peers.embedding(ids, addresses, num_rows, 0.5, out)
    known = torch.where((ids >= 0) & (ids < 15), ids, 0).long()
    assert torch.equal(out, (torch.cat(tables)[known].float() * 0.5).to(torch.bfloat16))


def test_ranks_choose_what_whole_logits_give() -> None:
    size, width, max_rows, vocab_size = 2, 2048, 5, 3500
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(max_rows, vocab_size, generator=generator) * 3
    whole[1, 3100] = 40.0  # of the other rank
    whole[4] = -torch.inf
    temperature = torch.tensor([1.0, 0.0, 0.7, 1.5, 1.0])
    draws = [torch.rand(max_rows, generator=generator, dtype=torch.float64) for _ in range(3)]
    neutral = (torch.zeros(max_rows, dtype=torch.int32), torch.ones(max_rows), torch.zeros(max_rows))
    expected = [sampling.sample(whole, temperature, *neutral, uniform, has_filters=False).tolist() for uniform in draws]
    logits = [shared_bytes(max_rows * width * 4) for _ in range(size)]
    for rank, part in enumerate(logits):
        own = whole[:, rank * width : (rank + 1) * width]
        part.view(torch.float32).view(max_rows, width)[:, : own.shape[1]] = own
        part.view(torch.float32).view(max_rows, width)[:, own.shape[1] :] = 99.0  # nobody may choose these
    inboxes = [shared_bytes(SharedLogits.inbox_bytes(size, max_rows, width)) for _ in range(size)]
    results = [shared_bytes(len(draws) * max_rows * 4).view(torch.int32).view(len(draws), -1) for _ in range(size)]

    def work(rank: int) -> None:
        counts = torch.zeros(max_rows, dtype=torch.int64)
        shared = SharedLogits(
            Memory(logits, rank), Memory(inboxes, rank), counts, rank, size, max_rows, width, vocab_size
        )
        for number, uniform in enumerate(draws):
            num_rows = max_rows if number != 1 else 2
            found = sharded_sampling.sample(num_rows, temperature[:num_rows], uniform[:num_rows], shared)
            results[rank][number, :num_rows] = found

    on_all_ranks(size, work)
    expected[1][2:] = [0] * (max_rows - 2)
    assert [result.tolist() for result in results] == [expected] * size
