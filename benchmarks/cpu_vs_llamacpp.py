"""turbolm beside llama.cpp on the same machine, the same threads, in alternating rounds.

    pip install llama-cpp-python          # builds llama.cpp for this machine
    python benchmarks/cpu_vs_llamacpp.py [--rows shipped requantized] [--model FILE.gguf] [--rounds 5] [--all] [--save]

Rows, each of a model file for either engine:
    shipped       the default model's file, the same for both
    requantized   turbolm with that file, llama.cpp with its fastest: a lossy requantization to Q4_0
    given         the file of --model, the same for both

Each engine lives in a process of its own and waits idle while the other runs. Both decode greedily, past
end-of-text, without speculation on either side (--speculation auto switches turbolm's on: random prompts make
answers repeat, which flatters it). With --save each row goes to benchmarks/results/ after every round, so that a run
that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import ENGINES, Child, Setup
from llamacpp import requantized
from measure import PREFILL, Workload, decode, machine, save, summary

from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch
from turbolm.ops.hardware import probe

ROWS = ("shipped", "requantized", "given")
STREAMS, ALL_STREAMS = (1, 16), (1, 2, 4, 8, 16, 32)
# For the estimate: part of the memory's speed that one stream decodes at, and how much faster all else is by token.
_SHARE, _GAIN = {"turbolm": 0.7, "llama.cpp": 0.45}, {"turbolm": 5.0, "llama.cpp": 1.5}
_READ = 15e9  # bytes per second, of a slow machine


@dataclass(frozen=True)
class Row:
    """One comparison: `files` by engine."""

    name: str
    result: str  # benchmarks/results/<result>.json
    files: Mapping[str, Path]


def rows_of(names: Sequence[str], model: str | None, threads: int) -> list[Row]:
    shipped = fetch(DEFAULT_MODEL).path
    rows = []
    for name in names:
        if name == "given":
            assert model is not None
            ours = theirs = fetch(model).path
            result = re.sub(r"\W+", "_", ours.stem.lower())
        else:
            ours, theirs, result = shipped, shipped, "smollm2"
            if name == "requantized":
                theirs, result = requantized(shipped, threads), "smollm2_q4_0"
        rows.append(Row(name, f"cpu_vs_llamacpp_{result}", dict(zip(ENGINES, (ours, theirs), strict=True))))
    return rows


def estimate(row: Row, works: Sequence[Workload], rounds: int) -> float:
    """Seconds, roughly."""
    seconds = 0.0
    for engine, path in row.files.items():
        token = path.stat().st_size / _READ / _SHARE[engine]
        for work in works:
            alone = work.streams == 1 and not work.is_prefill
            answers = work.streams * work.answer * token / (1 if alone else _GAIN[engine])
            seconds += answers + work.streams * work.prompt * token / _GAIN[engine]
    return (rounds + 1) * seconds


class Comparison:
    """A row under way."""

    def __init__(self, row: Row, works: Sequence[Workload], threads: int, speculation: str) -> None:
        self.row, self.works = row, works
        longest = max(work.prompt + work.answer for work in works)
        streams = max(work.streams for work in works)
        setups = {name: Setup(str(path), threads, longest, streams, speculation) for name, path in row.files.items()}
        self.children = {name: Child(name, setup) for name, setup in setups.items()}
        self.figures: dict[str, dict[str, list[float]]] = {work.name: {name: [] for name in ENGINES} for work in works}
        self.about = {"threads": threads, "speculation": speculation}

    def run_round(self, round_: int) -> None:
        """Round 0 warms up and isn't kept; who begins alternates."""
        for work in self.works:
            for name in ENGINES if round_ % 2 else ENGINES[::-1]:
                value = self.children[name].run(work, round_)
                if round_:
                    self.figures[work.name][name].append(value)

    def table(self) -> dict[str, Any]:
        rows = {}
        for work, values in self.figures.items():
            ours, theirs = (values[name] for name in ENGINES)
            ratio = summary([a / b for a, b in zip(ours, theirs, strict=True)])
            rows[work] = {"turbolm": summary(ours), "llama.cpp": summary(theirs), "ratio": ratio}
        return rows

    def save(self) -> Path:
        files = {name: path.stem for name, path in self.row.files.items()}
        record = {"benchmark": "cpu_vs_llamacpp", "row": self.row.name, "model": files["turbolm"], "files": files}
        record |= {"machine": machine(), **self.about}
        record |= {"engines": {name: child.about for name, child in self.children.items()}}
        return save(self.row.result, record | {"tokens_per_second": self.table()})

    def close(self) -> None:
        for child in self.children.values():
            child.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: shipped, requantized, and given with --model")
    parser.add_argument("--model", help="a model name or GGUF file, for the row 'given'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--all", action="store_true", help=f"decode at {ALL_STREAMS} streams, not {STREAMS} only")
    parser.add_argument("--speculation", choices=("auto", "off"), default="off")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/cpu_vs_llamacpp_*.json")
    options = parser.parse_args()
    names = options.rows or ("shipped", "requantized", *(["given"] if options.model else []))
    if options.rounds < 1:
        parser.error("--rounds takes 1 or more")
    if "given" in names and not options.model:
        parser.error("the row 'given' takes --model")
    threads = probe().physical_cores
    rows = rows_of(names, options.model, threads)
    works = [PREFILL, *(decode(n) for n in (ALL_STREAMS if options.all else STREAMS))]
    guesses = [estimate(row, works, options.rounds) for row in rows]
    print(f"about {max(1, round(sum(guesses) / 60))} min on a slow machine for {', '.join(names)}", flush=True)
    for row in rows:
        run_row(Comparison(row, works, threads, options.speculation), options.rounds, options.save)


def run_row(comparison: Comparison, rounds: int, keep: bool) -> None:
    files = comparison.row.files
    print(f"\n{comparison.row.name}: turbolm {files['turbolm'].name}, llama.cpp {files['llama.cpp'].name}")
    for round_ in range(rounds + 1):
        start = time.perf_counter()
        comparison.run_round(round_)
        minutes = (time.perf_counter() - start) * (rounds - round_) / 60
        print(f"round {round_} of {rounds}; {minutes:.1f} min left for this row", file=sys.stderr, flush=True)
        if keep and round_:
            comparison.save()
    print(f"{'tokens per second':34}{'turbolm':>12}{'llama.cpp':>12}{'ratio':>9}   (medians of {rounds} rounds)")
    for name, found in comparison.table().items():
        ours, theirs, ratio = (found[key]["median"] for key in (*ENGINES, "ratio"))
        print(f"{name:34}{ours:12.1f}{theirs:12.1f}{ratio:8.2f}x", flush=True)
    comparison.close()


if __name__ == "__main__":
    main()
