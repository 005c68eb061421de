"""Builds the native CPU kernels, csrc/*.cpp → turbolm/ops/cpu/_native.so; pyproject.toml has the rest.

A plain C library without Python's headers: one build serves every Python version. Files are compiled
side by side, each with the instruction set that its name ends in. Without a working compiler the
installation goes on without the library, and turbolm runs on its PyTorch reference ops.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]

#: machine → file name suffix → compiler flags
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
        "avx512bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
SUFFIXES = {suffix for sets in INSTRUCTION_SETS.values() for suffix in sets}

# Contraction of a*b+c would let two compilations of one formula round differently: the kernels ask
# for fused multiply-adds where they want them, and promise bitwise reproducible results.
ROUNDING_FLAGS = ["-ffp-contract=off", "-fno-math-errno"]
# GCC takes some of its own intrinsics for uses of uninitialized values.
WARNING_FLAGS = ["-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
COMPILE_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", *ROUNDING_FLAGS, *WARNING_FLAGS]
LINK_FLAGS = ["-shared", "-pthread", "-static-libstdc++", "-static-libgcc"]


class CompileError(Exception):
    """The compiler is missing or refused a file."""


class NativeLibrary(Extension):
    """The library as setuptools sees it."""

    def __init__(self) -> None:
        super().__init__("turbolm.ops.cpu._native", sources=sorted(str(p.relative_to(ROOT)) for p in sources()))
        self.depends = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.h"))


def sources() -> list[Path]:
    return sorted((ROOT / "csrc").glob("*.cpp"))


class BuildNative(build_ext):
    """Compiles and links without setuptools' compiler classes, which know one set of flags per library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def run(self) -> None:
        try:
            super().run()
        except CompileError as error:
            print(
                f"\nturbolm: the native CPU kernels were not built: {error}\n"
                "turbolm: installing without them; models will run on the slower PyTorch reference ops.\n"
                "turbolm: for the kernels, install a C++20 compiler (GCC 11, Clang 14 or later) and install again.\n",
                file=sys.stderr,
            )
            if os.environ.get("TURBOLM_REQUIRE_NATIVE") == "1":
                raise SystemExit(1) from error

    def build_extension(self, ext: Extension) -> None:
        folder = object_folder(Path(self.build_temp))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = [*shlex.split(os.environ.get("CXX", "c++")), *shlex.split(os.environ.get("CXXFLAGS", ""))]
        sets = supported_sets(compiler)
        defines = [f"-DTURBOLM_BUILD_{suffix.upper()}" for suffix in sets]

        def compile_file(source: Path) -> Path | None:
            suffix = source.stem.rpartition("_")[2]
            if suffix in SUFFIXES and suffix not in sets:
                return None
            output = folder / f"{source.stem}.o"
            flags = [*COMPILE_FLAGS, *defines, *sets.get(suffix, []), "-MMD"]
            command = [*compiler, *flags, "-c", str(source), "-o", str(output)]
            note = output.with_suffix(".command")
            if self.force or not is_fresh(output) or not note.exists() or note.read_text() != shlex.join(command):
                note.unlink(missing_ok=True)
                call(command)
                note.write_text(shlex.join(command))
            return output

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = [str(path) for path in pool.map(compile_file, sources()) if path is not None]
        # A library that is in use must not be overwritten in place.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            linked = Path(scratch) / target.name
            call([*compiler, *LINK_FLAGS, *objects, "-o", str(linked)])
            linked.replace(target)


def object_folder(fallback: Path) -> Path:
    """Where object files stay from one installation to the next: pip makes a new `fallback` each time."""
    folder = ROOT / "build" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = fallback
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def is_fresh(output: Path) -> bool:
    """Is the object file newer than all that it was made from, as the compiler listed it?"""
    dependencies = output.with_suffix(".d")
    if not output.exists() or not dependencies.exists():
        return False
    names = dependencies.read_text().replace("\\\n", " ").split()[1:]
    made = output.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime < made for name in [*names, __file__])


def supported_sets(compiler: list[str]) -> dict[str, list[str]]:
    """The instruction sets of this machine's family whose flags the compiler takes."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int turbolm;\n")
        call([*compiler, "-std=c++20", "-c", str(source), "-o", str(source.with_suffix(".o"))])
        supported = {}
        for suffix, flags in INSTRUCTION_SETS.get(machine, {}).items():
            try:
                call([*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
            except CompileError:
                print(f"turbolm: the compiler has no {suffix}; its kernels are left out", file=sys.stderr)
            else:
                supported[suffix] = flags
        return supported


def call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]} can't be run ({error.strerror})") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


class NativeDistribution(Distribution):
    """Installs into the platform's library folder, as packages with compiled code do."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the library depends on the platform, not on the Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[NativeLibrary()],
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
