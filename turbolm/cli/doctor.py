"""`turbolm doctor`: the machine, the software, and what turbolm makes of them. Plain lines, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.backends import cudnn

from turbolm import __version__, env, hub
from turbolm.config import EngineConfig, choose_backend, format_size
from turbolm.errors import TurbolmError
from turbolm.ops import hardware

_PACKAGES = (
    *("torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece", "jinja2", "huggingface-hub"),
    *("modelscope", "cyclopts", "rich", "prompt-toolkit", "psutil", "transformers"),
)
Section = tuple[str, list[tuple[str, str]]]


def doctor() -> None:
    """Show what this machine has, and what turbolm makes of it."""
    for title, rows in (_system(), _software(), _packages(), _storage(), _variables(), _choices()):
        sys.stdout.write(f"{title}\n")
        for name, value in rows:
            sys.stdout.write(f"  {name:<18}{value}\n" if name else f"  {value}\n")
        sys.stdout.write("\n")


def _system() -> Section:
    found = hardware.probe()
    rows = [
        ("system", _distribution()),
        ("kernel", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("CPU", f"{found.cpu}, {found.physical_cores} cores for this process"),
        ("CPU features", " ".join(found.isa) or "none known"),
        ("memory", f"{format_size(found.free_memory)} free of {format_size(found.total_memory)}"),
    ]
    for index, gpu in enumerate(found.gpus):
        memory = f"{format_size(gpu.free_memory)} free of {format_size(gpu.total_memory)}"
        rows.append((f"GPU {index}", f"{gpu.name}, {memory}, compute capability {'.'.join(map(str, gpu.capability))}"))
    if not found.gpus:
        rows.append(("GPUs", "none that torch can use"))
    rows.append(("GPU driver", _driver()))
    return "Machine", rows


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return platform.system()


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return "none"


def _software() -> Section:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return "Software", [
        ("turbolm", f"{__version__}, {Path(__file__).parents[1]}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"),
        ("cuDNN", str(cudnn.version() or "none")),  # type: ignore[no-untyped-call]
        ("C++ compiler", _tool("c++") or _tool("g++") or _tool("clang++") or "none"),
        ("CUDA compiler", _tool("nvcc") or "none"),
    ]


def _tool(name: str) -> str:
    """The line of `name --version` that tells the version; empty if there is no such program."""
    path = shutil.which(name)
    if not path:
        return ""
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line.strip() for line in lines if "release" in line), lines[0].strip() if lines else "")


def _packages() -> Section:
    return "Packages", [(name, _version(name)) for name in _PACKAGES]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _storage() -> Section:
    folder = env.cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    writable = "" if os.access(existing, os.W_OK) else " (not writable)"
    models = hub.cached_models()
    return "Storage", [
        ("cache folder", f"{folder}{writable}"),
        ("disk", f"{format_size(usage.free)} free of {format_size(usage.total)}"),
        ("models", f"{len(models)}, {format_size(sum(model.num_bytes for model in models))}"),
    ]


def _variables() -> Section:
    return "Environment variables", [
        (name, f"{env.get(name) or 'not set'}: {about}") for name, about in env.VARIABLES.items()
    ]


def _choices() -> Section:
    found = hardware.probe()
    try:
        backend = choose_backend(EngineConfig(), found)
    except TurbolmError as error:
        return "turbolm here", [("", str(error))]
    return "turbolm here", [
        ("device", backend.device),
        ("kernels", backend.kernels),
        ("native kernels", found.native or f"none: {found.native_error or 'not built'}"),
        ("dtype", f"{backend.dtype}, KV cache {backend.kv_dtype}"),
        ("threads", str(backend.threads)),
        *(("because", reason) for reason in backend.reasons),
    ]
