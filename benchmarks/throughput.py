"""How fast this machine runs a model: prefill, and decode at several numbers of streams.

python benchmarks/throughput.py [--model NAME] [--rounds 3] [--save NAME]
"""

from __future__ import annotations

import argparse

from measure import PREFILL, config_of, decode, machine, run_turbolm, save, summary
from rich.console import Console
from rich.table import Table

from turbolm import LLM
from turbolm.config import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--speculation", choices=("auto", "off"), default="off", help="random prompts flatter it")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    works = [PREFILL, *(decode(streams) for streams in options.streams)]
    with LLM(options.model, speculation=options.speculation) as llm:
        results: dict[str, list[float]] = {work.name: [] for work in works}
        for round_ in range(-1, options.rounds):  # the first warms up
            for work in works:
                value = run_turbolm(llm, work, round_ + 1)
                if round_ >= 0:
                    results[work.name].append(value)
        config = config_of(llm)
    table = Table("workload", "tokens/s (median)", "min", "max", title=f"{options.model} on {machine()['cpu']}")
    for name, values in results.items():
        table.add_row(name, *(f"{x:,.0f}" for x in (summary(values)["median"], min(values), max(values))))
    Console().print(table)
    if options.save:
        record = {"benchmark": "throughput", "model": options.model, "machine": machine(), "config": config}
        save(options.save, record | {"tokens_per_second": {name: summary(v) for name, v in results.items()}})


if __name__ == "__main__":
    main()
