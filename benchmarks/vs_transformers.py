"""turbolm beside transformers on the same float32 weights, the same threads, in alternating rounds.

python benchmarks/vs_transformers.py [--rounds 3] [--save NAME]     # needs transformers and gguf
"""

from __future__ import annotations

import argparse
import time

import torch
from measure import PREFILL, Workload, decode, machine, run_turbolm, save, summary
from transformers import AutoModelForCausalLM, PreTrainedModel

from turbolm import LLM
from turbolm.config import DEFAULT_MODEL
from turbolm.hub import fetch


@torch.inference_mode()
def run_transformers(model: PreTrainedModel, work: Workload, round_: int) -> float:
    """Tokens per second, counted as `run_turbolm` counts them; greedy, with its dynamic cache."""
    ids = torch.tensor(work.prompts(model.config.vocab_size, round_))
    start = time.perf_counter()
    state = model(ids, use_cache=True, logits_to_keep=1)
    token = state.logits[:, -1:].argmax(-1)
    if work.is_prefill:
        return ids.numel() / (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(work.answer - 1):
        state = model(token, past_key_values=state.past_key_values, use_cache=True)
        token = state.logits[:, -1:].argmax(-1)
    return work.streams * (work.answer - 1) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    path = fetch(DEFAULT_MODEL).path
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    works = [PREFILL, decode(1, answer=32), decode(8, answer=32)]
    rows: dict[str, dict[str, list[float]]] = {work.name: {"turbolm": [], "transformers": []} for work in works}
    with LLM(str(path), dtype="float32", speculation="off", max_context=1024) as ours:
        torch.set_num_threads(ours.config.threads)
        for round_ in range(options.rounds + 1):  # the first warms up
            for work in works:
                pair = run_turbolm(ours, work, round_), run_transformers(theirs, work, round_)
                if round_:
                    for name, value in zip(rows[work.name], pair, strict=True):
                        rows[work.name][name].append(value)
    found = {}
    for name, values in rows.items():
        ratio = summary([a / b for a, b in zip(values["turbolm"], values["transformers"], strict=True)])
        found[name] = {key: summary(value) for key, value in values.items()} | {"ratio": ratio}
        medians = (found[name][key]["median"] for key in ("turbolm", "transformers", "ratio"))
        print("{:34}{:12.1f}{:12.1f}{:8.2f}x".format(name, *medians))
    if options.save:
        record = {"benchmark": "vs_transformers", "dtype": "float32", "machine": machine(), "tokens_per_second": found}
        print(f"saved {save(options.save, record)}")


if __name__ == "__main__":
    main()
