"""EngineConfig: what a user may set; Hardware: what the machine has; resolve: what "auto" became.

Command-line flags are generated from `EngineConfig`: its field docstrings are their help.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from turbolm.drafts import draft_needs, has_speculation
from turbolm.errors import CapacityError, ConfigError, nearest
from turbolm.kv import KvFormat, KvKind, KvShape, bytes_per_token, parse_kinds, parse_layers, resolve_format
from turbolm.kv_scales import choose_scales
from turbolm.lora import adapter_bytes, adapter_sources, as_entries, check_room
from turbolm.memory import Conversion, ModelNeeds, step_limits, weight_bytes, working_memory

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "native", "reference"]
Speculation = Literal["auto", "on", "off"]
Weights = Literal["auto", "int4", "int8", "fp8"]

DEFAULT_MODEL = "smollm2-135m"
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a user may set. Zero or "auto" leaves the choice to `resolve`."""

    device: Device = "auto"
    """Where the model runs."""
    dtype: DType = "auto"
    """What the arithmetic runs in: "auto" keeps packed weights packed; naming a dtype unpacks them to it (on a GPU
    int4, int8 and fp8 stay packed)."""
    weights: Weights = "auto"
    """What an unquantized model's weights are rounded to at load, without calibration; "auto": they stay."""
    kernels: Kernels = "auto"
    """"reference" runs plain PyTorch instead of turbolm's own kernels (for checking them)."""
    tensor_parallel: int = 1
    """GPUs of this machine that compute the model together, each with its part of every layer."""
    threads: int = 0
    """CPU threads; 0: one per physical core that this process may use."""
    max_context: int = 0
    """Longest prompt plus answer in tokens; 0: what the model was trained for, if memory allows."""
    max_batch_size: int = 0
    """Most requests computed together; 0: chosen by device."""
    max_batch_tokens: int = 0
    """Most tokens computed in one step: longer prompts are prefilled in chunks; 0: chosen by device."""
    max_waiting: int = 100_000
    """Most requests that wait; further ones are refused."""
    block_size: int = 0
    """Tokens per KV block; 0: chosen by device."""
    kv_memory: str = "auto"
    """Memory for the KV cache, such as 500M or 4G; "auto": what max_context and max_batch_size can use,
    within a part of the free memory."""
    kv: str = "auto"
    """How the KV cache stores keys and values: "auto" (16 or 32 bits), float32, bfloat16, float16, int8, int4 or fp8;
    "int8:k,int4:v" sets keys and values apart. int8 holds twice the tokens of 16 bits, int4 nearly four times."""
    kv_skip_layers: str = ""
    """Layers whose keys and values stay unquantized, such as "0,1,-1" (-1: the last)."""
    kv_scales: str = "auto"
    """Static scales of an int8 KV cache: "auto" takes those that `turbolm quantize kv` put beside the model, a path
    those of that file; "off": each token has its own."""
    prefix_cache: bool = True
    """Keep the KV blocks of finished requests for prompts that begin the same way."""
    deterministic: bool = False
    """An answer has the same bits whatever else is computed with it, and however its prompt was divided: slower on a
    GPU. On the CPU the native kernels are so at any rate."""
    speculation: Speculation = "auto"
    """"on" computes several tokens of an answer at once where it repeats earlier text and few requests run; the
    answers stay the same. "auto": on the CPU, and on a GPU with a draft model."""
    draft_model: str = ""
    """A small model with the same vocabulary, whose guesses are checked several at once; the answers stay the same."""

    adapters: tuple[str, ...] = field(default=(), metadata={"flag": "--adapter"})
    """A LoRA adapter as NAME=PATH (a folder as PEFT saves it, or hf:org/name): requests that give NAME as their model
    get it. May be given several times."""
    max_adapters: int = 0
    """Most adapters that are there at once, with those that come while the engine runs; 0: as many as are given."""
    max_adapter_rank: int = 0
    """Largest rank of an adapter; 0: the largest of those given, at least 16."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", as_entries(self.adapters))
        check_room(self.max_adapters, self.max_adapter_rank, len(adapter_sources(self.adapters)))
        for name, allowed in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("weights", ("auto", "int4", "int8", "fp8")),
            ("kernels", ("auto", "native", "reference")),
            ("speculation", ("auto", "on", "off")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.{nearest(str(value), allowed)}")
        for name in ("threads", "max_context", "max_batch_size", "max_batch_tokens", "max_waiting", "block_size"):
            value = getattr(self, name)
            if type(value) is not int or value < (name == "max_waiting"):
                raise ConfigError(f"{name} must be a whole number, 0 or more, got {value!r}")
        if type(self.tensor_parallel) is not int or self.tensor_parallel < 1:
            raise ConfigError(f"tensor_parallel must be a whole number, 1 or more, got {self.tensor_parallel!r}")
        if self.block_size not in (0, 8, 16, 32, 64, 128):
            raise ConfigError(f"block_size is {self.block_size}; allowed: 8, 16, 32, 64, 128, or 0 for a fitting one")
        if self.kv_memory != "auto":
            parse_size(self.kv_memory, "kv_memory")
        parse_kinds(self.kv)
        parse_layers(self.kv_skip_layers)

    @classmethod
    def of(cls, base: EngineConfig | None = None, **options: object) -> EngineConfig:
        """`base` (default: the defaults) with `options` changed; unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown engine option '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
        return replace(base or cls(), **options)  # type: ignore[arg-type]


def with_room(config: EngineConfig, ranks: Sequence[int]) -> EngineConfig:
    """With room for the adapters given, which have these ranks. Raises ConfigError where there is too little."""
    highest = max(ranks, default=0)
    if 0 < config.max_adapter_rank < highest:
        raise ConfigError(f"max_adapter_rank is {config.max_adapter_rank}, and an adapter has rank {highest}; raise it")
    return replace(
        config,
        max_adapters=config.max_adapters or len(ranks),
        max_adapter_rank=config.max_adapter_rank or max(highest, 16),
    )


def parse_size(text: str, name: str) -> int:
    """`"4G"`, `"500M"`, `"1.5GiB"` or plain bytes → bytes (binary units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ConfigError(f"{name} is {text!r}; give a size such as 500M, 4G or 1.5G")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def parse_part(text: str, name: str) -> float:
    """`"1%"` or `"0.01"` → 0.01. ConfigError for what isn't from 0% to 100%."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%?)", str(text).strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {text!r}; give a part from 0% to 100%, such as 1% or 0.01")
    return value


def format_size(num_bytes: float) -> str:
    """Bytes for people, in the decimal units that file sizes are given in: `98.4 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{2 if num_bytes < 10 * scale else 1}f} {unit}"
    return f"{int(num_bytes)} B"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    total_memory: int  # bytes
    free_memory: int  # bytes
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this process may use; made by `ops.hardware.probe`."""

    cpu: str
    architecture: str  # "x86_64", "aarch64"
    physical_cores: int  # within affinity and cgroup quota
    isa: tuple[str, ...]  # CPU features that kernels care about
    total_memory: int  # bytes, within the cgroup's limit
    free_memory: int  # bytes, within the cgroup's limit
    gpus: tuple[Gpu, ...] = ()
    native: str | None = None  # variant of the native CPU kernels that loads here
    native_error: str | None = None  # why there is none
    gpu_native_error: str | None = None  # why turbolm's GPU kernels can't run on `gpus`


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """EngineConfig with every "auto" decided; `reasons` says how."""

    device: str
    kernels: str
    dtype: str  # of activations
    kv: KvFormat
    unpack: bool  # packed weights are unpacked to `dtype`
    weights: Weights  # what unquantized weights are rounded to; "auto": nothing
    threads: int
    max_context: int
    max_batch_size: int
    max_batch_tokens: int
    max_prompt_tokens: int  # of those, beside one for each of `max_batch_size` sequences
    max_logit_rows: int  # most rows of logits of one step
    max_waiting: int
    block_size: int
    num_blocks: int
    weight_bytes: int  # memory of the weights
    kv_bytes_per_token: int
    prefix_cache: bool
    speculation: bool
    tensor_parallel: int = 1
    draft_model: str = ""
    draft_cost: float = 0.0  # its weights, in weights of the model that it drafts for
    deterministic: bool = False  # what computes a row's bits must not depend on other rows
    kv_scales: str = ""  # the path of static scales; "": each token has its own
    max_adapters: int = 0  # LoRA adapters that there is room for
    max_adapter_rank: int = 0
    reasons: tuple[str, ...] = field(default=())

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


#: Tokens per KV block, where nobody says otherwise.
BLOCK_SIZES = {"cpu": 16, "cuda": 64}
#: Of the memory beside the weights, what the KV cache takes at most.
KV_SHARE = 0.9
_CPU_POOL_CONTEXTS = 4  # the automatic KV cache holds this many contexts of full length
_CPU_KV_SHARE = 0.3  # and at most this part of the memory that the weights leave


@dataclass(frozen=True, slots=True)
class Backend:
    """Where and with what the arithmetic runs, and why."""

    device: str
    kernels: str
    dtype: str
    kv_dtype: KvKind  # of what is not quantized
    unpack: bool
    threads: int
    reasons: tuple[str, ...]


def choose_backend(config: EngineConfig, hardware: Hardware) -> Backend:
    """Device, kernels and dtypes for this machine. Raises ConfigError for what it can't do."""
    reasons = []
    device = config.device
    if device == "auto":
        device = "cuda" if hardware.gpus else "cpu"
        reasons.append(
            f"device {device}: " + (f"found {hardware.gpus[0].name}" if hardware.gpus else "no CUDA GPU found")
        )
    elif device == "cuda" and not hardware.gpus:
        raise ConfigError("device is 'cuda', but no CUDA GPU was found; use device 'cpu' or check `turbolm doctor`")
    kernels = _choose_kernels(config, hardware, device, reasons)
    unpack = kernels == "reference" or (config.dtype != "auto" and device == "cpu")
    dtype: KvKind = "float32" if device == "cpu" else "bfloat16"
    kv_dtype = dtype
    if config.dtype == "auto":
        kv_dtype = "float16" if device == "cpu" and kernels == "native" else dtype
        packed = "unpacked" if unpack else "packed as in the file, multiplied by 8-bit activations"
        if device == "cuda" and not unpack:
            packed = "unpacked, but for int4, int8 and fp8"
        reasons.append(f"dtype {dtype}: block-quantized weights {packed}")
    elif device == "cpu" and kernels == "native" and config.dtype != "float32":
        raise ConfigError(
            f"dtype is '{config.dtype}', but the native CPU kernels compute in float32; use dtype 'auto' or 'float32', "
            "or kernels 'reference'"
        )
    else:
        dtype = kv_dtype = config.dtype
    threads = config.threads or hardware.physical_cores
    reasons.append(
        f"threads {threads}: " + ("as given" if config.threads else "physical cores that this process may use")
    )
    return Backend(device, kernels, dtype, kv_dtype, unpack, threads, tuple(reasons))


def _choose_kernels(config: EngineConfig, hardware: Hardware, device: str, reasons: list[str]) -> str:
    error = hardware.gpu_native_error
    if device == "cpu":
        error = None if hardware.native else hardware.native_error or "they were not built"
    if error is None and config.dtype == "float32" and device == "cuda":
        error = "they compute in bfloat16 or float16, and dtype is 'float32'"
    if config.kernels == "native" and error:
        raise ConfigError(f"kernels is 'native', but turbolm's own kernels for {device} can't be used: {error}")
    if config.kernels != "auto":
        return config.kernels
    if error is None:
        reasons.append(
            "kernels native: " + (f"variant {hardware.native} runs on this CPU" if device == "cpu" else "GPU")
        )
        return "native"
    reasons.append(f"kernels reference, plain PyTorch (several times slower): {error}")
    return "reference"


def resolve(
    config: EngineConfig, model: ModelNeeds, hardware: Hardware, draft_model: ModelNeeds | None = None
) -> ResolvedConfig:
    """Decide every "auto". Raises ConfigError for contradictions, and CapacityError, with what is
    needed, what there is and what to change, where memory is too small."""
    backend = choose_backend(config, hardware)
    reasons = list(backend.reasons)
    on_cpu = backend.device == "cpu"
    if config.max_context > model.max_context:
        reasons.append(f"max_context {config.max_context}: beyond the {model.max_context} that the model was made for")
    if model.conversion is not None:
        dtype = f"{backend.dtype}, unpacked" if backend.unpack else backend.dtype
        rounded = model.conversion.weights if config.weights == "auto" else config.weights
        used = Conversion(backend.device, dtype, rounded, config.tensor_parallel, backend.kernels)
        model.conversion.check(model.name, used)
    _check_weights(config, model, reasons)
    weights = weight_bytes(model, backend.device, backend.dtype, unpack=backend.unpack, rounded=config.weights)
    limits = step_limits(config.max_batch_size, config.max_batch_tokens, backend.device)
    _check_tensor_parallel(config, backend, hardware, reasons)
    size = config.tensor_parallel
    working = working_memory(model, backend.device, backend.dtype, limits, size).total
    rank = config.max_adapter_rank
    adapters = adapter_bytes(config.max_adapters, rank, model, backend.dtype)
    draft = draft_needs(config, backend, draft_model, limits, reasons)
    free = hardware.free_memory
    if not on_cpu:  # a draft model is on the first GPU alone
        own, *others = (gpu.free_memory for gpu in hardware.gpus[:size])
        free = min([own, *(other + draft.weights + draft.working for other in others)])
    left = free - weights - working - adapters - draft.weights - draft.working
    if left <= 0:
        raise CapacityError(
            f"'{model.name}' needs {format_size(weights)} for its weights and {format_size(working)} of working "
            + (f"memory, {format_size(adapters)} for adapters; " if adapters else "memory; ")
            + f"{format_size(free)} are free on {backend.device}. Use a smaller or a quantized model"
            + (", or dtype 'auto'" if config.dtype != "auto" else "")
        )
    if adapters:
        reasons.append(f"adapters: room for {config.max_adapters} of rank up to {rank}, {format_size(adapters)}")
    kv = resolve_kv(config, model.kv_layers, backend, hardware, reasons)
    _check_deterministic(config, backend, kv, reasons)
    kv_bytes = bytes_per_token(model.kv_layers, kv) + draft.kv_per_token
    block_size = config.block_size or BLOCK_SIZES[backend.device]
    pool_tokens = _pool_tokens(config, model, kv_bytes, left, block_size, limits.batch_size, on_cpu, reasons)
    max_context = _max_context(config, model, pool_tokens, kv_bytes, reasons)
    return ResolvedConfig(
        device=backend.device,
        kernels=backend.kernels,
        dtype=backend.dtype,
        kv=kv,
        unpack=backend.unpack,
        weights=config.weights,
        threads=backend.threads,
        max_context=max_context,
        max_batch_size=limits.batch_size,
        max_batch_tokens=limits.tokens,
        max_prompt_tokens=limits.prompt_tokens,
        max_logit_rows=limits.logit_rows,
        max_waiting=config.max_waiting,
        block_size=block_size,
        num_blocks=pool_tokens // block_size,
        weight_bytes=weights,
        kv_bytes_per_token=kv_bytes,
        prefix_cache=config.prefix_cache,
        speculation=has_speculation(config, backend, reasons),
        tensor_parallel=config.tensor_parallel,
        draft_model=draft.name,
        draft_cost=draft.weights / max(1, weights),
        deterministic=config.deterministic,
        kv_scales=choose_scales(config.kv_scales, model.kv_scales, kv, reasons),
        max_adapters=config.max_adapters,
        max_adapter_rank=rank,
        reasons=tuple(reasons),
    )


def _check_tensor_parallel(config: EngineConfig, backend: Backend, hardware: Hardware, reasons: list[str]) -> None:
    """Raises ConfigError for more parts than there are GPUs."""
    size = config.tensor_parallel
    if size == 1:
        return
    if backend.device == "cpu":
        if backend.kernels != "reference":
            raise ConfigError(
                f"tensor_parallel is {size}, but the CPU's native kernels use all cores in one process; use 1 (or, to "
                "check that the parts add up, kernels 'reference')"
            )
    elif size > len(hardware.gpus):
        raise ConfigError(f"tensor_parallel is {size}, and {len(hardware.gpus)} GPUs were found; use that or less")
    reasons.append(f"tensor_parallel {size}: each process has a part of every layer; sizes below are those of one part")


def resolve_kv(
    config: EngineConfig, layers: tuple[KvShape, ...], backend: Backend, hardware: Hardware, reasons: list[str]
) -> KvFormat:
    """How keys and values are stored. Raises ConfigError for what the backend or the model can't have."""
    kv = resolve_format(config.kv, config.kv_skip_layers, backend.kv_dtype, layers)
    if backend.device == "cuda" and backend.kernels == "native":
        works: tuple[str, ...] = (backend.dtype, "int8", "int4")
        if hardware.gpus[0].capability >= (8, 9):
            works = (*works, "fp8")
        if not kv.kinds <= set(works):
            raise ConfigError(
                f"kv is {config.kv!r}, but with dtype '{backend.dtype}' turbolm's kernels for this GPU store "
                f"{', '.join(works)}; use one of them or kernels 'reference'"
            )
    plain = bytes_per_token(layers, KvFormat.both(kv.plain))
    reasons.append(
        f"KV cache in {kv}: {bytes_per_token(layers, kv)} bytes per token"
        + (f", layers {', '.join(map(str, kv.skipped))} in {kv.plain}" if kv.skipped else "")
        + (f", instead of {plain} in {kv.plain}" if kv.is_quantized else "")
    )
    return kv


def _check_deterministic(config: EngineConfig, backend: Backend, kv: KvFormat, reasons: list[str]) -> None:
    """Raises ConfigError for what rounds a row by what is beside it."""
    if not config.deterministic:
        return
    if backend.kernels != "native":
        raise ConfigError(
            "deterministic needs turbolm's own kernels: plain PyTorch (kernels 'reference') rounds differently for "
            "different numbers of rows"
        )
    if backend.device == "cuda" and kv.kinds != {backend.dtype}:
        raise ConfigError(
            f"deterministic on a GPU keeps keys and values in '{backend.dtype}', the dtype of activations, and kv is "
            f"{config.kv!r}; use kv 'auto'"
        )
    reasons.append(
        "deterministic: "
        + ("the native CPU kernels are so anyway" if backend.device == "cpu" else "kernels that divide all work alike")
    )


def _check_weights(config: EngineConfig, model: ModelNeeds, reasons: list[str]) -> None:
    """Raises ConfigError for rounding what is rounded already."""
    if config.weights == "auto" or model.conversion is not None:
        return
    if model.packed:
        raise ConfigError(
            f"weights is '{config.weights}', but '{model.name}' is quantized already ({', '.join(model.packed)}); "
            "use weights 'auto', or give the unquantized model"
        )
    reasons.append(f"weights {config.weights}: rounded at load to the nearest, without calibration")


def _pool_tokens(
    config: EngineConfig,
    model: ModelNeeds,
    kv_bytes: int,
    left: int,
    block_size: int,
    max_batch_size: int,
    on_cpu: bool,
    reasons: list[str],
) -> int:
    """Tokens that the KV cache holds, a multiple of the block size."""
    size, longest = block_size, config.max_context or model.max_context
    if config.kv_memory != "auto":
        given = parse_size(config.kv_memory, "kv_memory")
        if given > left:
            raise CapacityError(
                f"kv_memory is {format_size(given)}, but beside the weights only {format_size(left)} are free; lower it"
            )
        return given // (kv_bytes * size) * size
    wanted = longest * (min(max_batch_size, _CPU_POOL_CONTEXTS) if on_cpu else max_batch_size)
    share = left * (_CPU_KV_SHARE if on_cpu else KV_SHARE)
    tokens = -(-min(wanted, max(int(share) // kv_bytes, size)) // size) * size
    reasons.append(f"KV cache {format_size(tokens * kv_bytes)} for {tokens} tokens, of {format_size(left)} free")
    return tokens


def _max_context(config: EngineConfig, model: ModelNeeds, pool_tokens: int, kv_bytes: int, reasons: list[str]) -> int:
    wanted = config.max_context or model.max_context
    if wanted <= pool_tokens:
        return wanted
    if config.max_context or pool_tokens < 1:
        raise CapacityError(
            f"a context of {wanted} tokens needs {format_size(wanted * kv_bytes)} of KV cache, which has room for "
            f"{pool_tokens} tokens; lower max_context or raise kv_memory"
        )
    reasons.append(f"max_context {pool_tokens}: all that the KV cache holds; the model was made for {wanted}")
    return pool_tokens
