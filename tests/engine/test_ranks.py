"""What ranks tell each other arrives as it was sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.config import EngineConfig, Gpu, Hardware, ResolvedConfig, resolve
from turbolm.engine.adjustments import HostAdjustments
from turbolm.engine.batch import StepArrays, lay_out
from turbolm.engine.ranks import LoadOrder, StepOrder
from turbolm.engine.step import ScheduledSequence, Step
from turbolm.engine.step_device import Draws
from turbolm.errors import ConfigError
from turbolm.kv import KvShape
from turbolm.memory import ModelNeeds
from turbolm.ops.adjustments import FLOATS
from turbolm.types import Request, Sequence


def arrays_of(chunks: list[tuple[int, int]], block_size: int, wanted: bool) -> StepArrays:
    """A step of (start, number of tokens) for each sequence."""
    items = []
    for number, (start, count) in enumerate(chunks):
        sequence = Sequence(Request(str(number), tuple(range(1, start + count + 1))))
        sequence.blocks = [7 * number + i for i in range(-(-(start + count) // block_size))]
        items.append(ScheduledSequence(sequence, start, count, wanted))
    rows = [[count - 1] if wanted else [] for _, count in chunks]
    return lay_out(Step(tuple(items), sum(count for _, count in chunks)), block_size, rows)


def changes(rng: np.random.Generator, num_rows: int, num_drafts: int) -> HostAdjustments:
    """Of so many rows."""
    sizes = dict.fromkeys(HostAdjustments._fields, 3) | dict.fromkeys(("repetition", "presence", "frequency"), num_rows)
    arrays = {
        name: rng.integers(-9, 99, size).astype(np.float32 if name in FLOATS else np.int32)
        for name, size in sizes.items()
    }
    drafts = rng.integers(-1, 99, (num_rows, num_drafts)).astype(np.int32)
    return HostAdjustments(**(arrays | {"slots": arrays["slots"][:0], "drafts": drafts, "cleared": [5, 2]}))


def is_same(sent: object, found: object) -> bool:
    """With the types and shapes of arrays."""
    if isinstance(sent, np.ndarray):
        return isinstance(found, np.ndarray) and sent.dtype == found.dtype and np.array_equal(sent, found)
    if isinstance(sent, tuple | list):
        return type(sent) is type(found) and len(sent) == len(found) and all(map(is_same, sent, found))
    return sent == found


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=9),
    st.sampled_from([8, 16]), st.data(),
)  # fmt: skip
def test_a_step_arrives_as_sent(chunks: list[tuple[int, int]], block_size: int, data: st.DataObject) -> None:
    wanted, has_filters, gathers, shares_context, has_adapters = (data.draw(st.booleans()) for _ in range(5))
    arrays = arrays_of(chunks, block_size, wanted)._replace(shares_context=shares_context)
    count, rng = len(chunks), np.random.default_rng(len(chunks))
    if has_adapters:
        arrays = arrays._replace(adapters=rng.integers(-1, 3, len(arrays.token_ids)).astype(np.int32))
    columns = [rng.random(count), *(rng.random(count).astype(np.float32) for _ in range(3))]
    draws = Draws(*columns, rng.integers(0, 99, count).astype(np.int32), has_filters)
    pools = data.draw(st.none() | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=3))
    adjustments = data.draw(st.none() | st.builds(changes, st.just(rng), st.just(count), st.integers(0, 2)))
    sent = StepOrder(arrays, draws if data.draw(st.booleans()) else None, gathers, pools, adjustments)
    body = b"".join(sent.encode())
    assert is_same(sent, StepOrder.decode(memoryview(body)))


def resolved(**options: object) -> ResolvedConfig:
    needs = ModelNeeds("m", 512, 1 << 20, 1 << 18, (KvShape(2, 64, 64),) * 3, 1000)
    return resolve(EngineConfig.of(None, **options), needs, Hardware("", "x86_64", 4, (), 8 << 30, 8 << 30))


def test_the_order_to_load_arrives_as_sent() -> None:
    config = resolved(
        tensor_parallel=2, device="cpu", kernels="reference", kv="int8:k,float16:v", kv_skip_layers="0,-1"
    )
    order = LoadOrder(Path("/models/a b"), config, 987, Path("/tmp/store"))
    assert LoadOrder.decode(order.encode()) == order


def test_native_cpu_kernels_have_no_parts() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel is 2, but the CPU's native kernels"):
        resolve(
            EngineConfig(tensor_parallel=2, device="cpu", kernels="native"),
            ModelNeeds("m", 512, 1 << 20, 1 << 18, (KvShape(2, 64, 64),), 1000),
            Hardware("", "x86_64", 4, (), 8 << 30, 8 << 30, native="avx2"),
        )


def test_every_part_needs_a_gpu_and_fits_the_fullest_one() -> None:
    gpus = tuple(Gpu("H200", 140 << 30, free << 30, (9, 0)) for free in (130, 90, 20))
    needs = ModelNeeds("m", 4096, 8 << 30, 4 << 30, (KvShape(4, 128, 128),) * 32, 5 * 64512)
    with pytest.raises(ConfigError, match=r"tensor_parallel is 4, and 3 GPUs were found"):
        resolve(EngineConfig(tensor_parallel=4), needs, Hardware("", "x86_64", 4, (), 1 << 40, 1 << 40, gpus))
    pools = [
        resolve(EngineConfig(tensor_parallel=size), needs, Hardware("", "x86_64", 4, (), 1 << 40, 1 << 40, gpus))
        for size in (1, 2, 3)
    ]
    bytes_of = [config.pool_tokens * config.kv_bytes_per_token for config in pools]
    assert bytes_of[0] > bytes_of[1] > bytes_of[2] and bytes_of[2] < 20 << 30
    assert [config.tensor_parallel for config in pools] == [1, 2, 3]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_parts_are_counted_in_whole_numbers(value: object) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel must be a whole number, 1 or more"):
        EngineConfig.of(None, tensor_parallel=value)
