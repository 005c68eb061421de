"""Plots into files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError


@contextlib.contextmanager
def figure_file(path: Path, num_axes: int = 1, width: float = 8.0) -> Iterator[list[Any]]:
    """Matplotlib axes, side by side with one y axis, which are drawn into the file at the end. `width`: inches.
    ConfigError where matplotlib is missing, doesn't know the format, or can't write."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    yield list(figure.subplots(1, num_axes, sharey=True, squeeze=False)[0])
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't draw {path}: {error}") from None
