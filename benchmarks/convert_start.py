"""What converting saves at the start: seconds to load a model as it is, and as `turbolm convert` wrote it.

    python benchmarks/convert_start.py [--model NAME] [--weights auto,int4,int8] [--device cpu] [--tensor-parallel N]
                                       [--rounds 5] [--save NAME]

Alternating rounds, each in a process of its own, files cached; the time is that of LLM(...), without imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTEXT = 2048


def child(arguments: str) -> None:
    from turbolm import LLM

    model, options = json.loads(arguments)
    start = time.perf_counter()
    with LLM(model, progress=False, max_context=CONTEXT, **options):
        print(json.dumps(time.perf_counter() - start), flush=True)


def load_seconds(model: str, options: dict[str, Any]) -> float:
    command = [sys.executable, __file__, "--child", json.dumps([model, options])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--weights", default="auto,int4,int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    from measure import machine, save, summary  # a child is timed without them

    from turbolm.compress import convert
    from turbolm.config import DEFAULT_MODEL
    from turbolm.hub import fetch

    model = str(fetch(options.model or DEFAULT_MODEL).path)
    place = {"device": options.device, "tensor_parallel": options.tensor_parallel}
    rows: dict[str, dict[str, Any]] = {}
    for weights in options.weights.split(","):
        with tempfile.TemporaryDirectory() as work:
            start = time.perf_counter()
            convert(model, f"{work}/converted", weights=weights, **place)
            seconds = time.perf_counter() - start
            found: dict[str, list[float]] = {"as it is": [], "converted": []}
            for number in range(options.rounds + 1):  # the first fills the caches
                for name, path, how in (
                    ("as it is", model, {"weights": weights, **place}), ("converted", f"{work}/converted", place),
                ):  # fmt: skip
                    value = load_seconds(path, how)
                    if number:
                        found[name].append(value)
        rows[weights] = {"convert": seconds, **{name: summary(values) for name, values in found.items()}}
        medians = {name: round(rows[weights][name]["median"], 2) for name in found}
        print(f"weights {weights}: {medians}, converting {seconds:.1f} s", flush=True)
    if options.save:
        about = {"benchmark": "convert_start", "model": Path(model).name, "machine": machine(), **place}
        print(f"saved {save(options.save, {**about, 'rows': rows})}")


if __name__ == "__main__":
    main()
