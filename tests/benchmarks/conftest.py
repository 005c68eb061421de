"""The benchmark scripts as modules, and a small model in their own format."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random weights, as gpu_models.py makes it."""
    from gpu_models import SHAPES, write_model

    folder = tmp_path_factory.mktemp("tiny")
    write_model(SHAPES["tiny"], folder, device="cpu", threads=2)
    return folder
