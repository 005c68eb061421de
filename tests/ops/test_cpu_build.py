"""Installing without a compiler goes on, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_a_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0
    assert "the native CPU kernels were not built: no-such-compiler can't be run" in done.stderr
    assert "install a C++20 compiler" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_kernels_can_be_required(tmp_path: Path) -> None:
    """Release builds must not leave them out silently."""
    assert build(tmp_path, CXX="no-such-compiler", TURBOLM_REQUIRE_NATIVE="1").returncode == 1
