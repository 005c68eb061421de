"""Products and attention whose rows don't depend, in any bit, on what is computed beside them."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY_MODELS
from torch import Tensor

from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import AttentionSpec, LayerCache
from turbolm.ops.cuda.deterministic import DeterministicCudaOps
from turbolm.ops.cuda.weights import EightBitLinear, Int4Linear
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.triton.fixed import SPLIT, attend, multiply
from turbolm.quant.int4 import int4
from turbolm.quant.int8 import int8
from turbolm.types import Batch

DEVICE = torch.device("cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda")
OPS = DeterministicCudaOps(DEVICE, torch.float16)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=dtype, device=DEVICE)
    multiply(x, weight, None, bias, out)
    return out


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 150), st.sampled_from([(40, 72), (130, 64), (16, 200)]), st.integers(0, 99), st.booleans())
def test_a_row_of_a_product_is_the_same_alone_and_among_others(
    num_rows: int, shape: tuple[int, int], seed: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, shape[1], generator=generator).half().to(DEVICE)
    weight = torch.randn(shape, generator=generator).half().to(DEVICE)
    bias = torch.randn(shape[0], generator=generator).half().to(DEVICE) if has_bias else None
    whole = product(x, weight, bias)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
    row = seed % num_rows
    assert torch.equal(product(x[row : row + 1], weight, bias)[0], whole[row])


def codes(n: int, k: int) -> Tensor:
    return torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_quantized_weights_are_multiplied_by_activations_as_they_are(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n, k = 48, 128
    if kind == "int4":
        zeros = torch.full((n, 1), 7, dtype=torch.uint8)
        weight = int4(codes(n, k), torch.rand(n, 1, generator=generator).half() / 8, zeros)
    else:
        values = torch.randn(n, k, generator=generator)
        stored = (values * 40).round().clamp(-127, 127).to(torch.int8) if kind == "int8" else values
        stored = stored if kind == "int8" else stored.to(torch.float8_e4m3fn)
        weight = int8(codes(n, k).view(torch.int8).repeat(1, 2), torch.rand(n, 1, generator=generator))
        weight = replace(weight, tensors={**weight.tensors, "codes": stored})
    matrix = OPS.prepare_linear([weight], torch.ones(n)) if kind != "fp8" else None
    x = torch.randn(3, k, generator=generator).half().to(DEVICE)
    if matrix is None:
        out = torch.empty(3, n, dtype=torch.float16, device=DEVICE)
        scales = torch.rand(n, generator=generator).to(DEVICE)
        multiply(x, stored.to(DEVICE), scales, None, out)
        expected = x.float() @ (stored.to(DEVICE).float() * scales[:, None]).T
    else:
        assert isinstance(matrix, (Int4Linear, EightBitLinear))
        out = OPS.linear(x, matrix)
        expected = x.float() @ weight.dequantize(torch.float32).to(DEVICE).T + 1
    torch.testing.assert_close(out.float(), expected, rtol=4e-3, atol=2e-2)


SPECS = {
    "grouped": AttentionSpec(8, 2, 32, 32, 0.2),
    "windowed": AttentionSpec(4, 4, 16, 24, 0.3, window=70),
    "capped": AttentionSpec(3, 1, 20, 16, 0.3, softcap=5.0),
}


BLOCK = 16


class Case:
    """Sequences of so many new tokens and so much context; unused slots of the cache hold NaN."""

    def __init__(self, spec: AttentionSpec, sequences: list[tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec, self.counts = spec, [new for new, _ in sequences]
        self.contexts = [context for _, context in sequences]
        columns = max(-(-context // BLOCK) for context in self.contexts)
        self.tables = torch.randperm(len(sequences) * columns, generator=generator).view(-1, columns).int().to(DEVICE)
        shape = (len(sequences) * columns, spec.num_kv_heads, BLOCK)
        pools = [torch.randn(*shape, dim, generator=generator).half() for dim in (spec.head_dim, spec.v_head_dim)]
        for pool in pools:
            for table, context in zip(self.tables.tolist(), self.contexts, strict=True):
                if context % BLOCK:
                    pool[table[context // BLOCK], :, context % BLOCK :] = torch.nan
        self.cache = LayerCache(*(pool.to(DEVICE) for pool in pools))
        self.qkv = torch.randn(sum(self.counts), spec.qkv_width, generator=generator).half().to(DEVICE)

    def attended(self, row: int | None = None, splits_apart: bool | None = None, alone: bool = False) -> Tensor:
        """All rows; or, if `alone`, each sequence's as a decode. row: that row of the first sequence, as a decode."""
        counts, contexts, qkv, tables = self.counts, self.contexts, self.qkv, self.tables
        if row is not None:
            counts, contexts, tables = [1], [contexts[0] - counts[0] + row + 1], tables[:1]
            qkv, alone = qkv[row : row + 1], True
        starts, lengths = (
            torch.tensor(values, dtype=torch.int32, device=DEVICE)
            for values in ([0, *itertools.accumulate(counts)], contexts)
        )
        out = qkv.new_full((qkv.shape[0], self.spec.num_heads * self.spec.v_head_dim), torch.nan)
        attend(
            qkv, starts, None if alone else counts, tables, lengths, max(contexts), self.cache, self.spec, out,
            splits_apart=splits_apart,
        )  # fmt: skip
        return out

    def expected(self) -> Tensor:
        """By the reference, in float32."""
        cache = LayerCache(self.cache.k.float(), self.cache.v.float())
        starts = torch.tensor([0, *itertools.accumulate(self.counts)])
        batch = Batch(
            *(starts,) * 3, starts, torch.tensor(self.contexts, device=DEVICE), self.tables, starts, sum(self.counts),
            len(self.counts), 2, max(self.contexts),
        )  # fmt: skip
        return ReferenceOps(DEVICE, torch.float32).attention(self.qkv.float(), batch, cache, self.spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_chunks_attend_as_the_reference_does(spec: AttentionSpec) -> None:
    case = Case(spec, [(3, 3), (20, 90), (1, SPLIT + 40)])
    torch.testing.assert_close(case.attended().float(), case.expected(), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_row_attends_alike_in_a_chunk_and_alone_and_with_its_splits_apart(spec: AttentionSpec) -> None:
    case = Case(spec, [(40, 2 * SPLIT + 30)])
    whole = case.attended()
    for row in (0, 17, 39):
        for splits_apart in (False, True):
            assert torch.equal(case.attended(row, splits_apart)[0], whole[row])


def test_rows_that_pad_a_step_get_zeros() -> None:
    case = Case(SPECS["grouped"], [(1, 300), (1, 0)])
    for splits_apart in (False, True):
        out = case.attended(splits_apart=splits_apart, alone=True)
        assert not out[1].any() and out[0].isfinite().all()


def batch_of(parts: list[tuple[list[int], int]], blocks: list[list[int]], size: int) -> Batch:
    """Sequences' new tokens and how many came before; decodes first. Logits of all rows."""
    counts = [len(tokens) for tokens, _ in parts]
    starts = [0, *itertools.accumulate(counts)]
    positions = [range(before, before + len(tokens)) for tokens, before in parts]
    num_decodes = sum(count == 1 for count in counts)

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    contexts = [before + len(tokens) for tokens, before in parts]
    return Batch(
        token_ids=ints([token for tokens, _ in parts for token in tokens]),
        positions=ints([p for its in positions for p in its]),
        slots=ints([own[p // size] * size + p % size for own, its in zip(blocks, positions, strict=True) for p in its]),
        query_start=ints(starts),
        context_lens=ints(contexts),
        block_tables=ints(blocks),
        logit_rows=ints(list(range(starts[-1]))),
        num_tokens=starts[-1],
        num_sequences=len(parts),
        max_query=max(counts),
        max_context=max(contexts),
        num_decodes=num_decodes,
        chunks=tuple((starts[i], counts[i], contexts[i]) for i in range(num_decodes, len(parts))),
    )


def test_a_model_says_the_same_whatever_is_beside_a_request_and_however_it_is_chunked(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("model")
    TINY_MODELS["qwen3"].save(folder)
    checkpoint = open_checkpoint(folder)
    ops = DeterministicCudaOps(DEVICE, torch.bfloat16)
    model = load_decoder(decoder_spec(checkpoint.config), Loader(checkpoint.source, ops), 64)
    tokens = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(2)).tolist()
    other = tokens[::-1]
    size, blocks = 8, [[1, 2], [3, 4]]

    def run(steps: list[list[tuple[list[int], int]]]) -> list[Tensor]:
        """Of each step the logits of its last row."""
        caches = cache_spec(model.spec, KvFormat.both("bfloat16")).allocate(6, size, DEVICE)
        found = []
        for step in steps:
            own = [blocks[0] if tokens[before] == ids[0] else blocks[1] for ids, before in step]
            found.append(model.forward(batch_of(step, own, size), caches)[-1].clone())
        return found

    whole = run([[(tokens, 0)]])[0]
    chunked = run([[(tokens[:3], 0)], [(other[:2], 0), (tokens[3:7], 3)], [(other[2:3], 2), (tokens[7:], 7)]])[-1]
    assert torch.equal(whole, chunked)
    assert len(set(whole.tolist())) > 10
