"""What fits where, and how fast it is: every combination of weights, KV cache and number of GPUs on a machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from turbolm.config import BLOCK_SIZES, KV_SHARE, EngineConfig, Weights, choose_backend, resolve_kv
from turbolm.errors import ConfigError
from turbolm.kv import bytes_per_token
from turbolm.memory import ModelNeeds, WorkingMemory, step_limits, weight_bytes, working_memory
from turbolm.planner.gpus import Machine
from turbolm.planner.model import PlannedModel
from turbolm.planner.speed import StepCost, tokens_per_second

DEFAULT_CONTEXT = 4096
_FEW = 8  # sequences at once


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of a machine."""

    context: int  # tokens of prompt and answer
    concurrency: int = 0  # at once; 0: as many as fit


@dataclass(frozen=True, slots=True)
class Rung:
    weights: Weights  # as EngineConfig.weights
    kv: str  # as EngineConfig.kv


#: What costs least quality first. (fp8 takes what int8 takes.)
RUNGS = (
    Rung("auto", "auto"),
    Rung("auto", "int8"),
    Rung("int8", "auto"),
    Rung("int8", "int8"),
    Rung("int4", "auto"),
    Rung("int4", "int8"),
    Rung("auto", "int4"),
    Rung("int8", "int4"),
    Rung("int4", "int4"),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """One rung on so many GPUs. Bytes are those of each GPU."""

    rung: Rung
    tensor_parallel: int
    weight_bytes: int
    working: WorkingMemory
    free_bytes: int  # before anything is loaded
    kv_bytes_per_token: int
    block_size: int
    kv_tokens: int  # that the KV cache can hold
    max_context: int  # the longest sequence, alone; 0: nothing fits
    concurrency: int  # sequences of the demanded context at once
    is_enough: bool
    tokens_per_second: float | None  # one answer, its context half full
    tokens_per_second_full: float | None  # `concurrency` of them together

    @property
    def needed_bytes(self) -> int:
        """Without any KV cache."""
        return self.weight_bytes + self.working.total


@dataclass(frozen=True, slots=True)
class Plan:
    machine: Machine
    demand: Demand
    fits: tuple[Fit, ...]  # by number of GPUs, the mildest rung first

    @property
    def best(self) -> Fit | None:
        """The mildest rung that is enough, on the fewest GPUs on which it is. Where no concurrency is demanded, a few
        sequences are: where none has room for them, the rung with room for most is the best."""
        enough = [fit for fit in self.fits if fit.is_enough]
        most = max((fit.concurrency for fit in enough), default=0)
        wanted = self.demand.concurrency or min(_FEW, most)
        fitting = [fit for fit in enough if fit.concurrency >= wanted]
        return min(fitting, key=lambda fit: (RUNGS.index(fit.rung), fit.tensor_parallel), default=None)


def plan(model: PlannedModel, machine: Machine, demand: Demand) -> Plan:
    """ConfigError where the model can't run there at all."""
    if demand.context < 1 or demand.concurrency < 0:
        raise ConfigError(
            f"context is {demand.context} and concurrency {demand.concurrency}; give whole numbers from 1 on"
        )
    if demand.context > model.spec.max_context:
        raise ConfigError(
            f"context is {demand.context}, and '{model.name}' was made for {model.spec.max_context}; give that or less"
        )
    fits = [fit for size in _sizes(machine) for fit in _fits(model, machine, demand, size)]
    return Plan(machine, demand, tuple(fits))


def _sizes(machine: Machine) -> Sequence[int]:
    """Numbers of GPUs: powers of two, and all."""
    count = max(1, machine.num_gpus)
    return sorted({count, *(1 << n for n in range(count.bit_length()) if 1 << n <= count)})


def _fits(model: PlannedModel, machine: Machine, demand: Demand, size: int) -> Iterator[Fit]:
    try:
        needs = model.needs(size)
    except ConfigError:
        if size == 1:
            raise
        return  # so many can't divide it
    for rung in RUNGS:
        if rung.weights != "auto" and needs.packed:
            continue  # quantized already
        options = {"tensor_parallel": size, "weights": rung.weights, "kv": rung.kv}
        fit = _fit(model, needs, machine, demand, EngineConfig.of(None, **options, max_batch_size=demand.concurrency))
        if fit is not None:
            yield fit


def _fit(model: PlannedModel, needs: ModelNeeds, machine: Machine, demand: Demand, config: EngineConfig) -> Fit | None:
    """As `config.resolve` counts it. None: its heads don't go with such a KV cache."""
    hardware = machine.hardware
    backend = choose_backend(config, hardware)
    try:
        kv = bytes_per_token(needs.kv_layers, resolve_kv(config, needs.kv_layers, backend, hardware, []))
    except ConfigError:
        return None
    device, dtype = backend.device, backend.dtype
    weights = weight_bytes(needs, device, dtype, unpack=backend.unpack, rounded=config.weights)
    limits = step_limits(config.max_batch_size, config.max_batch_tokens, device)
    working = working_memory(needs, device, dtype, limits, config.tensor_parallel)
    free = min((gpu.free_memory for gpu in hardware.gpus), default=hardware.free_memory)
    block_size = BLOCK_SIZES[device]
    tokens = max(0, int((free - weights - working.total) * KV_SHARE) // (kv * block_size) * block_size)
    concurrency = min(tokens // (-(-demand.context // block_size) * block_size), limits.batch_size)
    fit = Fit(
        rung=Rung(config.weights, config.kv),
        tensor_parallel=config.tensor_parallel,
        weight_bytes=weights,
        working=working,
        free_bytes=free,
        kv_bytes_per_token=kv,
        block_size=block_size,
        kv_tokens=tokens,
        max_context=min(tokens, needs.max_context),
        concurrency=concurrency,
        is_enough=concurrency >= max(1, demand.concurrency),
        tokens_per_second=None,
        tokens_per_second_full=None,
    )
    return _with_speed(fit, model, needs, machine, demand)


def _with_speed(fit: Fit, model: PlannedModel, needs: ModelNeeds, machine: Machine, demand: Demand) -> Fit:
    if machine.rates is None or not fit.concurrency:
        return fit
    rates, half = machine.rates, demand.context // 2
    # The embedding table, where it isn't the head too, is read a row per token.
    table = 0 if model.spec.head is None else (needs.num_parameters - needs.layer_parameters) // 2
    item_bytes = 2 if machine.num_gpus else fit.weight_bytes / needs.num_parameters
    cost = StepCost(
        weight_bytes=fit.weight_bytes - int(table * item_bytes),
        kv_bytes_per_token=fit.kv_bytes_per_token,
        parameters=needs.num_parameters - table,
        num_layers=len(model.spec.layers),
        is_shared=fit.tensor_parallel > 1,
    )
    return replace(
        fit,
        tokens_per_second=tokens_per_second(rates, cost, 1, half),
        tokens_per_second_full=tokens_per_second(rates, cost, fit.concurrency, half),
    )
