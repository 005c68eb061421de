from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder for turbolm and for the hub library."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TURBOLM_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels that is the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def build_wheel() -> Callable[[Path, str, str, Mapping[str, bytes]], Path]:
    """Writes a wheel with the given files: build_wheel(folder, project, version, files)."""

    def build(folder: Path, project: str, version: str, files: Mapping[str, bytes]) -> Path:
        info = f"{project}-{version}.dist-info"
        contents = {
            **files,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(
            f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
            for name, data in contents.items()
        )
        path = folder / f"{project}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**contents, f"{info}/RECORD": record.encode()}.items():
                archive.writestr(name, data)
        return path

    return build
