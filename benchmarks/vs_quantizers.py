"""turbolm's AWQ and GPTQ beside other tools': the same model, calibration tokens and group size.

    python benchmarks/vs_quantizers.py [--model NAME] [--group-size 64] [--windows N] [--save NAME]
        --peer autoawq=PYTHON --peer llmcompressor=PYTHON --peer gptqmodel=PYTHON

PYTHON is an interpreter that has the tool (with its versions of everything, it needs a virtual environment of its
own). Each writes a folder with asymmetric int4 weights, which turbolm loads; figures as in quality.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES = "samples.json"  # lists of token ids

# --- with another tool's interpreter ---


def run_autoawq(base: Path, samples: list[list[int]], group_size: int, method: str, output: Path) -> None:
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    del method
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoAWQForCausalLM.from_pretrained(str(base), device_map="cpu", safetensors=True, torch_dtype=torch.float32)
    config = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    # It joins texts and cuts them into blocks, so that it gets the tokens' texts.
    texts = [tokenizer.decode(sample) for sample in samples]
    model.quantize(
        tokenizer, quant_config=config, calib_data=texts, max_calib_samples=len(texts), max_calib_seq_len=512
    )
    model.save_quantized(str(output))


def run_llmcompressor(base: Path, samples: list[list[int]], group_size: int, method: str, output: Path) -> None:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # it pins what it keeps between layers, which fails without
        torch.Tensor.pin_memory = lambda self, *_: self
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    kinds = {"awq": AWQModifier, "gptq": GPTQModifier}
    recipe = kinds[method](config_groups=groups, ignore=["lm_head"])
    rows = {"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]}
    tokenizer = AutoTokenizer.from_pretrained(base)
    oneshot(
        model=model, processor=tokenizer, dataset=Dataset.from_dict(rows), recipe=[recipe], max_seq_length=512,
        num_calibration_samples=len(samples), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


def run_gptqmodel(base: Path, samples: list[list[int]], group_size: int, method: str, output: Path) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails with one, its choice on two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=group_size, sym=False, quant_method=method)
    model = GPTQModel.load(str(base), config, device="cpu")
    rows = [{"input_ids": sample, "attention_mask": [1] * len(sample)} for sample in samples]
    model.quantize(rows, batch_size=1)
    model.save(str(output))


PEERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "autoawq": (run_autoawq, ("awq",)),
    "llmcompressor": (run_llmcompressor, ("gptq", "awq")),
    "gptqmodel": (run_gptqmodel, ("gptq",)),
}


def child(name: str, method: str, group_size: int, work: Path) -> None:
    start = time.monotonic()
    samples = json.loads((work / SAMPLES).read_text())
    PEERS[name][0](work / "base", samples, group_size, method, work / f"{name}-{method}")
    print(json.dumps({"seconds": time.monotonic() - start}), flush=True)


# --- with turbolm's ---


def quantized_by(name: str, python: str, method: str, group_size: int, work: Path) -> dict[str, float] | str:
    """What is known of the model that it wrote; or why there is none."""
    command = [python, __file__, "--child", name, method, str(group_size), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with status {done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", default="")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=1000, help="most windows of the text")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, method, group_size, work = options.child
        child(name, method, int(group_size), Path(work))
        return
    compare(options)


def compare(options: argparse.Namespace) -> None:
    import torch  # not every tool's interpreter has what follows
    from measure import machine, save
    from quality import Judge, Model, quantized
    from questions import TEXT

    from turbolm.compress import unpack
    from turbolm.compress.samples import load_samples
    from turbolm.config import DEFAULT_MODEL
    from turbolm.text import load_tokenizer

    device, rows, failures = torch.device("cpu"), {}, {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        work = Path(folder)
        base = work / "base"
        unpack(options.model or DEFAULT_MODEL, base)
        samples = load_samples(options.data, load_tokenizer(base), 128, 512).token_ids
        (work / SAMPLES).write_text(json.dumps(samples))
        judge = Judge.of(base, Model(base, device), TEXT.read_text(encoding="utf-8"), options.windows)
        record = {
            "benchmark": "vs_quantizers", "model": Path(options.model or DEFAULT_MODEL).name, "machine": machine(),
            "group_size": options.group_size, "windows": len(judge.windows), "text": TEXT.name, "rows": rows,
            "failures": failures,
        }  # fmt: skip
        keep = functools.partial(save, options.save, record) if options.save else lambda: None
        for method in ("rtn", "awq", "gptq"):
            recipe = {"method": method, "group_size": options.group_size}
            found = quantized(base, work / method, recipe, options.data, "cpu")
            rows[f"turbolm {method}"] = {**judge.measure(Model(work / method, device)), **found}
            print(method, rows[f"turbolm {method}"], flush=True)
            keep()
        for name, python in (peer.split("=", 1) for peer in options.peer):
            for method in PEERS[name][1]:
                made = quantized_by(name, python, method, options.group_size, work)
                if isinstance(made, str):
                    failures[f"{name} {method}"] = made
                else:
                    rows[f"{name} {method}"] = {**judge.measure(Model(work / f"{name}-{method}", device)), **made}
                print(name, method, rows.get(f"{name} {method}", made), flush=True)
                keep()


if __name__ == "__main__":
    main()
