"""Every environment variable that turbolm reads. For debugging and for caches, never for features."""

from __future__ import annotations

import os
from pathlib import Path

#: name → what it does; `turbolm doctor` prints this table.
VARIABLES = {
    "TURBOLM_CACHE": "folder for downloaded models and repacked weights (default ~/.cache/turbolm)",
    "TURBOLM_LOG": "log level: debug, info, warning, error (default warning)",
    "TURBOLM_ISA": "native CPU kernels of a set: generic, neon, avx2, avxvnni, avx512, avx512vnni, avx512bf16, amx",
    "TURBOLM_DECODE": "attention of decodes on a GPU: triton, or cuda without the check of its results (default: with)",
}


def get(name: str) -> str | None:
    """The value of a listed variable, None where it is unset or empty."""
    assert name in VARIABLES, f"{name} is missing from env.VARIABLES"
    return os.environ.get(name) or None


def cache_folder() -> Path:
    """Where downloaded and derived model files live; it need not exist yet."""
    given = get("TURBOLM_CACHE")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "turbolm"
