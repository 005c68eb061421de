"""Loading machine code and launching it on PyTorch's current stream, at about a microsecond a launch.

Through the driver's C interface: what a launch needs is laid out once, and only pointers are filled in.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from turbolm.errors import EngineError

_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
_PREFERRED_SHARED_MEMORY_CARVEOUT = 9
_SHARED_MEMORY_PER_MULTIPROCESSOR = 81  # CUdevice_attribute
_SHARED_MEMORY_PER_BLOCK_OPTIN = 97


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.lru_cache
def _driver() -> ctypes.PyDLL:
    # PyDLL: the calls are too short to be worth letting go of the interpreter's lock.
    return ctypes.PyDLL("libcuda.so.1")


def _check(status: int, call: str) -> None:
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise EngineError(f"{call} failed: {(name.value or b'unknown').decode()} ({status})")


def _device(index: int) -> ctypes.c_int:
    device = ctypes.c_int()
    _check(_driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    return device


def shared_memory(device_index: int) -> tuple[int, int]:
    """Bytes that (one CTA, all CTAs of an SM) can have."""
    values = []
    for attribute in (_SHARED_MEMORY_PER_BLOCK_OPTIN, _SHARED_MEMORY_PER_MULTIPROCESSOR):
        value = ctypes.c_int()
        status = _driver().cuDeviceGetAttribute(ctypes.byref(value), attribute, _device(device_index))
        _check(status, "cuDeviceGetAttribute")
        values.append(value.value)
    return values[0], values[1]


class Kernel:
    """A kernel of a cubin on one device. Load before a CUDA graph is captured: loading may allocate."""

    def __init__(self, cubin: bytes, name: str, device_index: int, max_shared_bytes: int) -> None:
        driver, device = _driver(), _device(device_index)
        library, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device_index):
            torch.cuda.current_stream().query()  # makes PyTorch's context current on this thread
            _check(driver.cuLibraryLoadData(ctypes.byref(library), cubin, None, None, 0, None, None, 0), "loading")
            _check(driver.cuLibraryGetKernel(ctypes.byref(self.function), library, name.encode()), f"finding {name}")
            # Kernels share an SM, and so overlap, only where they agree on how its memory is divided.
            for attribute, value in (
                (_MAX_DYNAMIC_SHARED_SIZE_BYTES, max_shared_bytes),
                (_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
            ):
                _check(driver.cuKernelSetAttribute(attribute, value, self.function, device), "setting attributes")
            loaded = ctypes.c_void_p()  # loads what the driver would otherwise load at the first launch
            _check(driver.cuKernelGetFunction(ctypes.byref(loaded), self.function), "loading the kernel")


class Launch:
    """A kernel with its grid and an argument structure, whose fields may be set between launches.

    overlap: the kernel may start while the one before it still runs (programmatic dependent launch; it
    must wait before it touches what that one reads or writes). For one thread at a time.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        num_threads: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
        *,
        overlap: bool,
    ) -> None:
        self.arguments = arguments
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._config = _Config(
            (*grid, 1), (num_threads, 1, 1), shared_bytes, None, ctypes.pointer(self._attribute), int(overlap)
        )
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        self._kernel = kernel
        self._call = _driver().cuLaunchKernelEx
        self._fixed = (ctypes.byref(self._config), kernel.function, self._parameters, None)

    def __call__(self, device_index: int) -> None:
        """On the device's current stream; PyTorch's context must be current, as after any tensor's making."""
        self._config.stream = torch._C._cuda_getCurrentRawStream(device_index)
        status = self._call(*self._fixed)
        if status:
            _check(status, "launch")
