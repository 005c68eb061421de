"""A file mapped into memory, read as tensors without a copy."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from turbolm.errors import CheckpointError

# No swap is reserved for a map that nobody writes to (Python names the flag from 3.11 on).
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """A whole file as a private map. Writing to a view changes the view alone, never the file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where the file can't be read or is empty."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise CheckpointError(f"{path} is empty; download it again")
                # Private and writable: PyTorch has no read-only tensors, and a stray write to a
                # read-only map would end the process.
                self.buffer = mmap.mmap(
                    file.fileno(),
                    self.size,
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(f"can't read {path}: {reason}") from error

    def read(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`shape` elements of `dtype` from byte `offset` on: a view of the map, or a copy where the
        bytes are not aligned to the dtype. The caller has checked the bounds."""
        count = prod(shape)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        if offset % dtype.itemsize:
            data = torch.frombuffer(self.buffer, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
            return data.clone().view(dtype).reshape(tuple(shape))
        return torch.frombuffer(self.buffer, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))

    def release(self, offset: int, num_bytes: int) -> None:
        """Give back the memory of the pages that lie wholly in this range; they are read again from
        the file when they are used again."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED, start, end - start)
