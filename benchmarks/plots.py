"""Draws docs/*.svg from benchmarks/results/: python benchmarks/plots.py [--folder docs]     # needs matplotlib"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ("#0b5fa5", "#d1495b", "#2e8b57", "#8e5ea2", "#c77f0a", "#444444")
STYLES = {"turbolm": "-", "llama.cpp": "--"}


def about(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    return f"{record['model']}, {machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}"


def context_plot(record: Mapping[str, Any]) -> Figure:
    """Tokens per second by streams, a colour for each context, a line style for each engine."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = record["tokens_per_second"]
    for colour, context in zip(COLOURS, sorted({row["context"] for row in rows}), strict=False):
        for engine, style in STYLES.items():
            points = [(row["streams"], row[engine]) for row in rows if row["context"] == context and engine in row]
            if not points:
                continue
            streams = [x for x, _ in points]
            medians = [found["median"] for _, found in points]
            axes.plot(streams, medians, style, color=colour, marker="o", markersize=4, label=f"{engine}, {context:,}")
            lows, highs = ([found[key] for _, found in points] for key in ("min", "max"))
            axes.fill_between(streams, lows, highs, color=colour, alpha=0.12, linewidth=0)
    every = sorted({row["streams"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [str(x) for x in every])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams decoding at once")
    axes.set_ylabel("tokens per second, all streams together")
    axes.set_title("Decode speed by streams and tokens of context", loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, title="engine, context", title_fontsize=8)
    figure.supxlabel(about(record), fontsize=7, x=0.01, ha="left", color="#555555")
    return figure


PLOTS = {"cpu_context": context_plot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    # Text stays text, and the same figures give the same file.
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "turbolm", "font.family": "sans-serif"}
    for name, plot in PLOTS.items():
        source = options.results / f"{name}.json"
        if not source.exists():
            print(f"{name}: no {source.name} yet")
            continue
        target = options.folder / f"{name}.svg"
        plot(json.loads(source.read_text())).savefig(target, metadata={"Date": None})
        print(f"drew {target}")


if __name__ == "__main__":
    main()
