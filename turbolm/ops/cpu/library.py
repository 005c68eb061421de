"""The shared library of native CPU kernels (csrc/), and teams of threads that run them."""

from __future__ import annotations

import ctypes
import functools
import logging
import weakref
from pathlib import Path

from turbolm import env
from turbolm.errors import ConfigError, EngineError, nearest
from turbolm.ops.cpu import instructions

log = logging.getLogger(__name__)

ISA_NAMES = ("generic", "neon", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx")
_PATH = Path(__file__).parent / "_native.so"


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """(the library, or None and why there is none)."""
    wanted = env.get("TURBOLM_ISA")
    if wanted is not None and wanted not in ISA_NAMES:
        raise ConfigError(
            f"TURBOLM_ISA is {wanted!r}; allowed: {', '.join(ISA_NAMES)}.{nearest(wanted, ISA_NAMES)} "
            "Unset it for the best one."
        )
    if not _PATH.exists():
        return None, "they were not built: install turbolm where a C++20 compiler is at hand"
    try:
        dll = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return None, f"{_PATH.name} can't be loaded ({error})"
    _declare(dll)
    for kind in instructions.KINDS:
        if dll.turbolm_struct_size(kind.opcode) != ctypes.sizeof(kind):
            return None, f"{_PATH.name} belongs to another version of turbolm: install turbolm again"
    used = dll.turbolm_isa_name().decode()
    if wanted is not None and wanted != used:
        log.warning("TURBOLM_ISA is %s, which is not available here: the kernels use %s", wanted, used)
    return dll, ""


def _declare(dll: ctypes.CDLL) -> None:
    pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        ("turbolm_isa_name", ctypes.c_char_p, []),
        ("turbolm_isa_select", int32, [ctypes.c_char_p]),
        ("turbolm_struct_size", int64, [int32]),
        ("turbolm_team_new", pointer, [int32]),
        ("turbolm_team_free", None, [pointer]),
        ("turbolm_run", None, [pointer, pointer, int64, pointer]),
        ("turbolm_attention_workspace", int64, [ctypes.POINTER(instructions.HeadShape), int64, int32]),
        ("turbolm_argmax", None, [pointer, pointer, int64, int64, pointer]),
        ("turbolm_sample", None, [pointer, pointer, int64, int64, *[pointer] * 6]),
    ):
        function = getattr(dll, name)
        function.restype = result
        function.argtypes = arguments


def load() -> ctypes.CDLL | None:
    """The library; None, with one warning in the log, where there is none. Raises ConfigError for a
    bad TURBOLM_ISA."""
    dll, reason = _open()
    if dll is None:
        _warn(reason)
    return dll


@functools.cache
def _warn(reason: str) -> None:
    log.warning("no native CPU kernels: %s. Models run on plain PyTorch: several times slower.", reason)


def library() -> ctypes.CDLL:
    """The library; raises EngineError where there is none."""
    dll, reason = _open()
    if dll is None:
        raise EngineError(f"no native CPU kernels: {reason}")
    return dll


def failure() -> str | None:
    """Why there is no library; None where there is one."""
    dll, reason = _open()
    return None if dll is not None else reason


def isa() -> str | None:
    """The instruction set that the kernels use here, one of TURBOLM_ISA's; None without a library."""
    dll, _ = _open()
    if dll is None:
        return None
    name: bytes = dll.turbolm_isa_name()
    return name.decode()


def select_isa(name: str) -> bool:
    """Use a lesser instruction set in this process; "" is the best one. False: not available here.
    For tests and benchmarks, while no kernel runs."""
    return bool(library().turbolm_isa_select(name.encode()) == 0)


class Team:
    """Threads that run kernels together. They start at the first use and sleep when idle; a forked
    child gets its own. Freed with the object."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ConfigError(f"threads must be 1 or more, got {num_threads}")
        dll = library()
        self.num_threads = num_threads
        self.handle: int = dll.turbolm_team_new(num_threads)
        # At the interpreter's end a thread of the engine may still be computing: the system ends all.
        weakref.finalize(self, dll.turbolm_team_free, self.handle).atexit = False
