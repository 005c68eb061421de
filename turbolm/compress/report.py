"""What compression did to each matrix, and what a person should know of it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_MUCH = 0.05  # a relative error that is likely to be felt
_TIMES = 8.0  # errors above so many times the median are named


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """One matrix. Errors are ‖W' x' - W x‖² / ‖W x‖² over the calibration data, x' being the input as the method
    rounds it; without data ‖W - W'‖² / ‖W‖²."""

    name: str
    plain_error: float  # of rounding to the nearest, without any method
    error: float
    num_tokens: int  # that the matrix was calibrated with
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """A finished quantization."""

    recipe: Mapping[str, Any]
    matrices: tuple[MatrixReport, ...]
    warnings: tuple[str, ...]
    seconds: float
    num_bytes: int  # of the new weights
    num_bytes_before: int
    num_samples: int
    num_tokens: int  # of the calibration data

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def by_layer(self) -> dict[str, list[MatrixReport]]:
        """The matrices of each layer ("model.layers.3")."""
        layers: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            layer = re.match(r".*?\.\d+(?=\.)", matrix.name)
            layers.setdefault(layer[0] if layer else matrix.name, []).append(matrix)
        return layers


def matrix_from_json(value: Mapping[str, Any]) -> MatrixReport:
    return MatrixReport(**{**value, "notes": tuple(value["notes"])})


def suffering(matrices: Sequence[MatrixReport]) -> list[MatrixReport]:
    """Matrices that lost much, or far more than the others, the worst first."""
    if not matrices:
        return []
    limit = min(_MUCH, _TIMES * statistics.median(matrix.error for matrix in matrices))
    return sorted((m for m in matrices if m.error > limit), key=lambda m: -m.error)


def warnings_of(matrices: Sequence[MatrixReport]) -> list[str]:
    """One line for each kind of trouble."""
    found = []
    worst = suffering(matrices)
    if worst:
        names = ", ".join(f"{matrix.name} ({matrix.error:.1%})" for matrix in worst[:6])
        more = f" and {len(worst) - 6} more" if len(worst) > 6 else ""
        found.append(f"these matrices lost much more than the others: {names}{more}")
    noted: dict[str, list[str]] = {}
    for matrix in matrices:
        for note in matrix.notes:
            noted.setdefault(note, []).append(matrix.name)
    for note, modules in noted.items():
        more = f" and {len(modules) - 4} more" if len(modules) > 4 else ""
        found.append(f"{note}: {', '.join(modules[:4])}{more}")
    return found
