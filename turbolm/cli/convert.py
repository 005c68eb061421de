"""`turbolm convert`: a model in the layout of the kernels, so that loading reads it as it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import EngineConfig, format_size

_OPTIONS = ("device", "weights", "dtype", "tensor_parallel")


@takes_options("Engine", EngineConfig, omit=tuple(name for name in EngineConfig.__slots__ if name not in _OPTIONS))
def convert(model: str, /, *, output: Annotated[Path, Parameter(name=("--output", "-o"))], **options: object) -> None:
    """Write a model as turbolm's kernels keep it: rounded, packed and divided over GPUs once, instead of at every
    start. The folder is for one device and number of GPUs, and for turbolm alone.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name, ms:org/name or pypi:package.
    output
        The new folder, which chat and serve take as a model.
    """
    from turbolm.compress.conversion import convert as run  # torch, which --help can do without

    run(model, output, **given(options, EngineConfig))  # type: ignore[arg-type]
    num_bytes = sum(path.stat().st_size for path in output.rglob("*.safetensors"))
    sys.stdout.write(f"{output}: {format_size(num_bytes)} of weights\n")
