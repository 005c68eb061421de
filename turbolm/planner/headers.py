"""The headers of a model on a hub, without its weights.

Each file is rebuilt as a sparse one of its full size, so that the readers of local files read, and check, it: the
header's bytes are there, the weights are a hole.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import httpx

from turbolm.errors import CheckpointError, DownloadError
from turbolm.models.gguf import first_offset
from turbolm.models.safetensors import MAX_HEADER_BYTES

_FIRST_BYTES = 1 << 18  # asked for at once: most headers fit
_MAX_GGUF_HEADER = 1 << 28
_MAX_CONFIG = 1 << 26
_CONFIGS = ("config.json", "generation_config.json", "quantize_config.json", "model.safetensors.index.json")
_SECONDS = 30.0  # without a byte


def copy_headers(
    sizes: Mapping[str, int], urls: Mapping[str, str], request_headers: Mapping[str, str], folder: Path
) -> None:
    """Files of `sizes` (name → bytes) into `folder`: configs whole, weights by their headers, others not at all.

    Raises DownloadError (no answer, no ranges), CheckpointError (no such header)."""
    with httpx.Client(headers=dict(request_headers), follow_redirects=True, timeout=_SECONDS) as client:
        for name, size in sizes.items():
            remote = _RemoteFile(client, urls[name], name, size)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if posixpath.basename(name) in _CONFIGS:
                if size > _MAX_CONFIG:
                    raise CheckpointError(f"{name} has {size:,} bytes, which no config has")
                path.write_bytes(remote.read(0, size))
            elif name.endswith(".safetensors"):
                _copy_safetensors(remote, path)
            elif name.endswith(".gguf"):
                _copy_gguf(remote, path)


class _RemoteFile:
    def __init__(self, client: httpx.Client, url: str, name: str, size: int) -> None:
        self._client = client
        self._url = url
        self.name = name
        self.size = size

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end), less what is beyond the file's end."""
        end = min(end, self.size)
        if start >= end:
            return b""
        try:
            with self._client.stream("GET", self._url, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
                if response.status_code == 200 and (start, end) != (0, self.size):
                    raise DownloadError(
                        f"the server of {self.name} sends whole files only; fetch the model (turbolm models pull), or "
                        "give its config.json"
                    )
                response.raise_for_status()
                content = response.read()
        except httpx.HTTPStatusError as error:
            raise DownloadError(
                f"the hub answered {error.response.status_code} for {self.name}; try again later, or sign in "
                "(hf auth login) where the model asks for it"
            ) from None
        except httpx.HTTPError as error:
            raise DownloadError(
                f"can't read {self.name} from the hub ({str(error) or type(error).__name__}); check the network, or "
                "give a local folder, .gguf file or config.json"
            ) from None
        if len(content) != end - start:
            raise DownloadError(f"the hub sent {len(content):,} of {end - start:,} bytes of {self.name}; try again")
        return content


def _copy_safetensors(remote: _RemoteFile, path: Path) -> None:
    content = remote.read(0, _FIRST_BYTES)
    end = 8 + int.from_bytes(content[:8], "little")
    if end > 8 + MAX_HEADER_BYTES:
        raise CheckpointError(f"{remote.name} is no safetensors file: its header would take {end - 8:,} bytes")
    content += remote.read(len(content), end)
    with path.open("wb") as file:
        _write_sparse(file, content, remote.size)


def _copy_gguf(remote: _RemoteFile, path: Path) -> None:
    """A GGUF header doesn't say how long it is: twice as much is read until it is whole."""
    content = remote.read(0, _FIRST_BYTES)
    while True:
        with path.open("wb") as file:
            _write_sparse(file, content, remote.size)
        if len(content) == remote.size or _is_whole(path, len(content)):
            return
        if len(content) >= _MAX_GGUF_HEADER:
            raise CheckpointError(f"{remote.name} has no GGUF header within its first {len(content):,} bytes")
        if content[:4] != b"GGUF":
            raise CheckpointError(f"{remote.name} is no GGUF file")
        content += remote.read(len(content), 2 * len(content))


def _is_whole(path: Path, num_bytes: int) -> bool:
    """Whether the header ends within `num_bytes`: the hole behind it reads as zeros, which may pass for entries."""
    try:
        return first_offset(path) <= num_bytes
    except CheckpointError:
        return False


def _write_sparse(file: BinaryIO, content: bytes, size: int) -> None:
    file.write(content)
    file.truncate(size)
