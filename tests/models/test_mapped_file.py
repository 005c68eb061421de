"""Mapped files: views, and memory that goes back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from turbolm.errors import CheckpointError
from turbolm.models.mapped_file import MappedFile

MEGABYTE = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_release_gives_memory_back_and_keeps_the_values(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"\1" * (64 * MEGABYTE))
    file = MappedFile(path)
    view = file.read(0, (64 * MEGABYTE,), torch.uint8)
    assert int(view.sum()) == 64 * MEGABYTE
    before = resident_bytes()
    file.release(100, 64 * MEGABYTE - 200)
    assert resident_bytes() < before - 60 * MEGABYTE
    assert int(view.sum()) == 64 * MEGABYTE


def test_release_spares_the_neighbours_pages(tmp_path: Path) -> None:
    """A page that is only partly released keeps what was written to it."""
    path = tmp_path / "data"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    file = MappedFile(path)
    file.read(0, (3 * mmap.PAGESIZE,), torch.uint8).fill_(7)
    file.release(mmap.PAGESIZE - 8, mmap.PAGESIZE + 16)
    values = file.read(0, (3, mmap.PAGESIZE), torch.uint8)
    assert values.float().mean(dim=1).tolist() == [7.0, 0.0, 7.0]


@pytest.mark.parametrize("offset", [0, 1, 3, 4])
def test_any_offset_can_be_read(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "data"
    values = torch.tensor([1.5, -2.0, 3.25])
    path.write_bytes(bytes(offset) + values.numpy().tobytes())
    assert torch.equal(MappedFile(path).read(offset, (3, 1), torch.float32), values.reshape(3, 1))


def test_empty_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, message in (("empty", "is empty"), ("absent", "can't read")):
        with pytest.raises(CheckpointError, match=f"{name}.*{message}|{message}.*{name}"):
            MappedFile(tmp_path / name)
