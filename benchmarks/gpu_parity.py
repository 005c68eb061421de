"""Whether the GPU computes what the model says: its tokens and log-probabilities beside float32 on the CPU.

python benchmarks/gpu_parity.py MODEL [--dtype bfloat16] [--json FILE]    # a folder or a .gguf file
python benchmarks/gpu_parity.py tiny                                      # random weights, no model needed

Three comparisons. Greedy answers: where two differ first, the float32 logit of the float32 path's token minus
that of the GPU's, which must be small: a tie that rounding decided. Scored answers: the log-probabilities of the
float32 path's own tokens, given the same context. Perplexity on the text of the GPL 3. Exits with 1 if any is
beyond its limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_models import SHAPES, write_model
from gpu_record import add_engine_options, device_name, engine_options, exit_with, start_record, table, write

from turbolm import LLM, SamplingParams
from turbolm.errors import TurbolmError
from turbolm.types import Completion

TEXT = (Path(__file__).parent / "data" / "gpl-3.txt").read_text()
WINDOW = 512
LENGTHS = (1, 2, 7, 16, 33, 64, 100, 200)  # tokens in a prompt


@dataclass(frozen=True)
class Answers:
    """One side's results."""

    tokens: list[tuple[int, ...]]
    perplexity: float


@dataclass(frozen=True)
class Limits:
    """What rounding explains."""

    gap: float  # in logits, at the first difference
    logprob: float  # mean absolute difference
    perplexity: float  # relative difference


#: bfloat16 keeps 8 bits of a number, float16 11.
LIMITS = {
    "bfloat16": Limits(gap=0.5, logprob=0.05, perplexity=0.01),
    "float16": Limits(gap=0.1, logprob=0.01, perplexity=0.003),
    "float32": Limits(gap=0.01, logprob=0.001, perplexity=0.0005),
}


def prompts_for(llm: LLM, count: int) -> list[list[int]]:
    """Pieces of the text, of several lengths: short ones, and some that several blocks hold."""
    ids = llm.tokenizer.encode(TEXT)
    starts = np.random.default_rng(0).integers(0, len(ids) - max(LENGTHS), count).tolist()
    return [ids[start : start + LENGTHS[i % len(LENGTHS)]] for i, start in enumerate(starts)]


def answers_of(llm: LLM, prompts: Sequence[list[int]], num_tokens: int, text: str) -> Answers:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    tokens = [_checked(completion).outputs[0].token_ids for completion in llm.generate(prompts, params)]
    return Answers(tokens, llm.score(text, window=WINDOW)[0].perplexity)


def _checked(completion: Completion) -> Completion:
    error = completion.outputs[0].error
    if error is not None:
        raise error
    return completion


def last_logprobs(llm: LLM, texts: Sequence[list[int]]) -> list[float]:
    """The log-probability of each text's last token, given those before it."""
    if not texts:
        return []
    completions = llm.generate(texts, SamplingParams(max_tokens=0, prompt_logprobs=0))
    entries = [_checked(completion).outputs[0].prompt_logprobs[-1] for completion in completions]
    assert all(entry is not None for entry in entries)
    return [entry.logprob for entry in entries if entry is not None]


def scored(llm: LLM, prompts: Sequence[list[int]], answers: Sequence[tuple[int, ...]]) -> list[tuple[float, int]]:
    """(log-probability, rank) of every token of the answers, each given what goes before it."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    completions = llm.generate(texts, SamplingParams(max_tokens=0, prompt_logprobs=0))
    entries = [
        _checked(completion).outputs[0].prompt_logprobs[len(prompt) :]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return [(entry.logprob, entry.rank) for answer in entries for entry in answer if entry is not None]


def first_differences(ours: Sequence[tuple[int, ...]], exact: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """Number of answer → position where it differs first."""
    found = {}
    for number, (mine, theirs) in enumerate(zip(ours, exact, strict=True)):
        position = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
        if position is not None:
            found[number] = position
    return found


def compare(exact: LLM, prompts: list[list[int]], ours: Answers, theirs: Answers, side: list[Any]) -> dict[str, Any]:
    """All figures of one comparison. `side`: what the GPU's `scored` gave for the exact answers."""
    places = first_differences(ours.tokens, theirs.tokens)

    def ending(answers: list[tuple[int, ...]]) -> list[float]:
        """Logits differ as log-probabilities do: the sum over the vocabulary is the same."""
        return last_logprobs(exact, [[*prompts[n], *answers[n][: place + 1]] for n, place in places.items()])

    pairs = zip(ending(theirs.tokens), ending(ours.tokens), strict=True)
    gaps = {number: best - taken for number, (best, taken) in zip(places, pairs, strict=True)}
    true = scored(exact, prompts, theirs.tokens)
    shifts = [abs(a - b) for (a, _), (b, _) in zip(side, true, strict=True)]
    return {
        "answers": len(prompts),
        "equal": len(prompts) - len(places),
        "differences": [{"prompt": n, "position": places[n], "logit_gap": gaps[n]} for n in places],
        "largest_gap": max(gaps.values(), default=0.0),
        "likeliest_agree": sum(rank == 1 for _, rank in side) / len(side),
        "logprob_mean": statistics.fmean(shifts),
        "logprob_max": max(shifts),
        "perplexity": ours.perplexity,
        "perplexity_float32": theirs.perplexity,
    }


def is_within(found: dict[str, Any], limits: Limits) -> bool:
    # Written so that NaN is beyond every limit.
    drift = abs(found["perplexity"] / found["perplexity_float32"] - 1)
    is_close = found["largest_gap"] <= limits.gap and found["logprob_mean"] <= limits.logprob
    return bool(is_close and drift <= limits.perplexity)


def check(model: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One dtype of one model."""
    text = TEXT[: options.text]
    common = {"prefix_cache": False, "speculation": "off", "max_context": options.max_context}
    settings = engine_options(options, **common, dtype=dtype)
    if options.device == "cpu" and dtype != "float32":
        settings.setdefault("kernels", "reference")  # the CPU's own kernels compute in float32
    cpu = {**common, "device": "cpu", "dtype": "float32"}
    with LLM(model, progress=False, **cpu) as exact:
        prompts = prompts_for(exact, options.prompts)
        theirs = answers_of(exact, prompts, options.tokens, text)
        with LLM(model, progress=False, **settings) as llm:
            ours = answers_of(llm, prompts, options.tokens, text)
            side = scored(llm, prompts, theirs.tokens)
            reasons = llm.config.reasons
        found = compare(exact, prompts, ours, theirs, side)
    found |= {"model": model, "dtype": dtype, "ok": is_within(found, LIMITS[dtype]), "reasons": reasons}
    return found


HEADER = (
    *("dtype", "equal answers", "largest gap", "likeliest agree", "logprob mean", "max", "perplexity", "float32"),
    "within limits",
)


def row(found: dict[str, Any]) -> list[str]:
    numbers = (found[name] for name in ("logprob_mean", "logprob_max", "perplexity", "perplexity_float32"))
    equal = f"{found['equal']} of {found['answers']}"
    agree = f"{found['likeliest_agree']:.2%}"
    shown = [f"{value:.4f}" for value in numbers]
    return [found["dtype"], equal, f"{found['largest_gap']:.4f}", agree, *shown, "yes" if found["ok"] else "NO"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a .gguf file, or 'tiny': random weights")
    parser.add_argument("--dtype", choices=LIMITS, action="append", help="default: bfloat16; for 'tiny' float16 too")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--text", type=int, default=len(TEXT), help="characters of the text to score")
    parser.add_argument("--max-context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    add_engine_options(parser)
    options = parser.parse_args()
    record = start_record("gpu_parity", options)
    dtypes = options.dtype or (["bfloat16", "float16"] if options.model == "tiny" else ["bfloat16"])
    results: list[dict[str, Any]] = []
    record["results"] = results
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model == "tiny":
            write_model(SHAPES["tiny"], Path(folder), device="cpu")
            model = folder
        try:
            for dtype in dtypes:
                results.append(check(model, dtype, options) | {"model": options.model})
                write(options.json, record)
        except TurbolmError as error:
            exit_with(error)
    print(f"{options.model} on {device_name(record['machine'])}, {options.prompts} answers of {options.tokens} tokens")
    print(table(HEADER, [row(found) for found in results]))
    for found in results:
        gaps = sorted((entry["logit_gap"] for entry in found["differences"]), reverse=True)[:8]
        print(f"{found['dtype']}: gaps at first differences {json.dumps([round(gap, 4) for gap in gaps])}")
    sys.exit(0 if all(found["ok"] for found in results) else 1)


if __name__ == "__main__":
    main()
