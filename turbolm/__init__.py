"""turbolm compresses, deploys and serves large language models.

from turbolm import LLM
print(LLM().chat([{"role": "user", "content": "Why is the sky blue?"}])[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbolm.config import EngineConfig
    from turbolm.llm import LLM, AsyncLLM
    from turbolm.lmdeploy import GenerationConfig, pipeline
    from turbolm.text import named_template
    from turbolm.types import Completion, Output, SamplingParams, Score

__version__ = "0.1.0"

# Imported when first used, so that the command line answers without loading torch.
_HOMES = {
    "AsyncLLM": "turbolm.llm",
    "Completion": "turbolm.types",
    "EngineConfig": "turbolm.config",
    "GenerationConfig": "turbolm.lmdeploy",
    "LLM": "turbolm.llm",
    "Output": "turbolm.types",
    "SamplingParams": "turbolm.types",
    "Score": "turbolm.types",
    "named_template": "turbolm.text",
    "pipeline": "turbolm.lmdeploy",
}

__all__ = [
    "LLM", "AsyncLLM", "Completion", "EngineConfig", "GenerationConfig", "Output", "SamplingParams", "Score",
    "__version__", "named_template", "pipeline",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'turbolm' has no attribute '{name}'")
