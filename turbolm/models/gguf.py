"""GGUF files: header, metadata, tensors.

Little-endian: "GGUF", version, counts, metadata (key, type, value), tensor entries (name, dimensions
from the fastest on, ggml type, offset), padding, data (format: docs/gguf.md of ggml). Names and order
of weights stay llama.cpp's here; `gguf_source` translates them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from turbolm.errors import CheckpointError
from turbolm.models.mapped_file import MappedFile
from turbolm.quant.gguf_blocks import GGML_TYPES, GgmlType

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1 << 16
_DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_SCALARS: Mapping[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING = 8
_ARRAY = 9
_U32 = _SCALARS[4]
_U64 = _SCALARS[10]

_PLAIN_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor's entry."""

    name: str
    shape: tuple[int, ...]  # in elements, row-major: (n, k) for a matrix
    type: GgmlType
    num_bytes: int
    offset: int  # bytes from the start of its file
    file: MappedFile


class GGUFFile:
    """A GGUF file, or a set of split files, opened by its header.

    `metadata`: scalars as int, float, bool or str; arrays of numbers as numpy arrays, of strings as
    lists. `tensors`: by llama.cpp's names.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the file, or any part of a split set. Raises CheckpointError."""
        header = _read_header(MappedFile(path))
        match = _SPLIT_NAME.fullmatch(path.name)
        count = _split_count(path, header, match)
        if match and count > 1:
            parts = [path.with_name(f"{match[1]}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
            missing = [part.name for part in parts if not part.is_file()]
            if missing:
                raise CheckpointError(f"{path.parent} lacks {', '.join(missing[:4])}: parts of a set of {count}")
            headers = [header if part == path else _read_header(MappedFile(part)) for part in parts]
        else:
            headers = [header]
        self.path = headers[0].file.path
        self.version = headers[0].version
        self.metadata = headers[0].metadata
        self.tensors: dict[str, GGUFTensor] = {}
        for number, header in enumerate(headers):
            self._add_part(header, number, count)
        expected = self.metadata.get("split.tensors.count", len(self.tensors))
        if count > 1 and expected != len(self.tensors):
            raise CheckpointError(f"{self.path}: the set should hold {expected} tensors, it holds {len(self.tensors)}")

    def _add_part(self, header: _Header, number: int, count: int) -> None:
        stated = (header.metadata.get("split.no", 0), header.metadata.get("split.count", 0) or 1)
        if count > 1 and stated != (number, count):
            raise CheckpointError(
                f"{header.file.path} says it is part {stated[0]} (from 0) of {stated[1]}, its name says {number} of "
                f"{count}; the parts are mixed up: download them again"
            )
        for name, tensor in header.tensors.items():
            if name in self.tensors:
                raise CheckpointError(f"{header.file.path}: tensor {name} is also in {self.tensors[name].file.path}")
            self.tensors[name] = tensor

    def read(self, name: str) -> Tensor:
        """A view of the mapped file: plain types in their shape, block types as uint8 with the last
        dimension in bytes."""
        tensor = self._find(name)
        dtype = _PLAIN_DTYPES.get(tensor.type.name)
        if dtype is not None:
            return tensor.file.read(tensor.offset, tensor.shape, dtype)
        row_bytes = tensor.shape[-1] // tensor.type.block_size * tensor.type.block_bytes
        return tensor.file.read(tensor.offset, (*tensor.shape[:-1], row_bytes), torch.uint8)

    def release(self, name: str) -> None:
        tensor = self._find(name)
        tensor.file.release(tensor.offset, tensor.num_bytes)

    def _find(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self.tensors[name]


@dataclass(frozen=True, slots=True)
class _Header:
    """One file's header."""

    file: MappedFile
    version: int
    metadata: dict[str, object]
    tensors: dict[str, GGUFTensor]


def first_offset(path: Path) -> int:
    """Where the tensors of this one file begin, in bytes; its size, where it has none. Raises CheckpointError."""
    header = _read_header(MappedFile(path))
    return min((tensor.offset for tensor in header.tensors.values()), default=header.file.size)


def _split_count(path: Path, header: _Header, match: re.Match[str] | None) -> int:
    """How many files the set has."""
    count = header.metadata.get("split.count", 0) or 1
    if type(count) is not int:
        raise CheckpointError(f"{path}: split.count is {count!r}, not a number")
    if count > 1 and (match is None or int(match[3]) != count):
        raise CheckpointError(
            f"{path} is part of a set of {count} files, which are found by name; "
            f"name them <model>-00001-of-{count:05d}.gguf and so on"
        )
    return count


class _Reader:
    """Reads values one after the other; whatever would go past the end of the file is refused."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.buffer = file.buffer
        self.size = file.size
        self.position = 0

    def fail(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}, at byte {self.position:,}; the file is broken")

    def take(self, num_bytes: int, what: str) -> int:
        """The position of the next `num_bytes`, and on past them."""
        start = self.position
        if num_bytes > self.size - start:
            raise self.fail(f"{what} takes {num_bytes:,} bytes, {self.size - start:,} are left")
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def name(self, what: str) -> str:
        length = self.u64(what)
        if length > _MAX_NAME_BYTES:
            raise self.fail(f"{what} of {length:,} bytes")
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        start = self.take(length, what)
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8 text") from error

    def value(self, key: str) -> object:
        """A metadata value with its type in front."""
        type_id = self.u32(key)
        if type_id == _STRING:
            return self.text(self.u64(key), key)
        if type_id == _ARRAY:
            return self.array(key)
        return self.scalar(type_id, key)

    def scalar(self, type_id: int, key: str) -> int | float | bool:
        layout = self.layout(type_id, key)
        value: int | float | bool = layout.unpack_from(self.buffer, self.take(layout.size, key))[0]
        return value

    def layout(self, type_id: int, key: str) -> struct.Struct:
        if type_id not in _SCALARS:
            raise self.fail(f"{key} has a value of unknown type {type_id}")
        return _SCALARS[type_id]

    def array(self, key: str) -> list[str] | np.ndarray:
        type_id, count = self.u32(key), self.u64(key)
        if type_id == _STRING:
            return self.strings(count, key)
        if type_id == _ARRAY:
            raise self.fail(f"{key} is an array of arrays")
        layout = self.layout(type_id, key)
        start = self.take(count * layout.size, key)
        return np.frombuffer(self.buffer[start : self.position], dtype=np.dtype(layout.format)).copy()

    def strings(self, count: int, key: str) -> list[str]:
        if count * 8 > self.size - self.position:
            raise self.fail(f"{key} has {count:,} strings")
        # The loop over a vocabulary is what opening a file costs: hence no calls for each string.
        buffer, size, position = self.buffer, self.size, self.position
        read_length: Callable[..., tuple[int]] = _U64.unpack_from
        result: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + read_length(buffer, position)[0]
                if position > size:
                    raise self.fail(f"string {len(result)} of {key} goes past the end")
                result.append(buffer[start:position].decode())
        except (struct.error, UnicodeDecodeError) as error:
            raise self.fail(f"string {len(result)} of {key} is cut off or not UTF-8 text") from error
        self.position = position
        return result


def _read_header(file: MappedFile) -> _Header:
    reader = _Reader(file)
    version = _read_version(reader)
    num_tensors, num_values = reader.u64("the tensor count"), reader.u64("the metadata count")
    # A value takes 13 bytes or more, a tensor entry 24: a count beyond that is noise.
    if num_values * 13 + num_tensors * 24 > file.size:
        raise reader.fail(f"{num_tensors:,} tensors and {num_values:,} metadata values don't fit in the file")
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = reader.name("a metadata key")
        if key in metadata:
            raise reader.fail(f"metadata key {key} is there twice")
        metadata[key] = reader.value(key)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.fail(f"general.alignment is {alignment!r}, not a power of two")
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        tensor = _read_tensor_entry(reader, file)
        if tensor.name in tensors:
            raise reader.fail(f"tensor {tensor.name} is there twice")
        tensors[tensor.name] = tensor
    data_start = -(-reader.position // alignment) * alignment
    return _Header(file, version, metadata, _place(tensors, file, data_start, alignment))


def _read_version(reader: _Reader) -> int:
    if reader.size < 24 or reader.buffer[:4] != _MAGIC:
        raise CheckpointError(f"{reader.path} is no GGUF file, or truncated; download it again")
    reader.position = 4
    version = reader.u32("the version")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise CheckpointError(f"{reader.path} is a big-endian GGUF file; get the little-endian one")
        raise CheckpointError(
            f"{reader.path} has GGUF version {version}; turbolm reads 2 and 3: get a file of a current version"
        )
    return version


def _read_tensor_entry(reader: _Reader, file: MappedFile) -> GGUFTensor:
    """An entry with its offset as written: from the start of the data."""
    name = reader.name("a tensor name")
    num_dims = reader.u32(name)
    if num_dims > _MAX_DIMS:
        raise reader.fail(f"tensor {name} has {num_dims} dimensions; at most {_MAX_DIMS} are possible")
    shape = tuple(reversed([reader.u64(name) for _ in range(num_dims)]))
    type_id, offset = reader.u32(name), reader.u64(name)
    if type_id not in GGML_TYPES:
        raise reader.fail(f"tensor {name} has the unknown ggml type {type_id}")
    ggml_type = GGML_TYPES[type_id]
    row = shape[-1] if shape else 1
    if row % ggml_type.block_size:
        raise reader.fail(
            f"tensor {name}: rows of {row} elements are not whole {ggml_type.name} blocks of {ggml_type.block_size}"
        )
    num_bytes = prod(shape) // ggml_type.block_size * ggml_type.block_bytes
    return GGUFTensor(name, shape, ggml_type, num_bytes, offset, file)


def _place(
    tensors: Mapping[str, GGUFTensor], file: MappedFile, data_start: int, alignment: int
) -> dict[str, GGUFTensor]:
    """The entries with offsets in the file, checked against its size and each other."""
    placed: dict[str, GGUFTensor] = {}
    end, last = data_start, "the header"
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        offset = data_start + tensor.offset
        if tensor.offset % alignment:
            raise CheckpointError(f"{file.path}: tensor {tensor.name} is not aligned to {alignment} bytes")
        if offset < end:
            raise CheckpointError(f"{file.path}: the data of tensor {tensor.name} overlaps {last}; the file is broken")
        end, last = offset + tensor.num_bytes, f"tensor {tensor.name}"
        if end > file.size:
            raise CheckpointError(
                f"{file.path}: tensor {tensor.name} ends at byte {end:,}, the file at {file.size:,}; "
                "it is truncated: download it again"
            )
        placed[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.type, tensor.num_bytes, offset, file)
    return {name: placed[name] for name in tensors}
