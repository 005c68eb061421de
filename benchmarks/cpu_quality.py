"""What the CPU's fast arithmetic costs in quality: perplexity, KL divergence and greedy agreement of the
default path against float32 on the same weights, with llama.cpp's own deviation beside it.

    python benchmarks/cpu_quality.py [--model NAME_OR_GGUF] [--save NAME]     # llama-cpp-python optional

Perplexity: the text of the GPL 3 in windows of 512 tokens, the second half of each scored. KL: of float32's
100 likeliest tokens and the rest as one, per scored position of the first four windows.
Agreement: of greedy answers of 48 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from llamacpp import LlamaCppEngine
from measure import machine, save
from questions import QUESTIONS, TEXT, WINDOW, windows_of

from turbolm import LLM, Output, SamplingParams
from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch

KL_WINDOWS = 4  # the KL divergence is of the first ones only


def windows(llm: LLM) -> list[list[int]]:
    return windows_of(llm.tokenizer.encode(TEXT.read_text(encoding="utf-8")))


def scored(llm: LLM) -> list[Output]:
    params = SamplingParams(max_tokens=0, prompt_logprobs=100)
    return [completion.outputs[0] for completion in llm.generate(windows(llm)[:KL_WINDOWS], params)]


def divergence(exact: Output, fast: Output) -> list[float]:
    """KL(exact ‖ fast) per scored position."""
    values = []
    for e, f in list(zip(exact.prompt_logprobs, fast.prompt_logprobs, strict=True))[WINDOW // 2 + 1 :]:
        assert e is not None
        assert f is not None
        other = dict(f.top)
        pairs = [(lp, other[token]) for token, lp in e.top if token in other]
        rest = [max(1e-12, 1 - sum(math.exp(pair[side]) for pair in pairs)) for side in (0, 1)]
        pairs.append((math.log(rest[0]), math.log(rest[1])))
        values.append(sum(math.exp(p) * (p - q) for p, q in pairs))
    return values


def answers(llm: LLM) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=48)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [completion.outputs[0].token_ids for completion in llm.chat(conversations, params)]


def llama_cpp_perplexity(path: str, threads: int, chunks: list[list[int]]) -> float:
    engine = LlamaCppEngine(path, threads, WINDOW, 1)
    total, count = 0.0, 0
    for chunk in chunks:
        engine.lib.llama_memory_clear(engine.memory, True)
        engine._fill([(token, i, 0, True) for i, token in enumerate(chunk)])
        for i in range(WINDOW // 2, WINDOW - 1):
            row = engine.lib.llama_get_logits_ith(engine.context, i)
            logits = np.ctypeslib.as_array(row, (engine.vocab_size,)).astype(np.float64)
            total -= logits[chunk[i + 1]] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
            count += 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    path = str(fetch(options.model).path)
    text = TEXT.read_text(encoding="utf-8")
    size = {"max_context": 1024, "max_batch_size": 16}
    found: dict[str, Any] = {}
    with LLM(path, dtype="float32", **size) as exact:
        exact_scores, exact_answers = scored(exact), answers(exact)
        found["perplexity, float32"] = exact.score(text, window=WINDOW)[0].perplexity
    with LLM(path, **size) as fast:
        fast_scores, fast_answers, chunks = scored(fast), answers(fast), windows(fast)
        found["perplexity, default path"] = fast.score(text, window=WINDOW)[0].perplexity
        threads = fast.config.threads
    kl = [value for e, f in zip(exact_scores, fast_scores, strict=True) for value in divergence(e, f)]
    tops = [
        e.top[0][0] == f.top[0][0]
        for exact_, fast_ in zip(exact_scores, fast_scores, strict=True)
        for e, f in zip(exact_.prompt_logprobs, fast_.prompt_logprobs, strict=True)
        if e is not None and f is not None
    ]
    same = [e == f for e, f in zip(exact_answers, fast_answers, strict=True)]
    found |= {
        "KL divergence, mean": float(np.mean(kl)),
        "KL divergence, 99th percentile": float(np.percentile(kl, 99)),
        "same likeliest token": float(np.mean(tops)),
        "same greedy answer": f"{sum(same)} of {len(same)}",
    }
    if importlib.util.find_spec("llama_cpp"):
        found["perplexity, llama.cpp"] = llama_cpp_perplexity(path, threads, chunks)
    for name, value in found.items():
        print(f"{name:34}{value if isinstance(value, str) else f'{value:.4f}'}")
    if options.save:
        record = {"benchmark": "cpu_quality", "model": Path(path).name, "machine": machine(), "figures": found}
        print(f"saved {save(options.save, record)}")


if __name__ == "__main__":
    main()
