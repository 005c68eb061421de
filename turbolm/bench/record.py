"""A run's figures as JSON, with the machine that they were measured on."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm import __version__
from turbolm.errors import ConfigError
from turbolm.ops.hardware import probe


def machine() -> dict[str, Any]:
    """What the figures were measured on, and when."""
    hardware = probe()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": hardware.cpu,
        "cores": hardware.physical_cores,
        "isa": list(hardware.isa),
        "native": hardware.native,
        "memory": hardware.total_memory,
        "python": platform.python_version(),
        "turbolm": __version__,
    }


def check_writable(path: Path | None) -> None:
    """ConfigError for a file that can't be written, before minutes of measuring are spent on it."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"can't be written: there is no folder {path.parent}"
        raise ConfigError(f"{path} {problem}; give the path of a file")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Whole or not at all: a run that is cut off keeps the last complete record."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}; give another file") from None
