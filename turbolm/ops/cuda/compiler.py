"""CUDA C++ to machine code with NVRTC, once per GPU architecture: results are kept in the cache folder."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from turbolm import env
from turbolm.errors import EngineError

try:
    from cuda.bindings import nvrtc  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    nvrtc = None  # `cuda_kernels_error` says so

KERNELS = Path(__file__).parent / "kernels"
_MIN_CAPABILITY = (8, 0)  # mma of bfloat16, cp.async
_DIGEST_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def cuda_kernels_error() -> str | None:
    """Why kernels can't be compiled and run on the current GPU; None: they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    return _error_for(torch.cuda.get_device_capability())


@functools.lru_cache
def _error_for(capability: tuple[int, int]) -> str | None:
    if capability < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; they need 8.0 or later"
    error = compiler_error()
    if error is None and capability not in supported_capabilities():
        return f"NVRTC {compiler_version()} is too old for compute capability {capability[0]}.{capability[1]}"
    return error


@functools.lru_cache
def compiler_error() -> str | None:
    """Why NVRTC can't be used; None: it can. Needs no GPU."""
    if nvrtc is None:
        return "the package cuda-bindings is not installed"
    try:
        compiler_version()
    except (RuntimeError, OSError) as error:  # what its loader raises where there is no library
        return f"NVRTC can't be loaded: {error}"
    return None


@functools.lru_cache
def compiler_version() -> str:
    """As "13.0"."""
    status, major, minor = nvrtc.nvrtcVersion()
    _check(status, "nvrtcVersion")
    return f"{major}.{minor}"


@functools.lru_cache
def supported_capabilities() -> frozenset[tuple[int, int]]:
    """The compute capabilities that this NVRTC compiles for."""
    status, numbers = nvrtc.nvrtcGetSupportedArchs()
    _check(status, "nvrtcGetSupportedArchs")
    return frozenset(divmod(number, 10) for number in numbers)


def compile_cubin(source: Path, defines: Mapping[str, int], architecture: str) -> bytes:
    """The machine code of a source file, which may include the headers (.cuh) beside it.

    defines: macros of the compiler's command line. architecture: such as "sm_90".
    EngineError with the compiler's log if it refuses the source.
    """
    text = source.read_bytes()
    options = ["--std=c++17", f"--gpu-architecture={architecture}"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    headers = {path.name: path.read_bytes() for path in sorted(source.parent.glob("*.cuh"))}
    key = hashlib.sha256("\0".join([compiler_version(), *options]).encode())
    for part in (text, *headers.values()):
        key.update(b"\0" + part)
    path = env.cache_folder() / "kernels" / f"{source.stem}-{architecture}-{key.hexdigest()[:32]}.cubin"
    cubin = _read(path)
    if cubin is None:
        cubin = _compile(source.name, text, headers, options)
        _write(path, cubin)
    return cubin


def _compile(name: str, text: bytes, headers: dict[str, bytes], options: list[str]) -> bytes:
    status, program = nvrtc.nvrtcCreateProgram(
        text, name.encode(), len(headers), list(headers.values()), [header.encode() for header in headers]
    )
    _check(status, "nvrtcCreateProgram")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EngineError(f"{name} doesn't compile with {' '.join(options)}:\n{_log_of(program)}")
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(status, "nvrtcGetCUBINSize")
        cubin = bytes(size)
        _check(nvrtc.nvrtcGetCUBIN(program, cubin)[0], "nvrtcGetCUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log_of(program: object) -> str:
    status, size = nvrtc.nvrtcGetProgramLogSize(program)
    _check(status, "nvrtcGetProgramLogSize")
    text = bytes(size)
    _check(nvrtc.nvrtcGetProgramLog(program, text)[0], "nvrtcGetProgramLog")
    return text.rstrip(b"\0").decode(errors="replace")


def _check(status: object, call: str) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"{call} failed: {status}")


def _read(path: Path) -> bytes | None:
    """A cache entry: its digest, then the machine code; None where there is none, or it is damaged."""
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    cubin = entry[_DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == entry[:_DIGEST_BYTES] else None


def _write(path: Path, cubin: bytes) -> None:
    """Whole or not at all: another process may be writing, or reading, the same entry."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(cubin).digest() + cubin)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.warning("compiled kernels are not kept: %s", error)
