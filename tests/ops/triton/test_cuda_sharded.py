"""Two ranks of the GPU backend, each a process in which Triton's interpreter runs kernels, compute what one does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked_ranks import Memory, on_all_ranks, shared_bytes
from tiny import Tiny
from torch import Tensor

from turbolm.engine.batch import lay_out
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.models.sharding import ShardLoader, cuts, shard_spec
from turbolm.ops.cuda import sharded
from turbolm.ops.cuda.ops import CudaOps
from turbolm.ops.cuda.sharded import ShardedCudaOps
from turbolm.ops.cuda.sharded_deterministic import ShardedDeterministicOps
from turbolm.ops.cuda.weights import DenseLinear
from turbolm.ops.reference import ReferenceOps
from turbolm.parallel.shard import Shard
from turbolm.types import Batch, Request, Sequence

CPU = torch.device("cpu")
SIZE, VOCABULARY, HIDDEN = 2, 16500, 64
BF16 = KvFormat.both("bfloat16")


class SharedGroup:
    """Collectives of a rank whose sums all go through shared memory."""

    size = SIZE

    def __init__(self, rank: int, memories: Iterator[list[Tensor]], arrivals: Tensor) -> None:
        self.rank, self._memories, self._arrivals = rank, memories, arrivals

    def share(self, num_bytes: int) -> Memory:
        self._arrivals[self.rank] += 1
        while bool((self._arrivals < self._arrivals[self.rank]).any()):
            time.sleep(0.001)
        memories = next(self._memories)
        return Memory([memory[:num_bytes] for memory in memories], self.rank)

    def all_reduce(self, x: Tensor) -> None:
        raise AssertionError("small steps need no other sums")

    def all_gather(self, x: Tensor) -> Tensor:
        raise AssertionError("logits stay apart")


def batches() -> list[Batch]:
    """A prompt and a decode."""
    tokens = (5, 16400, 9000)
    sequence = Sequence(Request("a", tokens))
    sequence.blocks = [1]
    items = [ScheduledSequence(sequence, 0, 2, True), ScheduledSequence(sequence, 2, 1, True)]
    rows = [[1], [0]]
    return [
        lay_out(Step((item,), item.num_tokens), 16, [wanted]).batch(torch.from_numpy)
        for item, wanted in zip(items, rows, strict=True)
    ]


def test_two_ranks_compute_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What runs on a GPU alone: copies from pinned memory, and products of bfloat16 that give float32.
    monkeypatch.setattr(CudaOps, "_copy", lambda self, source, target: target.copy_(source))
    monkeypatch.setattr(DenseLinear, "logits", lambda self, x, out: out.copy_(x.float() @ self.weight.float().T))
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 64}
    Tiny("Llama", sizes | {"tie_word_embeddings": True}).save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = decoder_spec(checkpoint.config)
    alone = CudaOps(CPU, torch.bfloat16)
    model = load_decoder(spec, Loader(checkpoint.source, alone), 64)
    caches = cache_spec(spec, BF16).allocate(2, 16, CPU)
    expected = [model.forward(batch, caches).clone() for batch in batches()]
    memories = [[shared_bytes(4 << 20) for _ in range(SIZE)] for _ in range(4)]
    arrivals = shared_bytes(8 * SIZE).view(torch.int64)  # at `share`, of each rank
    width = Shard(0, SIZE).vocabulary_size(VOCABULARY)
    logits = [shared_bytes(2 * width * 4).view(torch.float32).view(2, width) for _ in range(SIZE)]
    tokens = [shared_bytes(2 * 4).view(torch.int32) for _ in range(SIZE)]

    def work(rank: int) -> None:
        shard = Shard(rank, SIZE)
        ops = ShardedCudaOps(CPU, torch.bfloat16, SharedGroup(rank, iter(memories), arrivals), VOCABULARY, HIDDEN)
        part = load_decoder(shard_spec(spec, shard), ShardLoader(checkpoint.source, ops, cuts(spec, shard)), 64)
        time.sleep(rank)  # whose table the first one needs
        ops.finish_loading(4, part.spec.vocab_size)
        own_caches = cache_spec(part.spec, BF16).allocate(2, 16, CPU)
        for number, batch in enumerate(batches()):
            found = part.forward(batch, own_caches)
            logits[rank][number] = found[0]
            uniform = torch.tensor([0.5], dtype=torch.float64)
            columns = (torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1), uniform)
            tokens[rank][number] = ops.sample(found, *columns, has_filters=False)[0]

    on_all_ranks(SIZE, work)
    whole = torch.cat(logits, dim=1)[:, :VOCABULARY]
    for number, wanted in enumerate(expected):
        torch.testing.assert_close(whole[number], wanted[0], rtol=0.05, atol=0.08)
        assert [int(chosen[number]) for chosen in tokens] == [int(whole[number].argmax())] * SIZE


class GatheringGroup:
    """Collectives of a rank whose GPU can't reach the others' memory."""

    size = SIZE

    def __init__(self, rank: int, places: list[Tensor], arrivals: Tensor) -> None:
        self.rank, self._places, self._arrivals = rank, places, arrivals

    def share(self, num_bytes: int) -> None:
        return None

    def _meet(self) -> None:
        self._arrivals[self.rank] += 1
        while bool((self._arrivals < self._arrivals[self.rank]).any()):
            time.sleep(0.0002)

    def all_gather(self, x: Tensor) -> Tensor:
        own = x.contiguous().flatten().view(torch.uint8)
        self._places[self.rank][: own.numel()] = own
        self._meet()
        found = torch.stack([place[: own.numel()].clone().view(x.dtype).view(x.shape) for place in self._places])
        self._meet()
        return found

    def all_reduce(self, x: Tensor) -> None:
        """Of rows of the table, which one rank has."""
        x.copy_(self.all_gather(x).sum(0))


def laid_out(parts: list[tuple[Sequence, int, int]]) -> Batch:
    """(sequence, first token, tokens) in one step, with the logits of all rows."""
    items = tuple(ScheduledSequence(sequence, start, count, True) for sequence, start, count in parts)
    step = Step(items, sum(count for *_, count in parts))
    return lay_out(step, 16, [list(range(count)) for *_, count in parts]).batch(torch.from_numpy)


@pytest.mark.parametrize("can_share", [True, False])
def test_the_bits_of_a_row_over_two_ranks_do_not_depend_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_share: bool
) -> None:
    """Alone in chunks, and in a step with others that has more rows than one sum takes. (In 16-bit floats with 5 bits
    of exponent: the interpreter takes products of the others for those of whole numbers.)"""
    monkeypatch.setattr(sharded, "_MAX_SENT", 2 * SIZE)
    Tiny("Llama", {"num_hidden_layers": 1, "head_dim": 32, "tie_word_embeddings": True}).save(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = decoder_spec(checkpoint.config)
    first, second = (Sequence(Request(name, tokens)) for name, tokens in (("a", (5, 80, 7, 7)), ("b", (3, 90, 4))))
    first.blocks, second.blocks = [1], [0]
    memories = [[shared_bytes(1 << 20) for _ in range(SIZE)] for _ in range(2)]
    arrivals = shared_bytes(8 * SIZE).view(torch.int64)
    width, count = Shard(0, SIZE).vocabulary_size(spec.vocab_size), len(first.token_ids)
    found = [shared_bytes(3 * count * width * 4).view(torch.float32).view(3, count, width) for _ in range(SIZE)]

    def work(rank: int) -> None:
        shard = Shard(rank, SIZE)
        group = (
            SharedGroup(rank, iter(memories), arrivals) if can_share else GatheringGroup(rank, memories[0], arrivals)
        )
        ops = ShardedDeterministicOps(CPU, torch.float16, group, spec.vocab_size, spec.hidden_size)
        part = load_decoder(shard_spec(spec, shard), ShardLoader(checkpoint.source, ops, cuts(spec, shard)), 64)
        ops.finish_loading(16, part.spec.vocab_size)
        assert (ops._inbox is not None) == can_share
        caches = cache_spec(part.spec, KvFormat.both("float16")).allocate(4, 16, CPU)
        for way, chunks in enumerate(([4], [1, 3], [4])):
            first.blocks, start = [1 + way], 0
            for chunk in chunks:
                beside = [(second, 0, 3)] if way == 2 else []
                logits = part.forward(laid_out([(first, start, chunk), *beside]), caches)
                found[rank][way, start : start + chunk] = logits[:chunk]
                start += chunk

    on_all_ranks(SIZE, work)
    model = load_decoder(spec, Loader(checkpoint.source, ReferenceOps(CPU, torch.float32)), 64)
    caches = cache_spec(spec, KvFormat.both("float32")).allocate(4, 16, CPU)
    expected = model.forward(laid_out([(first, 0, count)]), caches)
    whole = torch.cat([own[0] for own in found], dim=1)[:, : spec.vocab_size]
    torch.testing.assert_close(whole, expected, rtol=0.01, atol=0.01)
    for own in found:
        assert torch.equal(own[1], own[0]), "by how the prompt was divided"
        assert torch.equal(own[2], own[0]), "by what is beside it"
