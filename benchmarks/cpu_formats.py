"""Decode speed on the CPU by weights and KV cache: what smaller numbers give at batch 1.

    python benchmarks/cpu_formats.py [--model FOLDER_OR_NAME] [--context 1024] [--rounds 5] [--save NAME]

The model's weights in 16 bits (a GGUF file is unpacked first), rounded at load to int8 and int4; KV cache of 16 bits,
int8 and int4. Alternating rounds; tokens per second of one sequence whose prompt has `--context` tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measure import Workload, machine, run_turbolm, save, summary

from turbolm import LLM
from turbolm.compress import unpack
from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch

CASES = {
    "bf16": {},
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
    "bf16, KV int8": {"kv": "int8"},
    "int8, KV int8": {"weights": "int8", "kv": "int8"},
    "int4, KV int8": {"weights": "int4", "kv": "int8"},
    "int4, KV int4": {"weights": "int4", "kv": "int4"},
}
ANSWER = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    work = Workload("decode", 1, options.context, ANSWER)
    found: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        model = fetch(options.model).path
        if model.is_file():
            unpack(str(model), f"{folder}/model")
            model = Path(folder) / "model"
        size = {"max_context": options.context + ANSWER + 1, "max_batch_size": 1, "speculation": "off", "device": "cpu"}
        engines = {name: LLM(str(model), progress=False, **size, **how) for name, how in CASES.items()}
        for number in range(options.rounds + 1):  # the first one is not kept
            for name, llm in engines.items():
                value = run_turbolm(llm, work, number)
                if number:
                    found[name].append(value)
        for llm in engines.values():
            llm.close()
    rows: dict[str, dict[str, Any]] = {name: summary(values) for name, values in found.items()}
    for name, row in rows.items():
        print(f"{name:16}{row['median']:8.1f} tok/s{row['median'] / rows['bf16']['median']:7.2f}x")
    if options.save:
        about = {"benchmark": "cpu_formats", "model": Path(fetch(options.model).path).name, "machine": machine()}
        print(f"saved {save(options.save, {**about, 'context': options.context, 'rows': rows})}")


if __name__ == "__main__":
    main()
