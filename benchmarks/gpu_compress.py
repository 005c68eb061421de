"""Checks on a GPU that converted models and static KV scales give what they should, and times the starts.

    python benchmarks/gpu_compress.py [--model NAME] [--tensor-parallel N]

A converted model must score a text with the same bits as the original; static int8 scales must be near 16 bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

from questions import TEXT

from turbolm import LLM
from turbolm.compress import calibrate_kv, convert
from turbolm.config import DEFAULT_MODEL


def perplexity(model: str, **options: Any) -> tuple[float, float]:
    """And the seconds that loading took."""
    start = time.perf_counter()
    with LLM(model, device="cuda", progress=False, max_context=2048, **options) as llm:
        seconds = time.perf_counter() - start
        return llm.score(TEXT.read_text(encoding="utf-8"), window=512)[0].perplexity, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    options = parser.parse_args()
    size = {"tensor_parallel": options.tensor_parallel}
    failures = []
    with tempfile.TemporaryDirectory() as work:
        for weights in ("auto", "int4", "int8"):
            convert(options.model, f"{work}/{weights}", device="cuda", weights=weights, **size)
            expected, before = perplexity(options.model, weights=weights, **size)
            found, after = perplexity(f"{work}/{weights}", **size)
            print(f"weights {weights}: {expected:.6f}, converted {found:.6f}; load {before:.2f} s, {after:.2f} s")
            if found != expected:
                failures.append(f"converted weights {weights}")
        path, _ = calibrate_kv(options.model, work, device="cuda")
        exact, _ = perplexity(options.model, **size)
        for scales in ("off", str(path)):
            found, _ = perplexity(options.model, kv="int8", kv_scales=scales, **size)
            print(f"KV int8, static scales {scales}: {found:.4f}, in 16 bits {exact:.4f}")
            if abs(found / exact - 1) > 0.02:
                failures.append(f"KV scales {scales}")
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
