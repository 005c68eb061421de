"""What the benchmarks share: turbolm.bench's workloads and records, and where committed results lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turbolm import LLM
from turbolm.bench.record import machine, write_record
from turbolm.bench.workload import PREFILL, Workload, decode, random_tokens, run_prompts, summary
from turbolm.bench.workload import run as run_turbolm

__all__ = [
    "PREFILL", "RESULTS", "Workload", "config_of", "decode", "machine", "random_tokens", "run_prompts", "run_turbolm",
    "save", "summary",
]  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def save(name: str, record: Mapping[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_record(path, record)
    return path


def config_of(llm: LLM) -> dict[str, Any]:
    return asdict(llm.config)
