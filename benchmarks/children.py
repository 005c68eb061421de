"""Engines in processes of their own, each idle while another runs: a job per line in, a figure per line out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llamacpp import LlamaCppEngine
from measure import Workload, machine, random_tokens, run_prompts, run_turbolm

from turbolm import LLM

ENGINES = ("turbolm", "llama.cpp")


@dataclass(frozen=True)
class Setup:
    """How an engine is loaded."""

    path: str
    threads: int
    max_context: int
    max_streams: int
    speculation: str = "off"  # turbolm's
    kv_tokens: int = 0  # llama.cpp's KV cache; 0: `max_context` for each stream
    kv_memory: str = "auto"  # turbolm's


class TurbolmEngine:
    def __init__(self, setup: Setup) -> None:
        start = time.perf_counter()
        self.llm = LLM(
            setup.path,
            progress=False,
            threads=setup.threads,
            max_context=setup.max_context,
            max_batch_size=setup.max_streams,
            speculation=setup.speculation,
            kv_memory=setup.kv_memory,
        )
        self.load_seconds = time.perf_counter() - start
        self.vocab_size = self.llm.tokenizer.vocab_size

    def run(self, work: Workload, round_: int) -> float:
        return run_turbolm(self.llm, work, round_)

    def run_prompts(self, prompts: Sequence[Sequence[int]], answer: int) -> float:
        return run_prompts(self.llm, prompts, answer)

    def about(self) -> dict[str, Any]:
        tokens = self.llm.config.pool_tokens
        return {"load_seconds": self.load_seconds, "version": str(machine()["turbolm"]), "kv_tokens": tokens}


def nested_prompts(streams: int, context: int, vocab_size: int) -> list[list[int]]:
    """Of each stream the same tokens, whatever the number of streams, longer contexts going on where shorter end: so
    that what was computed for one case serves the next."""
    return [random_tokens(np.random.default_rng(stream), vocab_size, context) for stream in range(streams)]


def serve(name: str, setup: Setup) -> None:
    """The child."""
    if name == "turbolm":
        engine: Any = TurbolmEngine(setup)
    else:
        engine = LlamaCppEngine(setup.path, setup.threads, setup.max_context, setup.max_streams, setup.kv_tokens)
    print(json.dumps(engine.about()), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "work" in job:
            value = engine.run(Workload(**job["work"]), job["round"])
        else:
            prompts = nested_prompts(job["streams"], job["context"], engine.vocab_size)
            value = engine.run_prompts(prompts, job["answer"])
        print(json.dumps(value), flush=True)


class Child:
    def __init__(self, name: str, setup: Setup) -> None:
        command = [sys.executable, str(Path(__file__)), name, json.dumps(asdict(setup))]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = self._answer()

    def run(self, work: Workload, round_: int) -> float:
        """Tokens per second of the workload, with fresh prompts."""
        return float(self._ask({"work": asdict(work), "round": round_}))

    def run_after(self, streams: int, context: int, answer: int) -> float:
        """Tokens per second of `streams` answers after `context` tokens that may be cached already."""
        return float(self._ask({"streams": streams, "context": context, "answer": answer}))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: its process ended with status {self.process.wait()}")
        return json.loads(line)


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
