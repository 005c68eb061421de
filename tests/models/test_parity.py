"""Logits against transformers in float32, for every family, in ragged batches and in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TINY_MODELS, save_as_internlm2, save_as_internlm3
from torch import Tensor
from transformers import PreTrainedModel

from turbolm.kv import KvFormat
from turbolm.layers.mlp import GatedMlp
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import LayerCache
from turbolm.ops.reference import ReferenceOps
from turbolm.quant.rounding import Rounding
from turbolm.types import Batch

BLOCK = 8
TABLES = ((5, 2, 9, 0), (1, 7, 3, 4), (10, 6, 11, 8))  # blocks of three sequences, in no order
LENGTHS = (13, 1, 26)

SAVERS: dict[str, Callable[[Path], PreTrainedModel]] = {name: tiny.save for name, tiny in TINY_MODELS.items()}
SAVERS["internlm2"] = save_as_internlm2
SAVERS["internlm2-tied"] = lambda folder: save_as_internlm2(folder, {"tie_word_embeddings": True})
SAVERS["internlm3"] = save_as_internlm3


def load(folder: Path, max_context: int = 32, rounding: Rounding | None = None) -> tuple[Decoder, list[LayerCache]]:
    checkpoint = open_checkpoint(folder)
    spec = decoder_spec(checkpoint.config)
    ops = ReferenceOps(torch.device("cpu"), torch.float32)
    caches = cache_spec(spec, KvFormat.both("float32")).allocate(12, BLOCK, ops.device)
    for cache in caches:  # what a recycled block holds must not matter
        cache.k.fill_(torch.nan)
        cache.v.fill_(torch.nan)
    loader = Loader(checkpoint.source, ops, packing=checkpoint.packing, rounding=rounding)
    return load_decoder(spec, loader, max_context), caches


def batch_of(pieces: Sequence[tuple[int, Tensor, int]]) -> Batch:
    """A step of (sequence number, all its token ids, how many are computed already) with all the
    further tokens new, and logits of every row."""
    new = [(tokens[done:], done, TABLES[i]) for i, tokens, done in pieces]
    positions = [torch.arange(done, done + len(tokens)) for tokens, done, _ in new]
    tables = torch.tensor([table for *_, table in new])
    slots = [tables[i][p // BLOCK] * BLOCK + p % BLOCK for i, p in enumerate(positions)]
    counts = torch.tensor([0] + [len(tokens) for tokens, *_ in new])
    contexts = torch.tensor([len(tokens) for _, tokens, _ in pieces])

    def int32(x: Tensor) -> Tensor:
        return x.to(torch.int32)

    return Batch(
        token_ids=int32(torch.cat([tokens for tokens, *_ in new])),
        positions=int32(torch.cat(positions)),
        slots=int32(torch.cat(slots)),
        query_start=int32(counts.cumsum(0)),
        context_lens=int32(contexts),
        block_tables=int32(tables),
        logit_rows=int32(torch.arange(int(counts.sum()))),
        num_tokens=int(counts.sum()),
        num_sequences=len(pieces),
        max_query=int(counts.max()),
        max_context=int(contexts.max()),
    )


def prompts(vocab_size: int = 96) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, vocab_size, (length,)) for length in LENGTHS]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", SAVERS)
@torch.inference_mode()
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = SAVERS[name](tmp_path)
    model, caches = load(tmp_path)
    tokens = prompts()
    expected = [reference(t[None]).logits[0] for t in tokens]

    whole = model.forward(batch_of([(i, t, 0) for i, t in enumerate(tokens)]), caches)
    assert_close(whole, torch.cat(expected))

    model, caches = load(tmp_path)
    for split in range(1, LENGTHS[0]):  # a prefill in two chunks, beside a whole one, then beside a decode
        first = model.forward(batch_of([(0, tokens[0][:split], 0), (2, tokens[2][:-1], 0)]), caches)
        second = model.forward(batch_of([(2, tokens[2], LENGTHS[2] - 1), (0, tokens[0], split)]), caches)
        assert_close(torch.cat([first[:split], second[1:]]), expected[0])
        assert_close(torch.cat([first[split:], second[:1]]), expected[2])


@torch.inference_mode()
def test_the_last_layer_goes_on_with_the_wanted_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAVERS["mistral-window"](tmp_path)
    model, caches = load(tmp_path)
    batch = batch_of([(i, t, 0) for i, t in enumerate(prompts())])
    last = batch.query_start[1:] - 1
    whole = model.forward(batch, caches)
    rows = []
    mlp_call = GatedMlp.__call__
    monkeypatch.setattr(GatedMlp, "__call__", lambda mlp, x, places: rows.append(len(x)) or mlp_call(mlp, x, places))
    some = model.forward(replace(batch, logit_rows=last), caches)
    assert_close(some, whole[last])
    assert rows == [batch.num_tokens] * (len(model.layers) - 1) + [len(last)]


@torch.inference_mode()
def test_decode_one_token_at_a_time(tmp_path: Path) -> None:
    reference = SAVERS["mistral-window"](tmp_path)
    model, caches = load(tmp_path)
    tokens = prompts()
    rows = [model.forward(batch_of([(2, tokens[2][: n + 1], n), (0, tokens[0][:1], 0)]), caches)[0] for n in range(26)]
    assert_close(torch.stack(rows), reference(tokens[2][None]).logits[0])


@torch.inference_mode()
def test_dynamic_rope_beyond_the_trained_context(tmp_path: Path) -> None:
    """transformers stretches the base by the length of what it computes; turbolm by the longest
    context that the engine allows: the same where both are one length."""
    reference = SAVERS["llama-dynamic"](tmp_path)
    model, caches = load(tmp_path, max_context=90)
    tokens = torch.randint(0, 96, (90,))
    caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(12, BLOCK, torch.device("cpu"))
    table = torch.arange(12, dtype=torch.int32)[None]
    index = torch.arange(90, dtype=torch.int32)
    ends = torch.tensor([0, 90], dtype=torch.int32)
    batch = Batch(tokens.int(), index, index, ends, ends[1:], table, index, 90, 1, 90, 90)
    assert_close(model.forward(batch, caches), reference(tokens[None]).logits[0])
