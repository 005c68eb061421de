"""Architecture names of config.json → model families. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from turbolm.errors import CheckpointError, UnsupportedModelError, nearest
from turbolm.models.internlm import internlm2, internlm3
from turbolm.models.llama import llama, mistral, qwen2, qwen3
from turbolm.models.spec import DecoderSpec

FAMILIES: dict[str, Callable[[Mapping[str, object]], DecoderSpec]] = {
    "InternLM2ForCausalLM": internlm2,
    "InternLM3ForCausalLM": internlm3,
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def decoder_spec(config: Mapping[str, object]) -> DecoderSpec:
    """The spec of a checkpoint's config.json. Raises UnsupportedModelError for unknown architectures
    and for fields that the family doesn't know."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError("config.json lacks 'architectures'; it must name the model class")
    name = str(architectures[0])
    if name not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture '{name}' isn't supported.{nearest(name, FAMILIES)} Supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name](config)
