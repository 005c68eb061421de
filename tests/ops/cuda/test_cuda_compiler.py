from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from turbolm.errors import EngineError
from turbolm.kv import KvKind
from turbolm.ops.cuda import compiler
from turbolm.ops.cuda.decode import Variant
from turbolm.ops.cuda.linear import kernel_defines
from turbolm.ops.cuda.plan import DENSE, INT4, INT8, TILES, Output, Unit, tiles_of
from turbolm.ops.cuda.single import SingleTile
from turbolm.ops.cuda.single import kernel_defines as single_defines
from turbolm.ops.cuda.wide import DENSE_TILE, WideTile
from turbolm.ops.cuda.wide import TILES as WIDE_TILES
from turbolm.ops.cuda.wide import kernel_defines as wide_defines

# sm_90 with every number of tokens, those that need most registers first; sm_80 has no instruction of its own
VARIANTS = [
    ("sm_90a", TILES[13], Output.GATED, torch.bfloat16),
    ("sm_90", TILES[11], Output.PARTS, torch.float16),
    ("sm_90a", TILES[9], Output.FLOATS, torch.bfloat16),
    ("sm_90", TILES[0], Output.ELEMENTS, torch.bfloat16),
    ("sm_80", TILES[5], Output.GATED, torch.float16),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "small.cu"
    path.write_text('#include "half.cuh"\nextern "C" __global__ void small(int* x) { *x = VALUE / HALF; }')
    (tmp_path / "half.cuh").write_text("#define HALF 2")
    return path


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack per thread), from the attributes of section .nv.info: an ELF file's."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    start_of_names = sections[names][4]
    found = {}
    for name, _, _, _, offset, length in sections:
        if cubin[start_of_names + name :].startswith(b".nv.info\0"):
            at = offset
            while at < offset + length:
                kind, attribute, value = struct.unpack_from("<BBH", cubin, at)
                at += 4
                if kind == 4:  # `value` bytes follow
                    if attribute in (0x11, 0x2F):  # frame size, register count: of a symbol
                        found[attribute] = struct.unpack_from("<II", cubin, at)[1]
                    at += value
    return found[0x2F], found[0x11]


@pytest.mark.parametrize(("architecture", "tile", "output", "dtype"), VARIANTS, ids=lambda value: str(value)[:40])
def test_two_ctas_fit_an_sm_without_spilling(architecture, tile, output, dtype) -> None:
    defines = kernel_defines(tile, output, 0, dtype)
    registers, stack = resources(compiler.compile_cubin(compiler.KERNELS / "linear.cu", defines, architecture))
    assert registers > 32 and 2 * registers * tile.num_threads <= 65536
    assert stack == 0


@pytest.mark.parametrize(("unit", "tokens", "num_threads"), [(INT4[128], 8, 256), (INT4[32], 16, 256), (INT8, 8, 512)])
def test_unpacking_variants_fit_an_sm_without_spilling(unit: Unit, tokens: int, num_threads: int) -> None:
    tile = next(tile for tile in tiles_of(unit) if (tile.tokens, tile.num_threads) == (tokens, num_threads))
    defines = kernel_defines(tile, Output.PARTS, 0, torch.bfloat16)
    registers, stack = resources(compiler.compile_cubin(compiler.KERNELS / "linear.cu", defines, "sm_90"))
    assert tile.min_ctas * registers * tile.num_threads <= 65536
    assert stack == 0


@pytest.mark.parametrize(("tile", "unit"), [(SingleTile(1, 8, 4), INT4[128]), (SingleTile(1, 16, 3), INT4[32])])
def test_the_kernel_for_one_row_fits_an_sm_without_spilling(tile: SingleTile, unit: Unit) -> None:
    defines = single_defines(tile, unit, Output.PARTS, 0, torch.bfloat16)
    registers, stack = resources(compiler.compile_cubin(compiler.KERNELS / "single.cu", defines, "sm_90"))
    assert tile.min_ctas * registers * 32 * tile.num_warps <= 65536
    assert stack == 0


@pytest.mark.parametrize(
    ("tile", "unit", "output"),
    [
        (WIDE_TILES[0], INT4[128], Output.FLOATS),
        (WIDE_TILES[4], INT4[128], Output.GATED),
        (DENSE_TILE, DENSE, Output.GATED),
    ],
)
def test_the_kernel_for_many_rows_compiles_without_spilling(tile: WideTile, unit: Unit, output: Output) -> None:
    defines = wide_defines(tile, unit, output, 0, torch.bfloat16)
    registers, stack = resources(compiler.compile_cubin(compiler.KERNELS / "wide.cu", defines, "sm_90a"))
    assert registers * tile.num_threads <= 65536
    assert stack == 0


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4", "fp8"])
def test_decode_attention_compiles(kind: KvKind) -> None:
    variant = Variant(128, 4, 8, 64, 0, False, torch.bfloat16, 12, 2, kind)
    registers, _ = resources(compiler.compile_cubin(compiler.KERNELS / "decode.cu", variant.defines(), "sm_90"))
    assert registers * 32 * variant.warps <= 65536


def test_compiles_once(source: Path, cache: Path) -> None:
    first = compiler.compile_cubin(source, {"VALUE": 4}, "sm_90")
    (entry,) = cache.iterdir()
    before = entry.stat().st_mtime_ns
    assert compiler.compile_cubin(source, {"VALUE": 4}, "sm_90") == first
    assert entry.stat().st_mtime_ns == before
    assert compiler.compile_cubin(source, {"VALUE": 6}, "sm_90") != first
    compiler.compile_cubin(source, {"VALUE": 4}, "sm_80")
    assert len(list(cache.iterdir())) == 3


def test_a_changed_header_is_noticed(source: Path) -> None:
    first = compiler.compile_cubin(source, {"VALUE": 4}, "sm_90")
    source.with_name("half.cuh").write_text("#define HALF 1")
    assert compiler.compile_cubin(source, {"VALUE": 4}, "sm_90") != first


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda _: b""])
def test_a_damaged_entry_is_compiled_again(source: Path, cache: Path, damage) -> None:
    first = compiler.compile_cubin(source, {"VALUE": 4}, "sm_90")
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert compiler.compile_cubin(source, {"VALUE": 4}, "sm_90") == first
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path / "file"))
    assert compiler.compile_cubin(source, {"VALUE": 4}, "sm_90")[:4] == b"\x7fELF"
    assert "not kept" in caplog.text


def test_an_error_in_the_source_comes_with_the_log(source: Path) -> None:
    with pytest.raises(EngineError, match=r'(?s)small\.cu.*identifier "VALUE" is undefined'):
        compiler.compile_cubin(source, {}, "sm_90")


def test_without_a_gpu_the_reason_is_told() -> None:
    if torch.cuda.is_available():
        assert compiler.cuda_kernels_error() is None
    else:
        assert compiler.cuda_kernels_error() == "no CUDA GPU is available"


def test_an_old_gpu_is_told_what_is_needed() -> None:
    assert "7.5; they need 8.0" in (compiler._error_for((7, 5)) or "")
    assert compiler._error_for((9, 0)) is None
    assert "too old" in (compiler._error_for((99, 0)) or "")
