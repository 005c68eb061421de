"""Decode speed by context and streams, with llama.cpp beside where its slow prefill allows.

    python benchmarks/cpu_context.py [--model NAME] [--contexts 128 1000 4000 8000] [--streams 1 2 4 8 16 32]
                                     [--rounds 3] [--tokens 45000] [--llama-tokens 8200] [--save NAME]

A case is left out where streams × (context + answer) exceeds --tokens, or for llama.cpp --llama-tokens (0: without
llama.cpp). Contexts are computed once: longer ones continue shorter ones, and all rounds decode after the same.
Rounds alternate between the engines; results are saved after each case.
"""

from __future__ import annotations

import argparse
from typing import Any

from children import ENGINES, Child, Setup
from measure import machine, save, summary

from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch
from turbolm.ops.hardware import probe


def start_engines(path: str, threads: int, options: argparse.Namespace) -> dict[str, Child]:
    """By name; llama.cpp where it has a case."""
    longest = max(options.contexts) + options.answer
    ours = Setup(path, threads, longest, max(options.streams), kv_memory=options.kv_memory)
    children = {"turbolm": Child("turbolm", ours)}
    if options.llama_tokens >= min(options.contexts) + options.answer:
        theirs = Setup(path, threads, longest, max(options.streams), kv_tokens=options.llama_tokens + 512)
        children["llama.cpp"] = Child("llama.cpp", theirs)
    return children


def cases(options: argparse.Namespace, room: dict[str, int]) -> list[tuple[int, int, tuple[str, ...]]]:
    """(context, streams, the engines that have room), short contexts first."""
    found = []
    for context in sorted(options.contexts):
        for streams in sorted(options.streams):
            engines = tuple(name for name in ENGINES if streams * (context + options.answer) <= room.get(name, 0))
            if engines:
                found.append((context, streams, engines))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1000, 4000, 8000])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=45000)
    parser.add_argument("--llama-tokens", type=int, default=8200)
    parser.add_argument("--kv-memory", default="1G", help="of turbolm's KV cache")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    threads = probe().physical_cores
    path = fetch(options.model).path
    children = start_engines(str(path), threads, options)
    limits = {"turbolm": options.tokens, "llama.cpp": options.llama_tokens}
    room = {name: min(child.about["kv_tokens"], limits[name]) for name, child in children.items()}
    record: dict[str, Any] = {"benchmark": "cpu_context", "model": path.stem, "machine": machine(), "threads": threads}
    record |= {"engines": {name: child.about for name, child in children.items()}, "answer": options.answer}
    rows: list[dict[str, Any]] = []
    print(
        f"{'context':>8}{'streams':>9}{'turbolm':>12}{'llama.cpp':>12}   tokens/s, medians of {options.rounds} rounds"
    )
    for context, streams, engines in cases(options, room):
        figures: dict[str, list[float]] = {name: [] for name in engines}
        for name in engines:
            children[name].run_after(streams, context, 2)  # computes the context
        for round_ in range(options.rounds):
            for name in engines[:: 1 if round_ % 2 else -1]:
                figures[name].append(children[name].run_after(streams, context, options.answer))
        found = {name: summary(values) for name, values in figures.items()}
        rows.append({"context": context, "streams": streams, **found})
        shown = "".join(f"{found[name]['median']:12.1f}" if name in found else " " * 12 for name in ENGINES)
        print(f"{context:8}{streams:9}{shown}", flush=True)
        if options.save:
            save(options.save, record | {"tokens_per_second": rows})
    for child in children.values():
        child.close()


if __name__ == "__main__":
    main()
