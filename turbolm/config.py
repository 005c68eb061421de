"""EngineConfig: what a user may set; Hardware: what the machine has; resolve: what "auto" became.

Command-line flags are generated from `EngineConfig`: its field docstrings are their help.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from turbolm.errors import CapacityError, ConfigError, nearest

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "native", "reference"]
Speculation = Literal["auto", "off"]

DEFAULT_MODEL = "smollm2-135m"
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a user may set. Zero or "auto" leaves the choice to `resolve`."""

    device: Device = "auto"
    """Where the model runs."""
    dtype: DType = "auto"
    """What the arithmetic runs in: "auto" keeps packed weights packed; naming a dtype unpacks them to it."""
    kernels: Kernels = "auto"
    """"reference" runs plain PyTorch instead of turbolm's own kernels (for checking them)."""
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
    prefix_cache: bool = True
    """Keep the KV blocks of finished requests for prompts that begin the same way."""
    speculation: Speculation = "auto"
    """"auto" computes several tokens of an answer at once where it repeats earlier text and few requests
    run; the answers stay the same."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
            ("kernels", ("auto", "native", "reference")),
            ("speculation", ("auto", "off")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.{nearest(str(value), allowed)}")
        for name in ("threads", "max_context", "max_batch_size", "max_batch_tokens", "max_waiting", "block_size"):
            value = getattr(self, name)
            if type(value) is not int or value < (name == "max_waiting"):
                raise ConfigError(f"{name} must be a whole number, 0 or more, got {value!r}")
        if self.block_size not in (0, 8, 16, 32, 64, 128):
            raise ConfigError(f"block_size is {self.block_size}; allowed: 8, 16, 32, 64, 128, or 0 for a fitting one")
        if self.kv_memory != "auto":
            parse_size(self.kv_memory, "kv_memory")

    @classmethod
    def of(cls, base: EngineConfig | None = None, **options: object) -> EngineConfig:
        """`base` (default: the defaults) with `options` changed; unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown engine option '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
        return replace(base or cls(), **options)  # type: ignore[arg-type]


def parse_size(text: str, name: str) -> int:
    """`"4G"`, `"500M"`, `"1.5GiB"` or plain bytes → bytes (binary units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise ConfigError(f"{name} is {text!r}; give a size such as 500M, 4G or 1.5G")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


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
class ModelNeeds:
    """What `resolve` has to know of a model: read from headers, before any weight is loaded."""

    name: str
    max_context: int  # what it was trained for
    packed_bytes: int  # weights as they lie in the file
    num_parameters: int
    kv_elements_per_token: int  # keys and values of all layers
    num_logits: int  # vocabulary
    activation_elements: int = 0  # per token of a step, where a layer holds the most


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """EngineConfig with every "auto" decided; `reasons` says how."""

    device: str
    kernels: str
    dtype: str  # of activations
    kv_dtype: str
    unpack: bool  # packed weights are unpacked to `dtype`
    threads: int
    max_context: int
    max_batch_size: int
    max_batch_tokens: int
    max_logit_rows: int  # most rows of logits of one step
    max_waiting: int
    block_size: int
    num_blocks: int
    prefix_cache: bool
    speculation: bool
    reasons: tuple[str, ...] = field(default=())

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CPU_POOL_CONTEXTS = 4  # the automatic KV cache holds this many contexts of full length
_POOL_SHARE = 0.3  # and at most this part of the memory that the weights leave
_RESERVE = 300 << 20  # bytes for everything but weights and KV cache
_GRAPHS = 1 << 30  # bytes for CUDA graphs and the workspaces of libraries


@dataclass(frozen=True, slots=True)
class Backend:
    """Where and with what the arithmetic runs, and why."""

    device: str
    kernels: str
    dtype: str
    kv_dtype: str
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
    unpack = config.dtype != "auto" or kernels == "reference" or device == "cuda"
    dtype, kv_dtype = str(config.dtype), str(config.dtype)
    if config.dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
        kv_dtype = "float16" if device == "cpu" and kernels == "native" else dtype
        packed = "unpacked" if unpack else "packed as in the file, multiplied by 8-bit activations"
        reasons.append(f"dtype {dtype}: block-quantized weights {packed}; KV cache {kv_dtype}")
    elif device == "cpu" and kernels == "native" and dtype != "float32":
        raise ConfigError(
            f"dtype is '{dtype}', but the native CPU kernels compute in float32; use dtype 'auto' or 'float32', "
            "or kernels 'reference'"
        )
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


def resolve(config: EngineConfig, model: ModelNeeds, hardware: Hardware) -> ResolvedConfig:
    """Decide every "auto". Raises ConfigError for contradictions, and CapacityError, with what is
    needed, what there is and what to change, where memory is too small."""
    backend = choose_backend(config, hardware)
    reasons = list(backend.reasons)
    on_cpu = backend.device == "cpu"
    if config.max_context > model.max_context:
        reasons.append(f"max_context {config.max_context}: beyond the {model.max_context} that the model was made for")
    weight_bytes = model.num_parameters * _ITEM_BYTES[backend.dtype] if backend.unpack else model.packed_bytes
    max_batch_size = config.max_batch_size or (32 if on_cpu else 1024)
    max_batch_tokens = max(config.max_batch_tokens or (512 if on_cpu else 8192), max_batch_size)
    max_logit_rows = max(max_batch_size, 64)
    free = hardware.free_memory if on_cpu else hardware.gpus[0].free_memory
    working = _RESERVE + max_logit_rows * model.num_logits * 4
    if not on_cpu:
        working += _GRAPHS + max_batch_tokens * model.activation_elements * _ITEM_BYTES[backend.dtype]
    left = free - weight_bytes - working
    if left <= 0:
        raise CapacityError(
            f"'{model.name}' needs {format_size(weight_bytes)} for its weights and {format_size(working)} of working "
            f"memory; {format_size(free)} are free on {backend.device}. Use a smaller or a quantized model"
            + (", or dtype 'auto'" if config.dtype != "auto" else "")
        )
    kv_bytes = model.kv_elements_per_token * _ITEM_BYTES[backend.kv_dtype]
    block_size = config.block_size or (16 if on_cpu else 64)
    pool_tokens = _pool_tokens(config, model, kv_bytes, left, block_size, max_batch_size, on_cpu, reasons)
    max_context = _max_context(config, model, pool_tokens, kv_bytes, reasons)
    return ResolvedConfig(
        device=backend.device,
        kernels=backend.kernels,
        dtype=backend.dtype,
        kv_dtype=backend.kv_dtype,
        unpack=backend.unpack,
        threads=backend.threads,
        max_context=max_context,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_tokens,
        max_logit_rows=max_logit_rows,
        max_waiting=config.max_waiting,
        block_size=block_size,
        num_blocks=pool_tokens // block_size,
        prefix_cache=config.prefix_cache,
        speculation=_speculation(config, backend, reasons),
        reasons=tuple(reasons),
    )


def _speculation(config: EngineConfig, backend: Backend, reasons: list[str]) -> bool:
    """Whether there are drafts: where kernels give a token the same bits whatever is computed with it."""
    if config.speculation == "off":
        return False
    if backend.kernels != "native" or backend.device != "cpu":
        reasons.append("speculation off: these kernels round differently when they compute several tokens at once")
        return False
    reasons.append("speculation by prompt lookup: text that repeats is computed several tokens at a time")
    return True


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
    share = left * (_POOL_SHARE if on_cpu else 0.9)
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
