"""What works on one GPU beside plain answers, over several: drafts, penalties, an adapter, bits that don't vary.

python benchmarks/gpu_parallel_features.py --gpus 2 [--json FILE] [--tokens 48] [-o NAME=VALUE]

A tiny model with random weights answers greedily, in turn by one GPU, by all of them, with drafts, and with
`deterministic`; each engine is a process of its own. Sums over ranks round otherwise than one GPU's, and so do steps
of other sizes: from then on texts differ. So the share of answers is told that agree in their first tokens, and it
must be large. With `deterministic` every bit must be the same whether requests come one by one or together.
Exits with 1 where something is not so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import SHAPES, write_model
from gpu_record import add_engine_options, device_name, engine_options, exit_with, start_record, table, write
from safetensors.torch import save_file

from turbolm import LLM, SamplingParams
from turbolm.errors import TurbolmError
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.peft import module_shapes
from turbolm.models.registry import decoder_spec

FIRST = 8  # tokens that an answer must agree in
SHARE = 0.8  # of answers that must
LENGTHS = (3, 17, 40, 90, 200, 5, 64, 33)
RANK, SCALE = 16, 0.1
GREEDY = SamplingParams(temperature=0, ignore_eos=True)

Answer = list[int]


def kinds(num_tokens: int) -> dict[str, tuple[SamplingParams, bool]]:
    """Name → parameters, and whether with the adapter."""
    plain = SamplingParams.of(GREEDY, max_tokens=num_tokens)
    bias = dict.fromkeys((300, 5000, 9000, 16000), 3.0)  # of every rank's part
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    return {
        "plain": (plain, False),
        "penalties": (SamplingParams.of(plain, **penalties), False),
        "biases": (SamplingParams.of(plain, logit_bias=bias, frequency_penalty=0.05), False),
        "adapter": (plain, True),
    }


def prompts(vocab_size: int) -> list[list[int]]:
    """Some say the same thing again and again: drafts are found in these."""
    random = np.random.default_rng(0)
    drawn = [random.integers(0, vocab_size - 300, length).tolist() for length in LENGTHS]
    return [*drawn, *((text[:9] * 12)[: len(text) + 20] for text in drawn)]


def save_adapter(model: Path, folder: Path) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (n, k) in module_shapes(decoder_spec(open_checkpoint(model).config)).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = SCALE * torch.randn(RANK, k, generator=random)
        tensors[f"base_model.model.{name}.lora_B.weight"] = SCALE * torch.randn(n, RANK, generator=random)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in module_shapes(decoder_spec(open_checkpoint(model).config))})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def ask(llm: LLM, texts: Sequence[Sequence[int]], params: SamplingParams, has_adapter: bool) -> list[Answer]:
    """All at once."""
    found = []
    for completion in llm.generate(texts, params, adapter="own" if has_adapter else None):
        output = completion.outputs[0]
        if output.error is not None:
            raise output.error
        found.append(list(output.token_ids))
    return found


def answer(model: Path, settings: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """What one engine says: of each kind the answers together and, of some, one by one."""
    with LLM(str(model), progress=False, **settings) as llm:
        llm.wait_until_warm()
        texts = prompts(SHAPES["tiny"].vocab_size)
        found: dict[str, Any] = {"together": {}, "alone": {}}
        for name, (params, has_adapter) in kinds(num_tokens).items():
            found["together"][name] = ask(llm, texts, params, has_adapter)
            found["alone"][name] = [ask(llm, [text], params, has_adapter)[0] for text in texts[::3]]
        found["logprobs"] = [score.logprobs for score in llm.score(texts)]
        found["logprobs_alone"] = [llm.score([text])[0].logprobs for text in texts]
        stats = llm.stats
        found |= {"drafted": stats.num_draft_tokens, "accepted": stats.num_accepted_tokens}
        found["reasons"] = llm.config.reasons
    return found


def agreement(ours: Sequence[Answer], theirs: Sequence[Answer]) -> tuple[float, float]:
    """Share of answers that agree in their first tokens; how many agree at the beginning of one, on average."""
    lengths = [
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=True)))
        for mine, other in zip(ours, theirs, strict=True)
    ]
    return sum(length >= FIRST for length in lengths) / len(lengths), sum(lengths) / len(lengths)


def compare(sides: dict[str, dict[str, Any]], first: str) -> tuple[list[list[str]], bool]:
    """Rows of the table, and whether all is well. `first`: the side that the others are compared with."""
    rows, is_well = [], True
    for side, found in sides.items():
        for name, answers in found["together"].items():
            share, length = agreement(answers, sides[first]["together"][name])
            alone, alone_length = agreement(found["alone"][name], answers[::3])
            exact = "deterministic" in side
            is_right = share >= SHARE and (found["alone"][name] == answers[::3] if exact else alone >= SHARE)
            if name != "plain":  # what changes nothing is not there
                is_right &= agreement(answers, found["together"]["plain"])[1] < length
            rows.append(
                [side, name, f"{share:.0%}", f"{length:.1f}", f"{alone:.0%}", f"{alone_length:.1f}",
                 "yes" if is_right else "NO"]
            )  # fmt: skip
            is_well &= is_right
        if "deterministic" in side:
            is_same = found["logprobs"] == found["logprobs_alone"]
            rows.append([side, "log-probabilities", "", "", "", "", "same bits" if is_same else "NO: bits differ"])
            is_well &= is_same
        if "drafts" in side:
            rows.append([side, f"{found['accepted']} of {found['drafted']} drafts right", *[""] * 4, ""])
            is_well &= found["accepted"] > 0
    return rows, is_well


HEADER = ("engine", "answers", f"first {FIRST} agree", "tokens agree", "alone", "tokens", "as it should be")


def engines(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name → settings. On the CPU, to try this script, kernels neither draft nor are deterministic."""
    many = {"tensor_parallel": options.gpus}
    found: dict[str, dict[str, Any]] = {"1 GPU": {}, f"{options.gpus} GPUs": many}
    if options.device == "cpu":
        return {name: {**settings, "kernels": "reference"} for name, settings in found.items()}
    found[f"{options.gpus} GPUs, drafts"] = {**many, "speculation": "on"}
    found[f"{options.gpus} GPUs, deterministic"] = {**many, "deterministic": True}
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Each engine in a process of its own."""
    model, adapter = folder / "model", folder / "adapter"
    write_model(SHAPES["tiny"], model, device="cpu")
    save_adapter(model, adapter)
    common = {"prefix_cache": False, "speculation": "off", "max_context": 1024, "dtype": "bfloat16"}
    settings = engine_options(options, **common, adapters=[f"own={adapter}"])
    sides = {}
    for name, own in engines(options).items():
        print(f"{name} …", flush=True)
        out = folder / "answers.json"
        work = json.dumps({"model": str(model), "settings": {**settings, **own}, "out": str(out)})
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--work", work]
        subprocess.run(command, check=True, timeout=options.seconds)
        sides[name] = json.loads(out.read_text())
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=120, help="for one engine, at most")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    add_engine_options(parser)
    options = parser.parse_args()
    if options.work is not None:
        work = json.loads(options.work)
        try:
            found = answer(Path(work["model"]), work["settings"], options.tokens)
        except TurbolmError as error:
            exit_with(error)
        Path(work["out"]).write_text(json.dumps(found))
        return
    record = start_record("gpu_parallel_features", options)
    with tempfile.TemporaryDirectory() as folder:
        sides = run(options, Path(folder))
    rows, is_well = compare(sides, "1 GPU")
    record |= {"rows": rows, "ok": is_well, "reasons": {name: found["reasons"] for name, found in sides.items()}}
    write(options.json, record)
    print(device_name(record["machine"]))
    print(table(HEADER, rows))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
