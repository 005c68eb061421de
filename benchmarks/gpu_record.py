"""What the GPU benchmarks share: the machine, engine options on the command line, plain tables, records."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from turbolm.bench.record import machine, write_record
from turbolm.errors import TurbolmError


def gpu_machine() -> dict[str, Any]:
    """What the figures were measured on: the CPU's side, the GPU, and the versions that matter on it."""
    found = machine() | {"torch": torch.__version__, "triton": _version("triton"), "gpus": []}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory": properties.total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cuda_bindings": _version("cuda-bindings"),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.split("\n")[0].strip() or None


def device_name(found: dict[str, Any]) -> str:
    """A name for titles: the GPU's, or the CPU's where there is none."""
    name: str = found["gpus"][0] if found["gpus"] else found["cpu"]
    return name


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="any field of EngineConfig"
    )


def engine_options(options: argparse.Namespace, **defaults: object) -> dict[str, object]:
    """`defaults`, the device, and what `-o` gave (numbers, true and false are read as such)."""
    found: dict[str, object] = {**defaults, "device": options.device}
    for text in options.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"-o takes NAME=VALUE, got {text!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


class Clock:
    """What is left of a time budget."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for what is in them: the first and the last to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        middle = [text.rjust(width) for text, width in zip(line[1:-1], widths[1:-1], strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *middle, line[-1]]).rstrip()

    return "\n".join(aligned(line) for line in lines)


def number(value: float) -> str:
    """Three or four significant digits."""
    for limit, digits in ((1000, 0), (100, 1), (10, 2), (0.1, 3)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}"


def write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)


def start_record(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {"benchmark": benchmark, "machine": gpu_machine(), "flags": given}


def exit_with(error: TurbolmError) -> None:
    """Ends the script with an error's message alone."""
    sys.exit(f"{type(error).__name__}: {error}")
