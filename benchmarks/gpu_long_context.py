"""Long contexts: is a fact found wherever it stands, and what do memory and time take.

python benchmarks/gpu_long_context.py SmolLM2-folder --lengths 4096,8192,16384 --rope yarn --needles
python benchmarks/gpu_models.py llama-3-8b --out /dev/shm/8b
python benchmarks/gpu_long_context.py /dev/shm/8b --lengths 8192,32768,131072 --json long.json

A folder's config.json is changed in a copy: --rope stretches the rotation (yarn, dynamic or linear) where a length
exceeds what the model was made for, and without it (random weights) the model is said to be made for that length. Other
models are run as they are. Per length: seconds to the first token, in chunks of --chunk; ms per token after
it; the GPU's memory beyond weights and KV cache, which does not grow with the length if chunks bound it. --needles: a
line with a number, at each of --depths of a real text, and a question for that number at the end; it counts as found
if the likeliest answer holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_parity import TEXT
from gpu_record import add_engine_options, engine_options, exit_with, number, start_record, table, write

from turbolm import LLM, SamplingParams
from turbolm.errors import TurbolmError

ANSWER = 32  # tokens by which decoding is timed
NEEDLE = "\n\nRemember this: the access code of the archive is {code}.\n\n"
QUESTION = "\n\nQuestion: What is the access code of the archive?\nAnswer: The access code of the archive is"
CODES = ("58213", "90467", "31785", "74926", "26094")
HEADER = ("context", "first token", "prompt tok/s", "ms/token", "memory beyond", "needles found", "")


@contextlib.contextmanager
def prepared(model: str, length: int, rope: str | None) -> Iterator[str]:
    """The model, or a copy of its folder whose config is for contexts of `length` tokens."""
    config_path = Path(model) / "config.json"
    if not config_path.exists():
        yield model
        return
    config: dict[str, Any] = json.loads(config_path.read_text())
    made_for = config["max_position_embeddings"]
    if length <= made_for:
        yield model
        return
    if rope is not None:
        config["rope_scaling"] = {
            "rope_type": rope,
            "factor": -(-length // made_for) if rope != "dynamic" else 1.0,
            "original_max_position_embeddings": made_for,
        }
        if rope != "yarn":
            del config["rope_scaling"]["original_max_position_embeddings"]
    if rope != "dynamic":  # that one stretches by how far a context exceeds what the model was made for
        config["max_position_embeddings"] = length
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(model).iterdir():
            if path.name != "config.json":
                (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def haystack(llm: LLM, length: int, depth: float, code: str) -> list[int]:
    """Exactly `length` tokens: a text with the needle after the part `depth` of it, and the question."""
    tokenizer = llm.tokenizer
    needle = tokenizer.encode(NEEDLE.format(code=code), add_special=False)
    question = tokenizer.encode(QUESTION, add_special=False)
    text = tokenizer.encode(TEXT)
    room = length - len(needle) - len(question)
    if room < 1:
        raise SystemExit(f"a length of {length} tokens has no room for a needle: give more")
    filler = (text * (room // len(text) + 1))[:room]
    place = round(depth * room)
    return [*filler[:place], *needle, *filler[place:], *question]


def find_needles(llm: LLM, length: int, depths: list[float]) -> list[bool]:
    """For each depth, whether the answer holds the code."""
    found = []
    for depth, code in zip(depths, CODES * len(depths), strict=False):
        prompt = haystack(llm, length - 16, depth, code)
        (answer,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12))
        found.append(code in answer.text.replace(" ", ""))
    return found


def measure(llm: LLM, length: int) -> dict[str, float]:
    """Times of one prompt, which fills the context but for the answer, and memory taken meanwhile."""
    vocab_size = llm.tokenizer.vocab_size
    prompt = [(31 * i + i // 997) % vocab_size for i in range(length - ANSWER)]
    on_gpu = llm.config.device == "cuda"
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ANSWER)
    llm.generate([prompt[:64]], params)  # compiles kernels
    llm.wait_until_warm()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    first = 0.0
    for output in llm.stream(prompt, params):
        if output.error is not None:
            raise output.error
        first = first or time.perf_counter() - start
    whole = time.perf_counter() - start
    kv_bytes = llm.config.pool_tokens * llm.config.kv_bytes_per_token
    beyond = torch.cuda.max_memory_allocated() - llm.config.weight_bytes - kv_bytes if on_gpu else 0
    return {
        "first_seconds": first,
        "prompt_tokens": len(prompt),
        "token_seconds": (whole - first) / (ANSWER - 1),
        "beyond_bytes": beyond,
    }


def run(options: argparse.Namespace, record: dict[str, Any]) -> list[list[str]]:
    """A row per length; `record` is written after each."""
    rows = []
    record["lengths"] = []
    for length in options.lengths:
        with prepared(options.model, length, options.rope) as model:
            settings = engine_options(
                options, max_context=length, max_batch_size=1, max_batch_tokens=options.chunk, prefix_cache=False,
                speculation="off",
            )  # fmt: skip
            with LLM(model, progress=False, **settings) as llm:
                found: dict[str, Any] = {"length": length} | measure(llm, length)
                if options.needles:
                    found["needles"] = find_needles(llm, length, options.depths)
        record["lengths"].append(found)
        write(options.json, record)
        rate, needles = found["prompt_tokens"] / found["first_seconds"], found.get("needles", [])
        rows.append([
            f"{length:,}", f"{number(found['first_seconds'])} s", number(rate),
            number(found["token_seconds"] * 1e3), f"{found['beyond_bytes'] / 1e9:.2f} GB",
            f"{sum(needles)} of {len(needles)}" if needles else "-", "",
        ])  # fmt: skip
        print("  ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or any model's name")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=[8192])
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--rope", choices=("yarn", "dynamic", "linear"))
    parser.add_argument("--needles", action="store_true")
    parser.add_argument(
        "--depths", type=lambda text: [float(part) for part in text.split(",")], default=[0.0, 0.25, 0.5, 0.75, 1.0]
    )
    parser.add_argument("--json", type=Path)
    add_engine_options(parser)
    options = parser.parse_args()
    record = start_record("gpu_long_context", options)
    try:
        rows = run(options, record)
    except TurbolmError as error:
        exit_with(error)
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
