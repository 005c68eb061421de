"""Weights in safetensors files: one file, or shards with an index.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
and the data, which the tensors cover without gaps or overlaps (format: huggingface/safetensors).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from turbolm.errors import CheckpointError
from turbolm.models.mapped_file import MappedFile
from turbolm.weights import TensorInfo

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_DIMS = 16
_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class _Location(NamedTuple):
    file: MappedFile
    offset: int  # bytes from the start of the file


class SafetensorsSource:
    """The tensors of a folder's safetensors files (a `WeightSource`). Only headers are read here."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError naming the file and the tensor at fault."""
        self.path = folder
        self._locations: dict[str, _Location] = {}
        self._tensors: dict[str, TensorInfo] = {}
        weight_map = _read_index(folder)
        for file_name in sorted(set(weight_map.values())) if weight_map is not None else _find_files(folder):
            self._add_file(folder / file_name)
        for name, file_name in (weight_map or {}).items():
            location = self._locations.get(name)
            if location is None or location.file.path.name != file_name:
                raise CheckpointError(
                    f"{folder / _INDEX_NAME} says that {name} is in {file_name}, but that file lacks it; "
                    "index and shards are of different versions: download them again"
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str) -> Tensor:
        """A view of the mapped file, in the stored dtype and shape."""
        info, location = self._find(name)
        return location.file.read(location.offset, info.shape, DTYPES[info.dtype])

    def release(self, name: str) -> None:
        info, location = self._find(name)
        location.file.release(location.offset, info.num_bytes)

    def _find(self, name: str) -> tuple[TensorInfo, _Location]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._tensors[name], self._locations[name]

    def _add_file(self, path: Path) -> None:
        file = MappedFile(path)
        for info, offset in read_header(file):
            if info.name in self._locations:
                other = self._locations[info.name].file.path.name
                raise CheckpointError(f"{path}: tensor {info.name} is also in {other}; keep one of the two files")
            self._tensors[info.name] = info
            self._locations[info.name] = _Location(file, offset)


def read_header(file: MappedFile) -> list[tuple[TensorInfo, int]]:
    """Every tensor with its byte offset in the file, in file order; everything is checked against
    the file's size."""
    header_bytes = int.from_bytes(file.buffer[:8], "little")
    data_start = 8 + header_bytes
    if file.size < 8 or header_bytes > MAX_HEADER_BYTES or data_start > file.size:
        raise CheckpointError(
            f"{file.path} is no safetensors file, or truncated: its header would take {header_bytes:,} bytes "
            f"of {file.size:,}; download it again"
        )
    entries = _parse_json(file.path, bytes(file.buffer[8:data_start]))
    entries.pop("__metadata__", None)
    tensors = [_check_entry(file.path, name, entry) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor[1], tensor[1] + tensor[0].num_bytes))
    end, last = 0, "the header"
    for info, begin in tensors:
        if begin != end:
            problem = "overlaps" if begin < end else "leaves a gap after"
            raise CheckpointError(f"{file.path}: the data of tensor {info.name} {problem} {last}; the file is broken")
        end, last = begin + info.num_bytes, f"tensor {info.name}"
    if end != file.size - data_start:
        raise CheckpointError(
            f"{file.path}: the tensors take {end:,} bytes, but {file.size - data_start:,} follow the header "
            f"(last: {last}); the file is truncated or broken: download it again"
        )
    return [(info, data_start + begin) for info, begin in tensors]


def _check_entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int]:
    """The tensor and its offset from the data's start."""

    def fail(problem: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {problem}; the file is broken")

    if not isinstance(entry, dict):
        raise fail("its header entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"dtype {str(dtype)[:40]!r} is unknown (known: {', '.join(DTYPES)})")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMS:
        raise fail(f"shape {str(shape)[:80]} is not a list of at most {_MAX_DIMS} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail(f"data_offsets {str(offsets)[:80]} are not [begin, end]")
    num_bytes = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise fail(f"{dtype} of shape {shape} takes {num_bytes} bytes, data_offsets hold {offsets[1] - offsets[0]}")
    return TensorInfo(name, tuple(shape), dtype, num_bytes), offsets[0]


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The JSON object in a header or an index."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: tensor or key {double} is there twice; the file is broken")
        return table

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON can't be read ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its JSON is not an object; download it again")
    return value


def _read_index(folder: Path) -> dict[str, str] | None:
    """{tensor name: file name}, or None where the folder has no index."""
    path = folder / _INDEX_NAME
    if not path.is_file():
        return None
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    weight_map = _parse_json(path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    for name, file_name in weight_map.items():
        if (
            not isinstance(file_name, str)
            or not file_name.endswith(".safetensors")
            or Path(file_name).name != file_name
        ):
            raise CheckpointError(f"{path}: {name} is in {file_name!r}, which is not the name of a safetensors file")
    _check_present(folder, sorted(set(weight_map.values())))
    return weight_map


def _find_files(folder: Path) -> list[str]:
    """The safetensors files of a folder without an index."""
    names = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))
    if _SINGLE_NAME in names:
        return [_SINGLE_NAME]
    if len(names) == 1 and not _SHARD_NAME.fullmatch(names[0]):
        return names
    if not names:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(
                f"{folder} has its weights only as pickles ({pickles[0]}), which can run code when they are loaded; "
                "get the model's safetensors files, or convert it with transformers' save_pretrained"
            )
        raise CheckpointError(f"{folder} has no weights: no .safetensors and no .gguf file")
    shards = [match for name in names if (match := _SHARD_NAME.fullmatch(name))]
    if len(shards) != len(names) or len({(match[1], match[3]) for match in shards}) != 1:
        raise CheckpointError(
            f"{folder} has {len(names)} safetensors files ({', '.join(names[:4])} …) and no {_INDEX_NAME} "
            "that says which ones are the model's; add the index, or leave one file"
        )
    stem, count = shards[0][1], int(shards[0][3])
    if count > len(names):
        found = {int(match[2]) for match in shards}
        lost = next(number for number in range(1, count + 1) if number not in found)
        _check_present(folder, [f"{stem}-{lost:05d}-of-{count:05d}.safetensors"])
    return names


def _check_present(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:4])}: {len(missing)} shards to download again")
