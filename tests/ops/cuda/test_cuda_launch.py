from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from turbolm.errors import EngineError
from turbolm.ops.cuda import launch, linear, single, wide
from turbolm.ops.cuda.int4 import Int4Matrix
from turbolm.ops.cuda.plan import INT4, Gpu

X, W = torch.ones(3, 256, dtype=torch.bfloat16), torch.ones(96, 256, dtype=torch.bfloat16)


class Driver:
    """Notes what it is asked to launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[launch._Config, ctypes.Structure]] = []
        self.arguments: type[ctypes.Structure] = linear.Arguments
        self.status = 0

    def cuLaunchKernelEx(self, config, function, parameters, _extra) -> int:  # noqa: N802
        assert function.value == 77
        given = self.arguments.from_address(parameters[0])
        copies = (
            launch._Config.from_buffer_copy(config._obj),
            self.arguments.from_buffer_copy(given),
        )
        self.launches.append(copies)
        return self.status

    def cuGetErrorName(self, _status, name) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_LAUNCH_FAILED"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: fake)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 1234, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(linear, "gpu_of", lambda _: Gpu(4, 232_448, 233_472))
    monkeypatch.setattr(linear, "_kernel", lambda *_: SimpleNamespace(function=ctypes.c_void_p(77)))
    linear._launch.cache_clear()
    yield fake
    linear._launch.cache_clear()


def test_structures_have_the_sizes_of_the_driver() -> None:
    config = launch._Config
    assert (ctypes.sizeof(config), config.stream.offset, config.num_attributes.offset) == (56, 32, 48)
    assert (ctypes.sizeof(launch._Attribute), launch._Attribute.value.offset) == (72, 8)


def test_parts_are_launched_with_the_tensors_given(driver: Driver) -> None:
    bias = torch.zeros(96, dtype=torch.bfloat16)
    first, second = linear.linear_parts(X, W, bias), linear.linear_parts(X[:2], W)
    assert first.shape[-2:] == (3, 96) and second.shape[-2:] == (2, 96)
    (config, arguments), (_, again) = driver.launches
    assert (arguments.x, arguments.w, arguments.bias) == (X.data_ptr(), W.data_ptr(), bias.data_ptr())
    assert (arguments.out, arguments.t, arguments.n, arguments.k) == (first.data_ptr(), 3, 96, 256)
    assert (again.out, again.t, again.bias) == (second.data_ptr(), 2, None)
    splits = first.shape[0] if first.dim() == 3 else 1
    assert config.grid[0] * config.grid[1] <= 4 and config.grid[1] == splits
    assert first.dtype == (torch.float32 if splits > 1 else torch.bfloat16)
    assert config.stream == 1234 and config.num_attributes == 1
    attribute = config.attributes[0]
    assert (attribute.id, attribute.value) == (6, 1)


def test_gated_and_logits(driver: Driver) -> None:
    gated, logits = linear.linear_gated(X, W, "gelu"), linear.linear_logits(X, W)
    assert gated.shape == (3, 48) and gated.dtype == torch.bfloat16
    assert logits.shape == (3, 96) and logits.dtype == torch.float32
    given = torch.empty(3, 96)
    assert linear.linear_logits(X, W, given) is given
    assert driver.launches[2][1].out == given.data_ptr()


def test_rows_that_lie_apart_are_taken_as_they_are(driver: Driver) -> None:
    wide = torch.ones(3, 512, dtype=torch.bfloat16)
    linear.linear_logits(wide[:, 256:], W)
    linear.linear_logits(wide[:, 1:257], W)  # not aligned: copied
    (_, apart), (_, copied) = driver.launches
    assert (apart.x, apart.x_stride) == (wide.data_ptr() + 512, 512)
    assert copied.x_stride == 256


def test_a_failed_launch_is_an_error(driver: Driver) -> None:
    driver.status = 719
    with pytest.raises(EngineError, match=r"launch failed: CUDA_ERROR_LAUNCH_FAILED \(719\)"):
        linear.linear_logits(X, W)


def test_shapes_without_a_kernel_are_refused(driver: Driver) -> None:
    with pytest.raises(EngineError, match=r"no kernel for x \[65, 256\]"):
        linear.linear_logits(torch.ones(65, 256, dtype=torch.bfloat16), W)
    assert not driver.launches


def test_nothing_is_supported_without_a_gpu() -> None:
    if not torch.cuda.is_available():
        linear.supports.cache_clear()
        assert not linear.supports(1, 96, 256, torch.bfloat16)


def test_one_row_by_4_bits(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Int4Matrix(torch.zeros(6, 2, INT4[64].num_bytes, dtype=torch.uint8), 64)
    monkeypatch.setattr(single, "gpu_of", lambda _: Gpu(4, 232_448, 233_472))
    monkeypatch.setattr(single, "_kernel", lambda *_: SimpleNamespace(function=ctypes.c_void_p(77)))
    monkeypatch.setattr(driver, "arguments", single.Arguments)
    x = torch.ones(1, 256, dtype=torch.bfloat16)
    parts, gated = single.single_parts(x, matrix, None), single.single_gated(x, matrix, "silu")
    for (config, given), out in zip(driver.launches, (parts, gated), strict=True):
        assert (given.x, given.w, given.out) == (x.data_ptr(), matrix.units.data_ptr(), out.data_ptr())
        assert (given.n, given.k, given.code_mask) == (96, 256, 0x000F000F)
        assert config.grid[0] * config.grid[1] <= 4
    assert parts.shape[-2:] == (1, 96) and gated.shape == (1, 48)
    single._launch.cache_clear()


def test_4_bits_go_to_the_kernel_for_as_many_rows(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    units = torch.zeros(6, 2, INT4[64].num_bytes, dtype=torch.uint8)
    matrix = Int4Matrix(units, 64)
    gated = linear.linear_gated(X, matrix, "silu")
    assert gated.shape == (3, 48)
    (_, few), (sums, flags) = driver.launches[0], (torch.zeros(1), torch.zeros(4, dtype=torch.int32))
    assert (few.w, few.n, few.k, few.code_mask) == (units.data_ptr(), 96, 256, 0x000F000F)
    monkeypatch.setattr(wide, "scratch", lambda _: (sums, flags))
    monkeypatch.setattr(wide, "gpu_of", lambda _: Gpu(4, 232_448, 233_472))
    monkeypatch.setattr(wide, "_kernel", lambda *_: SimpleNamespace(function=ctypes.c_void_p(77)))
    monkeypatch.setattr(driver, "arguments", wide.Arguments)
    x, out = torch.ones(70, 512, dtype=torch.bfloat16)[:, 256:], torch.empty(70, 96)
    wide.wide_linear(x, matrix, None, out)
    config, many = driver.launches[1]
    assert (many.x, many.w, many.out) == (x.data_ptr(), units.data_ptr(), out.data_ptr())
    assert (many.x_stride, many.t, many.n, many.k, many.token_tiles) == (512, 70, 96, 256, 1)
    assert (many.partials, many.flags) == (sums.data_ptr(), flags.data_ptr())
    assert config.grid[0] <= 4 and config.block[0] in (256, 512)
    wide._launch.cache_clear()
