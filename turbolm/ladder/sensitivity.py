"""Which layers need their keys and values in 16 bits: found by quantizing one layer's after the other.

The divergence that a layer causes alone is measured over pieces of text. Of the layers that cause most, as few are kept
as bring what all others cause together, measured too, within the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from turbolm.compress.calibration import lay_out
from turbolm.compress.samples import load_samples, tokenizer_of
from turbolm.config import EngineConfig, resolve
from turbolm.engine.build import model_needs
from turbolm.errors import ConfigError
from turbolm.hub import fetch
from turbolm.kv import KvFormat
from turbolm.loading import NULL_MODEL
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops.hardware import probe
from turbolm.ops.select import select_ops

_PIECE = 128  # tokens; also a KV block
_NUM_PIECES = 4
_SHARE = 0.5  # of the allowed drop: answers, longer than the pieces, may diverge more


@dataclass(frozen=True, slots=True)
class Sensitivity:
    kv: str
    divergences: tuple[float, ...]
    """Of each layer whose keys and values alone are quantized: mean KL from the base per token, in nats."""
    skipped: tuple[int, ...]
    """Layers that are better kept in 16 bits."""
    divergence: float
    """Of all others quantized together."""
    limit: float

    @property
    def skip(self) -> str:
        """As `EngineConfig.kv_skip_layers`."""
        return ",".join(map(str, self.skipped))


Find = Callable[[str, EngineConfig, float, str], Sensitivity]


def find_layers(model: str, engine: EngineConfig, max_drop: float, data: str) -> Sensitivity:
    """Loads the model, its weights as they are in its files, and chooses for `engine.kv`. `data`: as for calibration.
    ConfigError where hardly a layer could be quantized; the errors of loading."""
    if model == NULL_MODEL:
        raise ConfigError(f"'{NULL_MODEL}' has no layers whose precision could be chosen")
    checkpoint = open_checkpoint(fetch(model).path)
    spec = decoder_spec(checkpoint.config)
    alone = replace(engine, weights="auto", kv_skip_layers="", tensor_parallel=1)
    options = replace(alone, max_context=_PIECE, max_batch_size=1)
    config = resolve(options, model_needs(model, checkpoint, spec), probe())
    if not config.kv.is_quantized:
        raise ConfigError(f"kv is {engine.kv!r}, which leaves all layers as they are; choose int8, int4 or fp8")
    samples = load_samples(data, tokenizer_of(checkpoint), _NUM_PIECES, _PIECE)
    ops = select_ops(config.device, config.kernels, config.dtype, unpack=config.unpack, threads=config.threads)
    decoder = load_decoder(spec, Loader(checkpoint.source, ops, packing=checkpoint.packing), _PIECE)
    meter = _Meter(decoder, config.kv, samples.token_ids)
    divergences = [meter.divergence([layer]) for layer in range(len(spec.layers))]
    return choose(engine.kv, divergences, -math.log(1 - _SHARE * max_drop), meter.divergence)


def choose(
    kv: str, divergences: Sequence[float], limit: float, measure: Callable[[Sequence[int]], float]
) -> Sensitivity:
    """`measure`: the divergence of these layers quantized together. ConfigError where all would have to be kept."""
    ranked = sorted(range(len(divergences)), key=lambda layer: -divergences[layer])
    found: dict[int, float] = {}
    low, high = 0, len(ranked)  # of how many are kept
    while low < high:
        middle = (low + high) // 2
        found[middle] = measure(sorted(ranked[middle:]))
        low, high = (low, middle) if found[middle] <= limit else (middle + 1, high)
    if high < len(ranked):
        return Sensitivity(kv, tuple(divergences), tuple(sorted(ranked[:high])), found[high], limit)
    raise ConfigError(
        f"with kv {kv}, whichever layers are kept in 16 bits, the model diverges by more than {limit:.4f} nats a "
        "token; take a milder kv, or a larger --max-drop"
    )


class _Meter:
    def __init__(self, decoder: Decoder, kv: KvFormat, pieces: Iterable[tuple[int, ...]]) -> None:
        self._decoder = decoder
        self._kv = kv
        self._pieces = list(pieces)
        self._base = [self._logprobs(piece, KvFormat.both(kv.plain)) for piece in self._pieces]

    def divergence(self, layers: Sequence[int]) -> float:
        """From the base, where these layers are quantized: nats per token."""
        others = tuple(sorted(set(range(len(self._decoder.layers))) - set(layers)))
        kv = replace(self._kv, skipped=others)
        total = count = 0.0
        for base, piece in zip(self._base, self._pieces, strict=True):
            changed = self._logprobs(piece, kv)
            total += float(functional.kl_div(changed, base, reduction="sum", log_target=True))
            count += len(piece)
        return max(total / count, 0.0) if math.isfinite(total) else math.inf

    def _logprobs(self, piece: tuple[int, ...], kv: KvFormat) -> Tensor:
        """[t, v], on the CPU, where there is room."""
        device = self._decoder.ops.device
        caches = cache_spec(self._decoder.spec, kv).allocate(1, _PIECE, device)
        with torch.inference_mode():
            logits = self._decoder.forward(lay_out([piece], device), caches)
            return functional.log_softmax(logits.float(), dim=-1).cpu()
