"""From the start of a process to its first token, and what it takes in memory, beside llama.cpp's.

    python benchmarks/cpu_start.py [--model NAME_OR_GGUF] [--rounds 5] [--save NAME]     # llama-cpp-python optional

Alternating rounds, files cached, one token of one short prompt:
    turbolm chat         the command line, until the first byte of its answer
    turbolm              a Python program: import, LLM(...), first delta
    llama.cpp            a Python program: import, llama_cpp.Llama(...), first token
Peak memory is the system's figure for the process (VmHWM), mapped file pages that it touched among it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "Why is the sky blue?"
CONTEXT = 2048


def peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the system doesn't tell VmHWM")


def first_token_of_turbolm(path: str) -> dict[str, float]:
    start = time.perf_counter()
    from turbolm import LLM, SamplingParams

    imported = time.perf_counter()
    llm = LLM(path, progress=False, max_context=CONTEXT)
    loaded = time.perf_counter()
    next(iter(llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=1))))
    return {"import": imported - start, "load": loaded - imported, "prompt": time.perf_counter() - loaded}


def first_token_of_llama_cpp(path: str) -> dict[str, float]:
    start = time.perf_counter()
    from llama_cpp import Llama

    imported = time.perf_counter()
    llm = Llama(path, n_ctx=CONTEXT, verbose=False)
    loaded = time.perf_counter()
    next(iter(llm(PROMPT, max_tokens=1, temperature=0, stream=True)))
    return {"import": imported - start, "load": loaded - imported, "prompt": time.perf_counter() - loaded}


FIRST_TOKEN = {"turbolm": first_token_of_turbolm, "llama.cpp": first_token_of_llama_cpp}


def run_child(name: str, path: str) -> dict[str, float]:
    """Seconds of each phase and in all, peak bytes."""
    if name == "turbolm chat":
        options = ["--max-context", str(CONTEXT), "--temperature", "0", "--max-tokens", "1", "--prompt", PROMPT]
        command = [sys.executable, "-m", "turbolm", "chat", path, *options]
    else:
        command = [sys.executable, __file__, "--child", name, path]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        rest = process.stdout.read()
    if process.returncode or not first:
        sys.exit(f"{name} ended with status {process.returncode}: {' '.join(command)}")
    return {"start": seconds} | ({} if name == "turbolm chat" else json.loads(first + rest))


def measure(path: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """By name, a record a round; round 0 fills the caches and isn't kept."""
    names = ["turbolm chat", "turbolm", *(["llama.cpp"] if importlib.util.find_spec("llama_cpp") else [])]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for round_ in range(rounds + 1):
        for name in names if round_ % 2 else names[::-1]:
            values = run_child(name, path)
            if round_:
                found[name].append(values)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, path = options.child
        phases = FIRST_TOKEN[name](path)
        print(json.dumps(phases | {"peak": peak_bytes()}), flush=True)
        return
    from measure import machine, save, summary  # a child is timed without them

    from turbolm.config import DEFAULT_MODEL, format_size
    from turbolm.hub import fetch

    file = fetch(options.model or DEFAULT_MODEL).path
    found = measure(str(file), options.rounds)
    print(f"{'seconds, medians':18}{'first token':>12}{'import':>10}{'load':>10}{'prompt':>10}{'peak':>12}")
    rows: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        row = rows[name] = {key: summary([values[key] for values in rounds]) for key in rounds[0]}
        cells = "".join(
            f"{row[key]['median']:10.2f}" if key in row else " " * 10 for key in ("import", "load", "prompt")
        )
        peak = format_size(row["peak"]["median"]) if "peak" in row else ""
        print(f"{name:18}{row['start']['median']:12.2f}{cells}{peak:>12}")
    if options.save:
        about = {"benchmark": "cpu_start", "model": file.stem, "model_bytes": file.stat().st_size, "machine": machine()}
        print(f"saved {save(options.save, about | {'context': CONTEXT, 'engines': rows})}")


if __name__ == "__main__":
    main()
