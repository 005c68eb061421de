"""What a plan foretells is what loading takes, within 5%."""

from __future__ import annotations

import sys
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

MODELS = Path(__file__).parents[1] / "models"
if str(MODELS) not in sys.path:
    sys.path.insert(0, str(MODELS))

from tiny import TINY_MODELS, Tiny  # noqa: E402

FAMILIES = ("llama", "llama-tied", "llama-biases", "llama-head-dim", "mistral", "qwen2", "qwen3")
#: Matrices outweigh norms, as in real models.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048, "max_position_embeddings": 512}


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


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY_MODELS[name]
    Tiny(tiny.family, {**tiny.fields, **WIDE}).save(tmp_path)
    compare(tmp_path, Rung("auto", "auto"), monkeypatch)


def compare(path: Path, rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(open_model(str(path)), found_cpu(probe(), None), Demand(256))
    fit = next(fit for fit in found.fits if fit.rung == rung)
    weights, kv = loaded_bytes(monkeypatch, path, rung)
    assert fit.weight_bytes == pytest.approx(weights, rel=0.05)
    assert fit.kv_bytes_per_token == kv
