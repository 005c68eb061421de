"""How many bytes a model takes: what `config.resolve` allots, and what `turbolm plan` foretells.

Norms and biases are left out: they are less than a thousandth of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from turbolm.errors import ConfigError
from turbolm.kv import KvShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Bytes per weight of the layers, as kernels keep them: on the CPU in blocks of 32.
_FORMAT_BYTES = {
    "cpu": {"int4": 20 / 32, "int8": 34 / 32, "fp8": 34 / 32},
    "cuda": {"int4": 17 / 32, "int8": 1.0, "fp8": 1.0},  # int4: 32 bits per group of 128
}
_RESERVE = 300 << 20  # bytes for everything but weights and KV cache
_GRAPHS = 1 << 30  # bytes for CUDA graphs and the workspaces of libraries
_COUNTS = 128 << 20  # bytes at most of how often answers hold each token, on a GPU
_COMMUNICATION = 1 << 30  # bytes for what several processes take to work together, on each GPU


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a model was converted to, by `turbolm convert`: it can be loaded so, and not otherwise."""

    device: str
    dtype: str  # of activations
    weights: str  # what they were rounded to, or "auto"
    tensor_parallel: int
    kernels: str = "native"

    def check(self, name: str, used: Conversion) -> None:
        """Raises ConfigError where the model `name` is to be loaded as `used`, which is something else."""
        for field in ("device", "kernels", "tensor_parallel", "weights", "dtype"):
            made, value = getattr(self, field), getattr(used, field)
            if value != made:
                raise ConfigError(
                    f"'{name}' was converted for {field} {made!r}, and here it is {value!r}: set {field} so, convert "
                    "the model again, or give the one that was converted"
                )


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """What `resolve` has to know of a model: read from headers, before any weight is loaded."""

    name: str
    max_context: int  # what it was trained for
    packed_bytes: int  # weights as they lie in the file
    num_parameters: int
    kv_layers: tuple[KvShape, ...]  # what each layer keeps of a token
    num_logits: int  # vocabulary
    activation_elements: int = 0  # per token of a step, where a layer holds the most
    layer_parameters: int = 0  # those of `num_parameters` that are in matrices of layers
    packed: tuple[str, ...] = ()  # formats of the layers' matrices, where these are quantized
    adapter_elements: int = 0  # numbers of a LoRA adapter of rank 1 on every matrix of the layers
    has_column_order: bool = False  # quantized in an order of columns, for which the CPU has no kernels
    conversion: Conversion | None = None
    kv_scales: str = ""  # the path of static scales of its KV cache, where calibration left some


@dataclass(frozen=True, slots=True)
class WorkingMemory:
    """Bytes beside weights and KV cache, on one device."""

    reserve: int  # for everything that isn't counted
    logits: int
    activations: int  # of the largest step
    graphs: int
    communication: int
    counts: int  # of answers' tokens, for penalties

    @property
    def total(self) -> int:
        return self.reserve + self.logits + self.activations + self.graphs + self.communication + self.counts


def num_counted(max_batch_size: int, vocab_size: int) -> int:
    """Sequences whose tokens a GPU counts; penalties of further ones are the host's work."""
    return max(1, min(max_batch_size, _COUNTS // (4 * vocab_size)))


class StepLimits(NamedTuple):
    """The largest step."""

    batch_size: int  # sequences
    tokens: int
    prompt_tokens: int  # of them
    logit_rows: int


def step_limits(max_batch_size: int, max_batch_tokens: int, device: str) -> StepLimits:
    """As asked for; 0: chosen by device. On a GPU, decodes then go beside a whole number of usual prompts: prompts that
    are cut because of a few decodes make a step more."""
    on_cpu = device == "cpu"
    batch_size = max_batch_size or (32 if on_cpu else 1024)
    tokens = prompt_tokens = max(max_batch_tokens or (512 if on_cpu else 8192), batch_size)
    if not max_batch_tokens and not on_cpu:
        tokens += batch_size
    return StepLimits(batch_size, tokens, prompt_tokens, max(batch_size, 64))


def working_memory(
    model: ModelNeeds, device: str, dtype: str, limits: StepLimits, tensor_parallel: int
) -> WorkingMemory:
    """`dtype`: of activations. On the CPU the reserve covers them."""
    on_gpu = device != "cpu"
    return WorkingMemory(
        reserve=_RESERVE,
        logits=limits.logit_rows * model.num_logits * 4,
        activations=limits.tokens * model.activation_elements * ITEM_BYTES[dtype] if on_gpu else 0,
        graphs=_GRAPHS if on_gpu else 0,
        communication=_COMMUNICATION if on_gpu and tensor_parallel > 1 else 0,
        counts=4 * model.num_logits * num_counted(limits.logit_rows, model.num_logits) if on_gpu else 0,
    )


def weight_bytes(model: ModelNeeds, device: str, dtype: str, *, unpack: bool, rounded: str) -> int:
    """The weights as the backend keeps them. `dtype`: of activations; `rounded`: what unquantized weights are
    rounded to at load, or "auto"."""
    if model.conversion is not None:
        return model.packed_bytes
    if unpack:
        return model.num_parameters * ITEM_BYTES[dtype]
    if device == "cuda":
        return _gpu_weight_bytes(model, ITEM_BYTES[dtype], rounded)
    rates = _FORMAT_BYTES[device]
    formats = [name for name in (model.packed if rounded == "auto" else (rounded,)) if name in rates]
    if not formats:
        return model.packed_bytes
    rate = 2.0 if model.has_column_order else max(rates[name] for name in formats)
    rest_rate = 2.0 if rounded == "auto" else rates["int8"]  # rounding takes the vocabulary's matrices too
    rest = model.num_parameters - model.layer_parameters
    return int(model.layer_parameters * rate) + int(rest * rest_rate)


def _gpu_weight_bytes(model: ModelNeeds, item_bytes: int, rounded: str) -> int:
    """Formats without kernels are unpacked, and fp8 in files, which may have blocks, is counted as if it were. int4
    has 32 bits per group, where files have 16 to 20."""
    rest = (model.num_parameters - model.layer_parameters) * item_bytes
    if rounded != "auto":
        return int(model.layer_parameters * _FORMAT_BYTES["cuda"][rounded]) + rest
    if not model.packed or not set(model.packed) <= {"int4", "int8"}:
        return model.num_parameters * item_bytes
    if "int8" in model.packed:
        return model.layer_parameters + rest
    codes = model.layer_parameters // 2
    return rest + codes + 2 * max(0, model.packed_bytes - rest - codes)
