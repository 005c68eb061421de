"""What compression costs: each method × group size × KV format against the 16-bit weights.

    python benchmarks/quality.py [--model NAME] [--text FILE] [--data FILE] [--device auto] [--only "awq 64,int8"]
                                 [--kv "int8;int4"] [--windows N] [--save NAME]

The base is the model as 16-bit safetensors (a GGUF file's blocks unpacked). Everything is computed in plain PyTorch
on unpacked weights, so that the figures are those of the weights and of the KV cache alone; int8 and fp8 round
activations too, as their kernels do. With --save each row goes to benchmarks/results as soon as it is measured, and
the same command leaves out what is there already; tables.py makes docs/quality.md of it.

Perplexity: a text in windows of 512 tokens, the second half of each scored. KL divergence, and how often the
likeliest token is the same: over the base's own greedy answers of 64 tokens to 16 questions. Divergence: the
mean number of tokens, of those 64, before a greedy answer differs from the base's.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from measure import RESULTS, machine, save
from questions import QUESTIONS, TEXT, WINDOW, windows_of
from torch import Tensor

from turbolm.compress import calibrate_kv, quantize, unpack
from turbolm.compress.calibration import lay_out
from turbolm.compress.smooth import round_rows
from turbolm.config import DEFAULT_MODEL
from turbolm.errors import ConfigError
from turbolm.hub import fetch
from turbolm.kv import KvKind, resolve_format
from turbolm.kv_scales import LayerRanges, read_scales
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, kv_layers, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import LayerCache, PreparedLinear
from turbolm.ops.hardware import probe
from turbolm.ops.reference import ReferenceOps, dequantize_heads, quantize_heads
from turbolm.text import ChatTemplate, encode_chat, load_tokenizer
from turbolm.types import Batch

ANSWER = 64  # tokens
BASE = "16 bit"
STATIC = "int8 static"  # with scales that calibration found, of each head
SINKS = " but for the first "  # tokens of a sequence, which stay as they are: nothing that turbolm does
KV = ("int8", STATIC, "int8:k,int4:v", "int4", f"int4{SINKS}4", f"int4{SINKS}16", "fp8")

#: Name → arguments of `quantize`; the base has none.
CASES: dict[str, dict[str, Any]] = {
    BASE: {},
    **{f"{method} {size if size > 0 else 'row'}": {"method": method, "group_size": size}
       for method in ("rtn", "awq", "gptq") for size in (32, 64, 128, -1)},
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
        self.sinks: tuple[KvKind, int] | None = None  # what all but so many first keys and values are rounded to

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if id(weight) in self.rounded:
            x_tk = round_rows(x_tk) if self.kind == "int8" else _round_fp8(x_tk)
        return super().linear(x_tk, weight)

    def rotary_store(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, *rest: Any) -> Tensor:
        qkv_tw = super().rotary_store(qkv_tw, batch, cache, *rest)
        if self.sinks is not None:
            kind, count = self.sinks
            slots = batch.slots[batch.positions >= count].long()
            place = slots // cache.block_size, slice(None), slots % cache.block_size
            for pool in (cache.k, cache.v):
                pool[place] = dequantize_heads(*quantize_heads(pool[place], kind), kind)
        return qkv_tw


def _round_fp8(x_tk: Tensor) -> Tensor:
    scales = x_tk.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x_tk / scales).to(torch.float8_e4m3fn).to(x_tk.dtype) * scales


class Model:
    """A checkpoint, unpacked to float32 on a device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        checkpoint = open_checkpoint(folder)
        packing = checkpoint.packing
        kind = packing.formats[0] if packing is not None and len(packing.formats) == 1 else ""
        ops = self.ops = RoundedActivations(device, torch.float32, kind)
        loader = Loader(checkpoint.source, ops, packing=packing)
        self.decoder = load_decoder(decoder_spec(checkpoint.config), loader, 2 * WINDOW)
        self.device = device
        self.ranges: tuple[LayerRanges, ...] = ()
        if kind in ("int8", "fp8"):
            for layer in self.decoder.layers:
                linears = (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down)
                ops.rounded |= {id(linear.weight) for linear in linears}

    def logprobs(self, sequence: list[int], rows: slice, kv: str = "auto") -> Tensor:
        """[r, vocabulary] of some of the tokens."""
        batch = lay_out([tuple(sequence)], self.device)
        batch = replace(batch, logit_rows=batch.logit_rows[rows])
        kind, is_partly, count = kv.partition(SINKS)
        self.ops.sinks = (cast(KvKind, kind), int(count)) if is_partly else None
        caches = self._caches(1, len(sequence), "auto" if is_partly else kv)
        return F.log_softmax(self.decoder.forward(batch, caches), dim=-1)

    def answers(self, prompts: list[list[int]]) -> list[list[int]]:
        """Greedy answers of ANSWER tokens each, computed together; ends of text are tokens like others."""
        length = max(map(len, prompts)) + ANSWER
        caches = self._caches(len(prompts), length, "auto")
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

    def _caches(self, num_sequences: int, length: int, kv: str) -> list[LayerCache]:
        """A block of `length` tokens for each sequence."""
        spec = self.decoder.spec
        kinds = resolve_format(kv.removesuffix(" static"), "", "float32", kv_layers(spec))
        kept = replace(cache_spec(spec, kinds), ranges=self.ranges if kv == STATIC else ())
        return kept.allocate(num_sequences, length, self.device)


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
    answers: list[list[int]]  # the base's
    logprobs: list[Tensor]  # the base's, of its own answers: [ANSWER, vocabulary]

    @classmethod
    def of(cls, folder: Path, base: Model, text: str, num_windows: int) -> Judge:
        tokenizer = load_tokenizer(folder)
        windows = windows_of(tokenizer.encode(text))[:num_windows]
        template = ChatTemplate.of(tokenizer)
        prompts = [encode_chat(tokenizer, template, [{"role": "user", "content": text}]) for text in QUESTIONS]
        judge = cls(windows, prompts, base.answers(prompts), [])
        judge.logprobs = judge._answer_logprobs(base, "auto")
        return judge

    def measure(self, model: Model, kv: str = "auto") -> dict[str, float]:
        scores = []
        for window in self.windows:
            logprobs = model.logprobs(window, slice(WINDOW // 2 - 1, -1), kv)
            targets = torch.tensor(window[WINDOW // 2 :], device=logprobs.device)
            scores.append(logprobs.gather(1, targets[:, None]))
        kl, same, lengths = [], [], []
        others = self._answer_logprobs(model, kv)
        for base, other, answer in zip(self.logprobs, others, self.answers, strict=True):
            kl.append(F.kl_div(other, base, reduction="none", log_target=True).sum(-1))
            same.append(base.argmax(-1) == other.argmax(-1))
            # Up to the first token that differs, a greedy answer is the base's: so its own would begin.
            lengths.append(_num_equal(answer, other.argmax(-1).tolist()))
        return {
            "perplexity": float(torch.cat(scores).double().mean().neg().exp()),
            "kl_mean": float(torch.cat(kl).mean()),
            "kl_99": float(torch.cat(kl).quantile(0.99)),
            "same_top_1": float(torch.cat(same).float().mean()),
            "diverges_after": sum(lengths) / len(lengths),
        }

    def _answer_logprobs(self, model: Model, kv: str) -> list[Tensor]:
        pairs = zip(self.prompts, self.answers, strict=True)
        return [model.logprobs(prompt + answer, slice(len(prompt) - 1, -1), kv) for prompt, answer in pairs]


def _num_equal(first: list[int], second: list[int]) -> int:
    """Leading tokens that are the same."""
    pairs = zip(first, second, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(first))


def quantized(base: Path, output: Path, options: dict[str, Any], data: str, device: str) -> dict[str, float]:
    """Write the model, and what is known of it without running it."""
    arguments = {"data": data} if options["method"] in ("awq", "gptq", "int8") else {}
    report = quantize(str(base), output, device=device, **arguments, **options)
    errors = [matrix.error for matrix in report.matrices]
    bits = 8 * report.num_bytes / _num_parameters(base)
    return {"bits": bits, "mean_error": sum(errors) / len(errors), "seconds": report.seconds}


def _num_parameters(base: Path) -> int:
    return sum(math.prod(info.shape) for info in open_checkpoint(base).source.tensors.values())


class Record:
    """The rows, which a name keeps from one run to the next. A row has its figures, and under "kv" those of each KV
    format."""

    def __init__(self, name: str | None, about: dict[str, Any]) -> None:
        """Raises SystemExit where the name has rows that were measured on something else."""
        self._name = name
        self._about = about
        self.rows: dict[str, dict[str, Any]] = {}
        path = RESULTS / f"{name}.json"
        if name and path.exists():
            found = json.loads(path.read_text())
            self.rows = found.pop("rows")
            wrong = [key for key, value in about.items() if key != "machine" and found.get(key) != value]
            if wrong:
                raise SystemExit(f"{path} has other {', '.join(wrong)}: delete it, or choose another --save")

    def missing(self, name: str, kv: tuple[str, ...]) -> list[str]:
        """KV formats that are still to be measured; "auto": of 16 bit."""
        row = self.rows.get(name)
        return ["auto", *kv] if row is None else [kind for kind in kv if kind not in row["kv"]]

    def add(self, name: str, kv: str, figures: dict[str, float]) -> None:
        print(f"{name:20} {kv:14}", {key: round(value, 5) for key, value in figures.items()}, flush=True)
        if kv == "auto":
            self.rows[name] = {**figures, "kv": {}}
        else:
            self.rows[name]["kv"][kv] = figures
        order = [*CASES, *(other for other in self.rows if other not in CASES)]
        self.rows = {case: self.rows[case] for case in order if case in self.rows}
        if self._name:
            save(self._name, {**self._about, "rows": self.rows})


def run(record: Record, base: Path, judge: Judge, name: str, kv: tuple[str, ...], data: str, device: str) -> None:
    missing = record.missing(name, kv)
    if not missing:
        return
    with tempfile.TemporaryDirectory() as work:
        folder, found = base, {}
        if CASES[name]:
            folder = Path(work) / "out"
            try:
                found = quantized(base, folder, CASES[name], data, device)
            except ConfigError as error:  # a group size that doesn't fit the model
                print(name, error, flush=True)
                return
        model = Model(folder, torch.device(device))
        if STATIC in missing:
            path, _ = calibrate_kv(str(folder), work, data=data, device=device)
            model.ranges = read_scales(path, kv_layers(model.decoder.spec))
        for kind in missing:
            record.add(name, kind, {**judge.measure(model, kind), **(found if kind == "auto" else {})})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--data", default="", help="calibration data; default: what comes with turbolm")
    parser.add_argument("--device", default="cuda" if probe().gpus else "cpu")
    parser.add_argument("--only", default=",".join(CASES), help="names of cases, with commas between")
    parser.add_argument("--kv", default=";".join(KV), help="KV formats, with ';' between; '' for none")
    parser.add_argument("--windows", type=int, default=1000, help="most windows of the text")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, torch.inference_mode():
        folder = Path(work) / "base"
        unpack(options.model, folder)
        base = Model(folder, torch.device(options.device))
        judge = Judge.of(folder, base, options.text.read_text(encoding="utf-8"), options.windows)
        del base
        about = {
            "benchmark": "quality", "model": Path(fetch(options.model).path).name, "machine": machine(),
            "text": options.text.name, "windows": len(judge.windows), "data": Path(options.data).name,
        }  # fmt: skip
        record = Record(options.save, about)
        for name in options.only.split(","):
            run(record, folder, judge, name, tuple(filter(None, options.kv.split(";"))), options.data, options.device)


if __name__ == "__main__":
    main()
