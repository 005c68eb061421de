"""What this machine offers to this process: cores, CPU features, memory, GPUs, within its container's limits."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

from turbolm.config import Gpu, Hardware
from turbolm.ops.cpu import library

#: CPU features that kernels care about, as Linux spells them.
ISA_FLAGS = (
    *("avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" as a number near 2**63


def probe(root: Path = Path("/")) -> Hardware:
    """Reads /proc and /sys below `root`, and asks CUDA. What can't be read counts as unlimited."""
    cpuinfo = _cpuinfo(root)
    total, free = _memory(root)
    gpus = _gpus()
    return Hardware(
        cpu=_cpu_name(cpuinfo),
        architecture=platform.machine(),
        physical_cores=_physical_cores(root),
        isa=tuple(flag for flag in ISA_FLAGS if flag in (cpuinfo.get("flags") or cpuinfo.get("Features", "")).split()),
        total_memory=total,
        free_memory=free,
        gpus=gpus,
        native=library.isa(),
        native_error=library.failure(),
        gpu_native_error=_gpu_native_error(gpus),
    )


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(Gpu(name, total, free, torch.cuda.get_device_capability(index)))
    return tuple(gpus)


def _gpu_native_error(gpus: tuple[Gpu, ...]) -> str | None:
    """Why turbolm's GPU kernels can't run here; None: they can, or there is no GPU."""
    if not gpus:
        return None
    if gpus[0].capability < (8, 0):
        major, minor = gpus[0].capability
        return f"{gpus[0].name} has compute capability {major}.{minor}; they need 8.0 or later"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo."""
    entries: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    return entries


def _cpu_name(cpuinfo: dict[str, str]) -> str:
    if "model name" in cpuinfo:
        return cpuinfo["model name"]
    if "CPU part" in cpuinfo:  # ARM names its designs by number
        return f"ARM implementer {cpuinfo.get('CPU implementer', '?')} part {cpuinfo['CPU part']}"
    return platform.processor() or platform.machine()


def _physical_cores(root: Path) -> int:
    """Cores behind the CPUs that affinity allows (hyperthreads count once), within the cgroup's quota."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core, package = _read(topology / "core_id").strip(), _read(topology / "physical_package_id").strip()
        cores.add((package, core) if core else cpu)
    quota = min((limit for folder in _cgroups(root, "cpu") if (limit := _quota(folder))), default=float(len(cores)))
    return max(1, min(len(cores), int(quota + 1e-6)))


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time that a cgroup may use."""
    words = _read(folder / "cpu.max").split()  # v2: "200000 100000" or "max 100000"
    if not words:
        words = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]  # v1: -1 is unlimited
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        return int(words[0]) / int(words[1])
    return None


def _memory(root: Path) -> tuple[int, int]:
    """(total, free) bytes: the machine's, or what the tightest cgroup leaves of them."""
    meminfo: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            meminfo[words[0].rstrip(":")] = int(words[1]) * 1024
    total = meminfo.get("MemTotal", 0)
    free = meminfo.get("MemAvailable", meminfo.get("MemFree", 0))
    for folder in _cgroups(root, "memory"):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
        total = min(total, limit) if total else limit
        free = min(free, max(0, limit - used + _reclaimable(folder)))
    return total, free


def _number(folder: Path, *names: str) -> int | None:
    for name in names:
        text = _read(folder / name).strip()
        if text.isdigit():
            return int(text)
    return None


def _reclaimable(folder: Path) -> int:
    """Page cache that the kernel drops when memory is asked for: counted as used, yet free."""
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.strip().isdigit():
            return int(value)
    return 0


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The process's cgroup of a controller and its ancestors: each may hold a limit. Inside a container the
    path of /proc/self/cgroup is often the host's, then only the mount's top is there."""
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controllers, base / controller]
        else:
            continue
        for mount in mounts:
            group = mount / path.lstrip("/")
            folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
