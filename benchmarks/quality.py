"""What compression costs: each method × group size against the 16-bit weights.

    python benchmarks/quality.py [--model NAME] [--text FILE] [--data FILE] [--device auto] [--only "awq 64,int8"]
                                 [--windows N] [--save NAME]

The base is the model as 16-bit safetensors (a GGUF file's blocks unpacked). Everything is computed in plain PyTorch
on unpacked weights, so that the figures are those of the weights alone; int8 and fp8 round activations too, as
their kernels do. With --save the result goes to benchmarks/results, and tables.py makes docs/quality.md of it.

Perplexity: a text in windows of 512 tokens, the second half of each scored. KL divergence, and how often the
likeliest token is the same: over the base's own greedy answers of 64 tokens to 16 questions. Divergence: the
mean number of tokens, of those 64, before a greedy answer differs from the base's.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import machine, save
from torch import Tensor

from turbolm.compress import quantize, unpack
from turbolm.compress.calibration import lay_out
from turbolm.compress.smooth import round_rows
from turbolm.config import DEFAULT_MODEL
from turbolm.errors import ConfigError
from turbolm.hub import fetch
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import LayerCache, PreparedLinear
from turbolm.ops.hardware import probe
from turbolm.ops.reference import ReferenceOps
from turbolm.text import ChatTemplate, encode_chat, load_tokenizer
from turbolm.types import Batch

TEXT = Path(__file__).parent / "data" / "gpl-3.txt"
WINDOW, ANSWER = 512, 64
QUESTIONS = [
    "Why is the sky blue?", "Name three primary colours.", "Write a haiku about rain.", "What is a prime number?",
    "Explain recursion to a child.", "Who was Ada Lovelace?", "What is 17 + 25?", "Translate 'good morning' to German.",
    "Give me a recipe for pancakes.", "What causes tides?", "Write a Python function that reverses a string.",
    "What is the boiling point of water?", "Summarize the plot of Romeo and Juliet.", "How do vaccines work?",
    "List the planets of the solar system.", "What is the difference between a list and a tuple in Python?",
]  # fmt: skip

#: Name → arguments of `quantize`.
CASES: dict[str, dict[str, Any]] = {
    **{f"{method} {size if size > 0 else 'row'}": {"method": method, "group_size": size}
       for size in (32, 64, 128, -1) for method in ("rtn", "awq", "gptq")},
    "awq 64 symmetric": {"method": "awq", "group_size": 64, "symmetric": True},
    "gptq 64 symmetric": {"method": "gptq", "group_size": 64, "symmetric": True},
    "gptq 64 group order": {"method": "gptq", "group_size": 64, "order": "group"},
    "gptq 64 no order": {"method": "gptq", "group_size": 64, "order": "none"},
    "int8": {"method": "int8"},
    "fp8": {"method": "fp8"},
}  # fmt: skip


class RoundedActivations(ReferenceOps):
    """Rounds the inputs of the matrices in `rounded` to 8 bits per token: to int8, or to fp8."""

    def __init__(self, device: torch.device, dtype: torch.dtype, kind: str) -> None:
        super().__init__(device, dtype)
        self.kind = kind
        self.rounded: set[int] = set()

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if id(weight) in self.rounded:
            x_tk = round_rows(x_tk) if self.kind == "int8" else _round_fp8(x_tk)
        return super().linear(x_tk, weight)


def _round_fp8(x_tk: Tensor) -> Tensor:
    scales = x_tk.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x_tk / scales).to(torch.float8_e4m3fn).to(x_tk.dtype) * scales


class Model:
    """A checkpoint, unpacked to float32 on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        checkpoint = open_checkpoint(folder)
        kind = checkpoint.packing.formats[0] if checkpoint.packing is not None else ""
        ops = RoundedActivations(device, torch.float32, kind)
        loader = Loader(checkpoint.source, ops, packing=checkpoint.packing)
        self.decoder = load_decoder(decoder_spec(checkpoint.config), loader, 2 * WINDOW)
        self.device = device
        if kind in ("int8", "fp8"):
            for layer in self.decoder.layers:
                linears = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
                ops.rounded |= {id(linear.weight) for linear in linears}

    def logprobs(self, sequence: list[int]) -> Tensor:
        """[t, vocabulary] of all tokens."""
        batch = lay_out([tuple(sequence)], self.device)
        return F.log_softmax(self.decoder.forward(batch, self._caches(1, len(sequence))), dim=-1)

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy answers of ANSWER tokens each, computed together; ends of text are tokens like others."""
        length = max(map(len, prompts)) + ANSWER
        caches = self._caches(len(prompts), length)
        blocks = torch.arange(len(prompts), dtype=torch.int32, device=self.device)
        tokens = []
        for block, prompt in zip(blocks, prompts, strict=True):
            batch = lay_out([tuple(prompt)], self.device)
            batch = replace(batch, slots=batch.slots + block * length, block_tables=block.view(1, 1))
            tokens.append(self.decoder.forward(batch, caches)[-1].argmax())
        answers = [torch.stack(tokens)]
        positions = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=self.device)
        while len(answers) < ANSWER:
            batch = _decode(answers[-1].int(), positions, blocks, length)
            answers.append(self.decoder.forward(batch, caches).argmax(-1))
            positions = positions + 1
        return torch.stack(answers, 1).tolist()

    def _caches(self, num_sequences: int, length: int) -> list[LayerCache]:
        """A block of `length` tokens for each sequence."""
        shapes = [layer.attention for layer in self.decoder.spec.layers]
        return [
            LayerCache(*(torch.zeros(num_sequences, shape.num_kv_heads, length, dim, device=self.device)
                         for dim in (shape.head_dim, shape.v_head_dim)))
            for shape in shapes
        ]  # fmt: skip


def _decode(tokens: Tensor, positions: Tensor, blocks: Tensor, length: int) -> Batch:
    """One token of each sequence."""
    count = len(tokens)
    rows = torch.arange(count + 1, dtype=torch.int32, device=tokens.device)
    longest = int(positions.max()) + 1
    return Batch(
        token_ids=tokens, positions=positions, slots=blocks * length + positions, query_start=rows,
        context_lens=positions + 1, block_tables=blocks.view(-1, 1), logit_rows=rows[:-1], num_tokens=count,
        num_sequences=count, max_query=1, max_context=longest, num_decodes=count,
    )  # fmt: skip


@dataclass
class Judge:
    """What every model is measured with, and what the base says."""

    windows: list[list[int]]
    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: list[Tensor]  # the base's, of its own answers: [ANSWER, vocabulary]

    @classmethod
    def of(cls, folder: Path, base: Model, text: str, num_windows: int) -> Judge:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(text)
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)][:num_windows]
        template = ChatTemplate.of(tokenizer)
        prompts = [encode_chat(tokenizer, template, [{"role": "user", "content": text}]) for text in QUESTIONS]
        answers = base.answers(prompts)
        judge = cls(windows, prompts, answers, [])
        judge.logprobs = judge._answer_logprobs(base)
        return judge

    def measure(self, model: Model) -> dict[str, float]:
        scores = []
        for window in self.windows:
            logprobs = model.logprobs(window)[WINDOW // 2 - 1 : -1]
            targets = torch.tensor(window[WINDOW // 2 :], device=logprobs.device)
            scores.append(logprobs.gather(1, targets[:, None]))
        pairs = list(zip(self.logprobs, self._answer_logprobs(model), strict=True))
        kl = torch.cat([F.kl_div(other, base, reduction="none", log_target=True).sum(-1) for base, other in pairs])
        same = torch.cat([base.argmax(-1) == other.argmax(-1) for base, other in pairs])
        answers = zip(self.answers, model.answers(self.prompts), strict=True)
        return {
            "perplexity": float(torch.cat(scores).double().mean().neg().exp()),
            "kl_mean": float(kl.mean()),
            "kl_99": float(kl.quantile(0.99)),
            "same_top_1": float(same.float().mean()),
            "diverges_after": sum(map(_num_equal, *zip(*answers, strict=True))) / len(self.answers),
        }

    def _answer_logprobs(self, model: Model) -> list[Tensor]:
        pairs = zip(self.prompts, self.answers, strict=True)
        return [model.logprobs(prompt + answer)[len(prompt) - 1 : -1] for prompt, answer in pairs]


def _num_equal(first: list[int], second: list[int]) -> int:
    """Leading tokens that are the same."""
    pairs = zip(first, second, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(first))


def _measured(base: Path, judge: Judge, options: dict[str, Any], data: str, device: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as work:
        arguments = {"data": data} if options["method"] in ("awq", "gptq", "int8") else {}
        report = quantize(str(base), Path(work) / "out", device=device, **arguments, **options)
        figures = judge.measure(Model(Path(work) / "out", torch.device(device)))
    errors = [matrix.error for matrix in report.matrices]
    bits = 8 * report.num_bytes / _num_parameters(base)
    return {**figures, "mean_error": sum(errors) / len(errors), "bits": bits, "seconds": report.seconds}


def _num_parameters(base: Path) -> int:
    return sum(math.prod(info.shape) for info in open_checkpoint(base).source.tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--data", default="", help="calibration data; default: what comes with turbolm")
    parser.add_argument("--device", default="cuda" if probe().gpus else "cpu")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between")
    parser.add_argument("--windows", type=int, default=1000, help="most windows of the text")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "base"
        unpack(options.model, folder)
        base = Model(folder, torch.device(options.device))
        judge = Judge.of(folder, base, options.text.read_text(encoding="utf-8"), options.windows)
        rows["16 bit"] = judge.measure(base)
        print("16 bit", rows["16 bit"], flush=True)
        for name in options.only.split(","):
            try:
                rows[name] = _measured(folder, judge, CASES[name], options.data, options.device)
            except ConfigError as error:  # a group size that doesn't fit the model
                print(name, error, flush=True)
                continue
            print(name, {key: round(value, 5) for key, value in rows[name].items()}, flush=True)
    if options.save:
        record = {
            "benchmark": "quality", "model": Path(fetch(options.model).path).name, "machine": machine(),
            "text": options.text.name, "windows": len(judge.windows), "data": Path(options.data).name, "rows": rows,
        }  # fmt: skip
        print(f"saved {save(options.save, record)}")


if __name__ == "__main__":
    main()
