"""A kernel for decodes is taken only if it computes what Triton's does."""

from __future__ import annotations

import re

import pytest
import torch

from turbolm.errors import ConfigError, EngineError
from turbolm.kv import KvKind
from turbolm.ops import AttentionSpec
from turbolm.ops.cuda import decode_check
from turbolm.ops.cuda.decode import decode_attention
from turbolm.ops.cuda.decode_check import disagreement
from turbolm.ops.triton import decode as triton_decode

SPEC = AttentionSpec(2, 1, 64, 64, 0.125)
DEVICE = torch.device("cpu")


def right(q, tables, contexts, cache, spec, out, counters) -> None:
    plan = triton_decode.DecodePlan(64, 3, 1, 1)
    longest = int(contexts.max())
    triton_decode.decode_attention(
        q, tables, contexts, cache, spec, out, plan=plan, counters=counters, max_context=longest
    )


def wrong_in_one_row(q, tables, contexts, cache, spec, out, counters) -> None:
    right(q, tables, contexts, cache, spec, out, counters)
    out[3, 64] += 0.2


def unwritten_row(q, tables, contexts, cache, spec, out, counters) -> None:
    right(q, tables, contexts, cache, spec, out, counters)
    out[2] = torch.nan


def miscounting(q, tables, contexts, cache, spec, out, counters) -> None:
    right(q, tables, contexts, cache, spec, out, counters)
    counters[1] = 1


def failing(q, tables, contexts, cache, spec, out, counters) -> None:
    raise EngineError("decode.cu doesn't compile")


@pytest.fixture(autouse=True)
def short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_check, "_CONTEXTS", (1, 17, 0, 90))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_the_same_attention_by_other_shares_is_taken(kind: KvKind) -> None:
    assert disagreement(right, SPEC, kind, 16, torch.float16, DEVICE) is None


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong_in_one_row, r"its result is 0\.2"),
        (unwritten_row, "its result is nan"),
        (miscounting, "counters"),
        (failing, "doesn't compile"),
    ],
)
def test_anything_else_is_refused_with_a_reason(kernel, reason: str) -> None:
    found = disagreement(kernel, SPEC, "int8", 16, torch.float16, DEVICE)
    assert found is not None and re.search(reason, found)


@pytest.mark.parametrize(
    ("choice", "reason", "is_taken"),
    [("", None, True), ("", "it is 3 off", False), ("cuda", "not asked for", True), ("triton", None, False)],
)
def test_a_kernel_that_disagrees_is_replaced_and_said(
    choice: str, reason: str | None, is_taken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TURBOLM_DECODE", choice)
    monkeypatch.setattr(decode_check, "disagreement", lambda *_: reason)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    chosen = decode_check._choose.__wrapped__(SPEC, "int8", 16, torch.float16, 0)
    assert chosen is (decode_attention if is_taken else None)
    assert ("it is 3 off" in caplog.text) == (reason == "it is 3 off")


def test_a_choice_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOLM_DECODE", "cudnn")
    with pytest.raises(ConfigError, match=r"'cudnn'; allowed: cuda, triton"):
        decode_check._choose.__wrapped__(SPEC, "int8", 16, torch.float16, 0)
