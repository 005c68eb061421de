"""How long a step takes: the time to read its bytes and to compute its products, at the rates that were measured.

    seconds = weights / bandwidth / w + KV / bandwidth / v + a · operations / rate + layers · l

w, v   the parts of the data sheet's bandwidth at which weights and KV cache are read
a      how much of the arithmetic is not hidden behind the reading, over the part of its rate that is reached
l      seconds of each layer that depend on nothing: norms, waits between kernels

`benchmarks/plan_fit.py` fits the four to the records in benchmarks/results; a test compares.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    weights: float  # of the bandwidth
    kv: float  # of the bandwidth
    arithmetic: float  # seconds per second that the operations take at their rate
    layer_seconds: float
    exchange_seconds: float = 0.0  # of each layer, where several GPUs compute it together


#: Of an H200, bfloat16, W1, W5 and W6 in benchmarks/results.
GPU = Efficiency(weights=0.886, kv=0.916, arithmetic=1.019, layer_seconds=20e-6, exchange_seconds=8.1e-6)
#: Rough: SmolLM2 on two cores beside what `turbolm bench kernels` measures of them.
CPU = Efficiency(weights=0.9, kv=0.5, arithmetic=1.3, layer_seconds=20e-6)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does at most, and how much of it turbolm reaches."""

    bandwidth: float  # bytes per second
    operations: float  # per second
    efficiency: Efficiency


@dataclass(frozen=True, slots=True)
class StepCost:
    """What decoding takes, on each GPU."""

    weight_bytes: int  # that every step reads
    kv_bytes_per_token: int
    parameters: int  # that every token multiplies
    num_layers: int
    is_shared: bool  # several GPUs compute each layer together


def tokens_per_second(rates: Rates, cost: StepCost, streams: int, context: int) -> float:
    """Of `streams` answers together, each with so many tokens in context."""
    return streams / step_seconds(rates, cost, streams, context)


def step_seconds(rates: Rates, cost: StepCost, streams: int, context: int) -> float:
    """One token for each of `streams` answers."""
    part = rates.efficiency
    read = cost.weight_bytes / part.weights + streams * context * cost.kv_bytes_per_token / part.kv
    operations = 2 * streams * cost.parameters
    per_layer = part.layer_seconds + (part.exchange_seconds if cost.is_shared else 0)
    return read / rates.bandwidth + part.arithmetic * operations / rates.operations + cost.num_layers * per_layer
