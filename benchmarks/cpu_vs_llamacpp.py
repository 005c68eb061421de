"""turbolm beside llama.cpp on the same GGUF file, the same threads, in alternating rounds.

    pip install llama-cpp-python          # builds llama.cpp for this machine
    python benchmarks/cpu_vs_llamacpp.py [--model NAME_OR_GGUF] [--rounds 5] [--save NAME]

Each engine lives in a process of its own and waits idle while the other runs. Both decode greedily,
past end-of-text, without speculation on either side (--speculation auto switches turbolm's on: random
prompts make answers repeat, which flatters it). llama.cpp is driven through its C interface
(llama_decode and its own greedy sampler), with flash attention, and with a KV cache large enough for
all streams.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import PREFILL, Workload, decode, machine, run_turbolm, save, summary

from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch
from turbolm.ops.hardware import probe


class TurbolmEngine:
    def __init__(self, path: str, threads: int, max_context: int, max_streams: int, speculation: str) -> None:
        from turbolm import LLM

        size = {"max_context": max_context, "max_batch_size": max_streams, "speculation": speculation}
        start = time.perf_counter()
        self.llm = LLM(path, progress=False, threads=threads, **size)
        self.load_seconds = time.perf_counter() - start

    def run(self, work: Workload, round_: int) -> float:
        return run_turbolm(self.llm, work, round_)

    def version(self) -> str:
        return str(machine()["turbolm"])


class LlamaCppEngine:
    """Prompts of all streams in one batch, then one batch per step with a token of each stream."""

    def __init__(self, path: str, threads: int, max_context: int, max_streams: int, _: str = "off") -> None:
        import llama_cpp

        self.lib = llama_cpp
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet(llama_cpp), None)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_context * max_streams
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = max_streams
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1  # enabled
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.load_seconds = time.perf_counter() - start
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def run(self, work: Workload, round_: int) -> float:
        self.lib.llama_memory_clear(self.memory, True)
        prompts = work.prompts(self.vocab_size, round_)
        start = time.perf_counter()
        tokens = [self._prefill(stream, prompt) for stream, prompt in enumerate(prompts)]
        if work.is_prefill:
            return work.streams * work.prompt / (time.perf_counter() - start)
        start = time.perf_counter()
        for position in range(work.prompt, work.prompt + work.answer - 1):
            self._fill([(token, position, stream, True) for stream, token in enumerate(tokens)])
            tokens = [
                self.lib.llama_sampler_sample(self.sampler, self.context, stream) for stream in range(work.streams)
            ]
        return work.streams * (work.answer - 1) / (time.perf_counter() - start)

    def _prefill(self, stream: int, prompt: list[int]) -> int:
        rows = [(token, i, stream, i == len(prompt) - 1) for i, token in enumerate(prompt)]
        for first in range(0, len(rows), 512):
            self._fill(rows[first : first + 512])
        return int(self.lib.llama_sampler_sample(self.sampler, self.context, -1))

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
        status = self.lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode returned {status}"

    def version(self) -> str:
        return f"llama-cpp-python {self.lib.__version__}; {self.lib.llama_print_system_info().decode()}"


def _quiet(llama_cpp: Any) -> Any:
    global _callback  # must outlive the call
    _callback = llama_cpp.llama_log_callback(lambda *_: None)
    return _callback


ENGINES = {"turbolm": TurbolmEngine, "llama.cpp": LlamaCppEngine}


def serve(name: str, path: str, speculation: str, threads: int, max_context: int, max_streams: int) -> None:
    """The child: a workload per line in, a figure per line out."""
    engine = ENGINES[name](path, threads, max_context, max_streams, speculation)
    print(json.dumps({"load_seconds": engine.load_seconds, "version": engine.version()}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(engine.run(Workload(**job["work"]), job["round"])), flush=True)


class Child:
    def __init__(self, name: str, *arguments: object) -> None:
        command = [sys.executable, __file__, "--serve", name, *(str(a) for a in arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def run(self, work: Workload, round_: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"work": vars(work), "round": round_}) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the engine's process ended with {self.process.wait()}")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--contexts", type=int, nargs="*", default=[], help="decode one stream after so many tokens")
    parser.add_argument("--speculation", choices=("auto", "off"), default="off")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        name, path, speculation, *numbers = options.serve
        serve(name, path, speculation, *(int(n) for n in numbers))
        return
    works = [PREFILL, *(decode(n) for n in options.streams), *(decode(1, c, 32) for c in options.contexts)]
    longest = max(work.prompt + work.answer for work in works)
    threads = probe().physical_cores
    path = str(fetch(options.model).path)
    children = {
        name: Child(name, path, options.speculation, threads, longest, max(options.streams)) for name in ENGINES
    }
    figures: dict[str, dict[str, list[float]]] = {work.name: {name: [] for name in ENGINES} for work in works}
    for round_ in range(options.rounds + 1):  # the first warms up
        for work in works:
            for name in list(ENGINES) if round_ % 2 else list(ENGINES)[::-1]:
                value = children[name].run(work, round_)
                if round_:
                    figures[work.name][name].append(value)
    rows = {}
    print(
        f"{'tokens per second':34}{'turbolm':>12}{'llama.cpp':>12}{'ratio':>9}   (medians of {options.rounds} rounds)"
    )
    for name, values in figures.items():
        ours, theirs = values["turbolm"], values["llama.cpp"]
        ratio = summary([a / b for a, b in zip(ours, theirs, strict=True)])
        rows[name] = {"turbolm": summary(ours), "llama.cpp": summary(theirs), "ratio": ratio}
        print(f"{name:34}{summary(ours)['median']:12.1f}{summary(theirs)['median']:12.1f}{ratio['median']:8.2f}x")
    if options.save:
        about = {name: child.about for name, child in children.items()}
        record = {"benchmark": "cpu_vs_llamacpp", "model": Path(path).name, "machine": machine()}
        record |= {"threads": threads, "speculation": options.speculation}
        print(f"saved {save(options.save, record | {'engines': about, 'tokens_per_second': rows})}")


if __name__ == "__main__":
    main()
