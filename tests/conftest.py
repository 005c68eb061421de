"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbolm.hub import fetch


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, downloaded once into turbolm's cache folder."""
    return fetch("smollm2-135m").path
