"""What a plan foretells is what loading takes, within 5%."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from turbolm.config import EngineConfig, resolve
from turbolm.engine.build import build
from turbolm.models.decoder import cache_spec
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.hardware import probe
from turbolm.planner.gpus import found_cpu
from turbolm.planner.model import open_model
from turbolm.planner.plan import Demand, Rung, plan


def loaded_bytes(monkeypatch: pytest.MonkeyPatch, path: Path, rung: Rung) -> tuple[int, int]:
    """Bytes of all prepared matrices, and of the KV pool per token, as the engine allocates them."""
    model = open_model(str(path))
    prepared, original = [], CpuOps.prepare_linear  # which prepares embeddings, too

    def record(self, *arguments):
        prepared.append(original(self, *arguments))
        return prepared[-1]

    monkeypatch.setattr(CpuOps, "prepare_linear", record)
    options = EngineConfig(device="cpu", weights=rung.weights, kv=rung.kv, max_context=256, kv_memory="64M")
    config = resolve(options, model.needs(1), probe())
    build(model.checkpoint, model.spec, config, model.spec.vocab_size)
    caches = cache_spec(model.spec, config.kv).allocate(config.num_blocks, config.block_size, torch.device("cpu"))
    tensors = [t for c in caches for t in (c.k, c.v, c.k_scales, c.v_scales) if t is not None]
    return sum(p.num_bytes for p in prepared), sum(t.nbytes for t in tensors) // config.pool_tokens


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("kv", ["auto", "int4"])
def test_a_small_model(small: Path, monkeypatch: pytest.MonkeyPatch, weights: str, kv: str) -> None:
    compare(small, Rung(weights, kv), monkeypatch)


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_smollm2(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    compare(smollm2_path, Rung("auto", kv), monkeypatch)


def compare(path: Path, rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(open_model(str(path)), found_cpu(probe(), None), Demand(256))
    fit = next(fit for fit in found.fits if fit.rung == rung)
    weights, kv = loaded_bytes(monkeypatch, path, rung)
    assert fit.weight_bytes == pytest.approx(weights, rel=0.05)
    assert fit.kv_bytes_per_token == kv
