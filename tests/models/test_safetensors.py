"""Safetensors folders: the same tensors as the `safetensors` library's; broken ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from turbolm.errors import CheckpointError
from turbolm.models.safetensors import SafetensorsSource

NAMES = ("model.embed.weight", "model.norm.weight", "lm_head.weight")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        NAMES[0]: torch.randn(8, 6, generator=generator).to(torch.bfloat16),
        NAMES[1]: torch.randn(6, generator=generator),
        NAMES[2]: torch.randn(8, 6, generator=generator).to(torch.float16),
        "ids": torch.arange(5),
        "packed": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


def write_shards(folder: Path, shards: list[dict[str, torch.Tensor]], with_index: bool = True) -> list[Path]:
    paths = [folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    if with_index:
        weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsSource(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        info = source.tensors[name]
        assert (info.shape, info.num_bytes) == (tuple(tensor.shape), tensor.numel() * tensor.element_size())
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    assert source.tensors[NAMES[0]].dtype == "BF16"


def test_reads_are_views_that_leave_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    big = {"big": torch.randn(64, 256)}
    save_file(big, path)
    source = SafetensorsSource(tmp_path)
    view = source.read("big")
    assert view.data_ptr() == source.read("big").data_ptr()
    source.release("big")
    assert torch.equal(source.read("big"), big["big"])
    view.zero_()
    assert torch.equal(load_file(path)["big"], big["big"])


def test_unaligned_data_is_read_too(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.0])
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (1 - len(header) % 2)  # an odd length
    write_raw(tmp_path / "model.safetensors", header, values.numpy().tobytes())
    assert torch.equal(SafetensorsSource(tmp_path).read("x"), values)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_one_source(tmp_path: Path, with_index: bool) -> None:
    given = tensors()
    first = {name: given[name] for name in NAMES[:2]}
    second = {name: tensor for name, tensor in given.items() if name not in first}
    write_shards(tmp_path, [first, second], with_index)
    source = SafetensorsSource(tmp_path)
    assert set(source.tensors) == set(given)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in given.items())


class TestFolders:
    def test_missing_shard(self, tmp_path: Path) -> None:
        write_shards(tmp_path, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])[1].unlink()
        with pytest.raises(CheckpointError, match="lacks model-00002-of-00002"):
            SafetensorsSource(tmp_path)

    def test_missing_shard_without_index(self, tmp_path: Path) -> None:
        write_shards(tmp_path, [{"a": torch.ones(1)}, {"b": torch.ones(1)}], with_index=False)[0].unlink()
        with pytest.raises(CheckpointError, match="lacks model-00001-of-00002"):
            SafetensorsSource(tmp_path)

    def test_index_names_a_tensor_that_the_shard_lacks(self, tmp_path: Path) -> None:
        write_shards(tmp_path, [{"a": torch.ones(1)}, {"b": torch.ones(1)}])
        save_file({"c": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
        with pytest.raises(CheckpointError, match=r"b is in model-00002-of-00002.safetensors, but"):
            SafetensorsSource(tmp_path)

    def test_same_name_in_two_shards(self, tmp_path: Path) -> None:
        shared = torch.ones(1)
        write_shards(tmp_path, [{"a": shared, "b": torch.ones(2)}, {"a": shared, "c": torch.ones(3)}])
        with pytest.raises(CheckpointError, match="tensor a is also in"):
            SafetensorsSource(tmp_path)

    @pytest.mark.parametrize(
        "index",
        [
            b"{",
            b"[]",
            b"{}",
            b'{"weight_map": {}}',
            b'{"weight_map": {"a": 1}}',
            b'{"weight_map": {"a": "../model.safetensors"}}',
            b'{"weight_map": {"a": "model.bin"}}',
        ],
    )
    def test_broken_index(self, tmp_path: Path, index: bytes) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            SafetensorsSource(tmp_path)

    def test_pickles_are_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(CheckpointError, match=r"pickles \(pytorch_model.bin\)"):
            SafetensorsSource(tmp_path)

    def test_no_weights(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no weights"):
            SafetensorsSource(tmp_path)

    def test_unrelated_files(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors"):
            SafetensorsSource(tmp_path)

    def test_missing_tensor_is_named(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="no tensor nothing"):
            SafetensorsSource(tmp_path).read("nothing")


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "not an object"),
        (b'{"x": {}, "x": {}}', "x is there twice"),
        ({"x": 5}, "not an object"),
        ({"x": entry(dtype="F31")}, "dtype 'F31' is unknown"),
        ({"x": entry(dtype=["F32"])}, "unknown"),
        ({"x": entry(shape=[3])}, "takes 12 bytes, data_offsets hold 8"),
        ({"x": entry(shape=[-1, -2])}, "shape"),
        ({"x": entry(shape=[True, 2])}, "shape"),
        ({"x": entry(shape=[1] * 17)}, "shape"),
        ({"x": entry(shape=[10**30])}, "shape"),
        ({"x": entry(data_offsets=[8, 0])}, "data_offsets"),
        ({"x": entry(data_offsets=[0])}, "data_offsets"),
        ({"x": entry(data_offsets=[4, 12])}, "gap"),
        ({"x": entry(), "y": entry()}, "overlaps tensor x|overlaps tensor y"),
        ({"x": entry(), "y": entry(data_offsets=[8, 16])}, "truncated"),
        ({}, "truncated"),
    ],
)
def test_broken_headers_are_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = tmp_path / "model.safetensors"
    write_raw(path, header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"abc", (1 << 40).to_bytes(8, "little") + b"{}"])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        SafetensorsSource(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_never_do_worse_than_checkpoint_error(tmp_path: Path, data: Any) -> None:
    original, broken = tmp_path / "original", tmp_path / "broken"
    if not original.exists():
        save_file(tensors(), original)
        broken.mkdir()
    content = bytearray(original.read_bytes())
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    (broken / "model.safetensors").write_bytes(content[:cut])
    try:
        source = SafetensorsSource(broken)
        for name in source.tensors:
            source.read(name)
    except CheckpointError:
        pass
