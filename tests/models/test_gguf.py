"""GGUF files: what is read equals what the `gguf` package reads; broken files give CheckpointError."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbolm.errors import CheckpointError
from turbolm.models.gguf import GGUFFile

Q4_1 = gguf.GGMLQuantizationType.Q4_1
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def packed(rows: int, columns: int, data_type: gguf.GGMLQuantizationType) -> tuple[np.ndarray, Any]:
    matrix = np.random.default_rng(2).standard_normal((rows, columns), dtype=np.float32)
    return gguf.quants.quantize(matrix, data_type), data_type


def assert_same_as_reader(file: GGUFFile, path: Path) -> None:
    """Metadata and tensors against the `gguf` package's reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        value = file.metadata[name]
        expected = field.contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.type.name, mine.num_bytes) == (tensor.tensor_type.name, tensor.n_bytes)
        data = file.read(tensor.name)
        assert data.contiguous().view(torch.uint8).numpy().tobytes() == tensor.data.tobytes(), tensor.name


def test_reads_what_the_gguf_package_wrote(write_gguf: Any) -> None:
    metadata = {
        "a.text": "größe 大",
        "a.flag": True,
        "a.strings": ["", "ä", "x" * 300, "\0"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -1.25],
        "a.flags": [True, False],
    }
    path = write_gguf(
        metadata=metadata,
        tensors={"half": np.arange(6, dtype=np.float16).reshape(2, 3), "ids": np.arange(3, dtype=np.int32)},
        packed={"blk.0.attn_q.weight": packed(64, 64, Q4_1), "token_embd.weight": packed(40, 64, Q8_0)},
    )
    file = GGUFFile(path)
    assert file.version == 3
    assert {key: file.metadata[key] for key in ("a.text", "a.flag", "a.strings")} == {
        key: metadata[key] for key in ("a.text", "a.flag", "a.strings")
    }
    assert file.metadata["a.ints"].dtype == np.int32
    assert file.metadata["a.flags"].tolist() == [True, False]
    assert_same_as_reader(file, path)


def test_reads_the_default_model_as_the_gguf_package_does(smollm2_path: Path) -> None:
    assert_same_as_reader(GGUFFile(smollm2_path), smollm2_path)


@pytest.mark.parametrize(
    ("add", "value"),
    [
        ("add_uint8", 255),
        ("add_int8", -128),
        ("add_uint16", 65535),
        ("add_int16", -32768),
        ("add_uint32", 4294967295),
        ("add_int32", -5),
        ("add_uint64", (1 << 64) - 1),
        ("add_int64", -(1 << 63)),
        ("add_float32", 0.5),
        ("add_float64", 0.1),
    ],
)
def test_every_scalar_type(tmp_path: Path, add: str, value: float) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    getattr(writer, add)("a.key", value)
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "m.gguf").metadata["a.key"] == value


def test_reads_are_views_that_leave_the_file_alone(write_gguf: Any) -> None:
    path = write_gguf()
    before = path.read_bytes()
    file = GGUFFile(path)
    name = "blk.0.ffn_up.weight"
    first = file.read(name)
    assert first.data_ptr() == file.read(name).data_ptr()
    values = first.clone()
    file.release(name)
    assert torch.equal(file.read(name), values)
    first.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_of_the_file_is_kept_to(write_gguf: Any, alignment: int) -> None:
    path = write_gguf(alignment=alignment)
    assert_same_as_reader(GGUFFile(path), path)


def test_version_2_is_read(write_gguf: Any) -> None:
    path = write_gguf()
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert GGUFFile(path).version == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "empty"),
        (lambda content: b"GGUF", "no GGUF file"),
        (lambda content: b"PK\3\4" + content[4:], "no GGUF file"),
        (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "version 1"),
        (lambda content: content[:4] + struct.pack(">I", 3) + content[8:], "big-endian"),
        (lambda content: content[:8] + struct.pack("<Q", 1 << 62) + content[16:], "don't fit"),
        (lambda content: content[:16] + struct.pack("<Q", 1 << 62) + content[24:], "don't fit"),
        (lambda content: content[:-100], "truncated"),
        (lambda content: content.replace(b"blk.0.attn_v.weight", b"blk.0.attn_k.weight"), "twice"),
        (lambda content: content.replace(b"blk.0.attn_v.weight", b"blk.0.attn_\xff.weight"), "UTF-8"),
        (lambda content: content.replace(b"llama.block_count", b"llama.block_coun\xff"), "UTF-8"),
    ],
)
def test_broken_files_are_refused(write_gguf: Any, change: Any, message: str) -> None:
    path = write_gguf()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in str(caught.value)


def test_overlapping_tensors_are_refused(write_gguf: Any) -> None:
    path = write_gguf()
    content = bytearray(path.read_bytes())
    # An entry: name, dimensions (4 + 8 bytes for a vector), type (4), offset (8).
    position = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    content[position : position + 8] = struct.pack("<Q", 0)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="overlaps"):
        GGUFFile(path)


def test_rows_of_incomplete_blocks_are_refused(write_gguf: Any) -> None:
    path = write_gguf(packed={"blk.0.attn_q.weight": packed(64, 64, Q4_1)})
    content = bytearray(path.read_bytes())
    position = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4
    content[position : position + 8] = struct.pack("<Q", 48)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*48.*Q4_1 blocks of 32"):
        GGUFFile(path)


def test_files_that_are_not_there_or_not_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="can't read"):
            GGUFFile(path)


def test_unknown_tensor_is_named(write_gguf: Any) -> None:
    file = GGUFFile(write_gguf())
    with pytest.raises(CheckpointError, match="no_such"):
        file.read("no_such")


class TestSplit:
    @pytest.fixture
    def parts(self, write_gguf: Any, tmp_path: Path) -> list[Path]:
        write_gguf(split_max_tensors=4)
        parts = sorted(tmp_path.glob("model-*.gguf"))
        assert len(parts) == 3
        return parts

    def test_any_part_opens_the_set(self, parts: list[Path], write_gguf: Any) -> None:
        whole = GGUFFile(write_gguf(name="whole.gguf"))
        for part in parts:
            file = GGUFFile(part)
            assert file.path == parts[0]
            assert set(file.tensors) == set(whole.tensors)
            assert all(torch.equal(file.read(name), whole.read(name)) for name in whole.tensors)
            assert file.metadata["llama.block_count"] == 1

    def test_missing_part_is_named(self, parts: list[Path]) -> None:
        parts[1].unlink()
        with pytest.raises(CheckpointError, match="model-00002-of-00003"):
            GGUFFile(parts[0])

    def test_mixed_up_parts(self, parts: list[Path]) -> None:
        parts[1].write_bytes(parts[2].read_bytes())
        with pytest.raises(CheckpointError, match="mixed up"):
            GGUFFile(parts[0])

    def test_renamed_part(self, parts: list[Path]) -> None:
        with pytest.raises(CheckpointError, match="set of 3"):
            GGUFFile(parts[0].rename(parts[0].with_name("renamed.gguf")))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_never_do_worse_than_checkpoint_error(write_gguf: Any, tmp_path: Path, data: Any) -> None:
    original = tmp_path / "fuzz-original.gguf"
    if not original.exists():
        write_gguf(metadata={"a.strings": ["x", "yz"], "a.ints": [1, 2], "a.flags": [True]}, name=original.name)
    content = bytearray(original.read_bytes())
    header_bytes = content.index(b"output_norm.weight") + 60
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_bytes - 1))
        content[position] = data.draw(st.sampled_from([0, 1, 9, 127, 128, 255]) | st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    broken = tmp_path / "fuzz.gguf"
    broken.write_bytes(content[:cut])
    try:
        file = GGUFFile(broken)
        for name in file.tensors:
            file.read(name).sum()
    except CheckpointError:
        pass
