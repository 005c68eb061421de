"""Finding the native library, and saying what is wrong where it can't be used."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbolm.errors import EngineError
from turbolm.ops.cpu import instructions, library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that hasn't looked for the library yet."""
    monkeypatch.setattr(library, "_open", library._open.__wrapped__)
    library._warn.cache_clear()
    return monkeypatch


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_library_is_there() -> None:
    assert library.load() is not None
    assert library.failure() is None
    assert library.isa() in library.ISA_NAMES


def test_missing_library_is_reported_once(
    fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.setattr(library, "_PATH", tmp_path / "_native.so")
    assert library.load() is None and library.load() is None
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "not built" in caplog.text and "several times slower" in caplog.text
    assert library.isa() is None
    with pytest.raises(EngineError, match="not built"):
        library.Team(1)


def test_broken_library_is_reported(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    fresh.setattr(library, "_PATH", broken)
    assert library.load() is None
    assert "can't be loaded" in (library.failure() or "")


def test_other_version_is_refused(fresh: pytest.MonkeyPatch) -> None:
    class Longer(instructions.Softcap):
        _fields_ = [("extra", ctypes.c_int64)]  # noqa: RUF012

    fresh.setattr(instructions, "KINDS", (*instructions.KINDS[:-2], Longer, instructions.Step))
    assert "another version" in (library.failure() or "")


@pytest.mark.parametrize("kind", instructions.KINDS)
def test_structs_agree_with_the_library(kind: type[ctypes.Structure]) -> None:
    assert library.library().turbolm_struct_size(kind.opcode) == ctypes.sizeof(kind)  # type: ignore[attr-defined]


def test_instruction_set_by_environment() -> None:
    code = "from turbolm.ops.cpu import library; print(library.isa())"
    assert run_python(code, TURBOLM_ISA="generic").stdout == "generic\n"
    unknown = run_python(code, TURBOLM_ISA="avx9")
    assert "ConfigError: TURBOLM_ISA is 'avx9'; allowed: generic, neon, avx2" in unknown.stderr
    assert "Did you mean 'avx2'?" in unknown.stderr


def test_default_is_the_best_set_that_can_be_selected() -> None:
    default = library.isa()
    try:
        available = [name for name in library.ISA_NAMES if library.select_isa(name) and library.isa() == name]
        assert "generic" in available
        assert library.select_isa("") and library.isa() == available[-1]
    finally:
        library.select_isa(default or "")


@pytest.mark.parametrize("name", library.ISA_NAMES)
def test_environment_never_raises_the_instruction_set(name: str) -> None:
    """Where a set is not available, the best one below it is used."""
    used = run_python("from turbolm.ops.cpu import library; print(library.isa())", TURBOLM_ISA=name).stdout.strip()
    assert library.ISA_NAMES.index(used) <= library.ISA_NAMES.index(name)
    assert (used == name) == library.select_isa(name)
    assert library.select_isa("")


def test_selecting_an_unknown_instruction_set() -> None:
    assert not library.select_isa("mmx")
