"""Unfinished work on disk, so that a job that was killed goes on where it was.

OUT/.partial holds weights-0000i-of-0000n.safetensors (one for each layer, the last with what is in no layer), the
hidden states, and state.json, which is replaced when a file is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from turbolm.errors import ConfigError

FOLDER = ".partial"
_STATE = "state.json"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file that the umask decides who may read (the library's own files are for their owner alone)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, {"format": "pt"})
    path.chmod(mode)


class Partial:
    """The state of one job."""

    def __init__(self, output: Path, job: Mapping[str, Any], num_layers: int) -> None:
        """`job`: everything that the result depends on, in JSON's types. Raises ConfigError where the folder
        holds another job's work."""
        self.folder = output / FOLDER
        self._job = dict(job)
        self._num_layers = num_layers
        self.layers: list[Any] = []
        """What was reported of each finished layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._read()
        if state is not None:
            self._check(state["job"])
            self.layers = state["layers"]

    def file(self, index: int) -> Path:
        """The weights of layer `index`; of `num_layers`: what is in no layer."""
        return self.folder / f"weights-{index + 1:05d}-of-{self._num_layers + 1:05d}.safetensors"

    def save_weights(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.file(index)
        part = path.with_suffix(".tmp")
        write_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
        part.replace(path)

    def finish_layer(self, report: Any) -> None:
        """The layer's weights and the next one's input are complete."""
        self.layers.append(report)
        part = self.folder / "state.tmp"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"job": self._job, "layers": self.layers}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / _STATE)

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / _STATE
        if not path.is_file():
            return None
        try:
            state: Any = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = None
        parts = (state.get("job"), state.get("layers")) if isinstance(state, dict) else (None, None)
        if not isinstance(parts[0], dict) or not isinstance(parts[1], list):
            raise ConfigError(f"{path} is broken: delete the folder {self.folder}, and the work begins again")
        return {"job": parts[0], "layers": parts[1]}

    def _check(self, before: Mapping[str, Any]) -> None:
        for name in {**before, **self._job}:
            if before.get(name) != self._job.get(name):
                raise ConfigError(
                    f"{self.folder} holds unfinished work with {name} {before.get(name)!r}, now it is "
                    f"{self._job.get(name)!r}: repeat the command as it was, or delete that folder"
                )
