"""A strict reader of Hugging Face config.json fields.

Every field must be read by the family, be known to say nothing about the computation, or hold a
value that switches its feature off. Anything else is refused by name: a feature that turbolm
doesn't know would otherwise be left out silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.layers.rope import DynamicNtk, Factors, Linear, Llama3, Scaling, Yarn
from turbolm.ops import Activation

T = TypeVar("T")

# Fields that don't change what the decoder computes at inference.
# fmt: off
_SILENT = frozenset([
    "architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "use_cache", "initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop",
    "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "id2label",
    "label2id", "problem_type", "attn_implementation", "_attn_implementation", "tokenizer_class",
    "quantization_config", "compression_config", "max_window_layers",
    "keys_to_ignore_at_inference", "task_specific_params",
    "transformers.js_config", "is_llama_config", "rope_interleaved", "unsloth_version", "unsloth_fixed",
    "_attn_implementation_autoset", "generation_config", "decoder_start_token_id", "max_sequence_length",
    "model_max_length", "seq_length", "max_length", "finetuning_task", "prefix", "license",
])
# fmt: on
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}  # fmt: skip


class ConfigReader:
    """Reads fields of one config; `finish` refuses what nobody read."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._config = config
        self._read: set[str] = set()

    def _get(self, name: str, kind: type[T] | tuple[type, ...], default: T | None) -> T:
        self._read.add(name)
        value = self._config.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json lacks '{name}'; the checkpoint is incomplete")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise CheckpointError(f"config.json has '{name}': {value!r}; it must be {names}")
        return value  # type: ignore[return-value]

    def has(self, name: str) -> bool:
        return self._config.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(name, int, default)
        if value < 1:
            raise CheckpointError(f"config.json has '{name}': {value}; it must be at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = float(self._get(name, (int, float), default))
        if not math.isfinite(value):
            raise CheckpointError(f"config.json has '{name}': {value}; it must be finite")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return self._get(name, bool, default)

    def texts(self, name: str) -> list[str] | None:
        """A list of strings, None where the field is absent."""
        self._read.add(name)
        return [str(item) for item in self._get(name, list, [])] if self.has(name) else None

    def skip(self, *names: str) -> None:
        """These fields are known and don't matter in this family."""
        self._read.update(names)

    def activation(self, name: str = "hidden_act") -> Activation:
        value = self._get(name, str, None)
        if value not in _ACTIVATIONS:
            raise UnsupportedModelError(f"activation '{value}' isn't supported; supported: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head size), checked against each other."""
        num_heads = self.size("num_attention_heads")
        num_kv_heads = self.size("num_key_value_heads", num_heads)
        hidden = self.size("hidden_size")
        if not self.has("head_dim") and hidden % num_heads:
            raise CheckpointError(f"config.json: hidden_size {hidden} isn't a multiple of {num_heads} heads")
        head_dim = self.size("head_dim", hidden // num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(f"config.json: {num_heads} heads can't share {num_kv_heads} key/value heads evenly")
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim is {head_dim}; rotary embedding needs an even one")
        return num_heads, num_kv_heads, head_dim

    def rope(self, default_theta: float | None = None) -> tuple[float, Scaling | None]:
        """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        self._read.update(("rope_parameters", "rope_theta", "rope_scaling"))
        given = self._config.get("rope_parameters") or self._config.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise CheckpointError(f"config.json has rope_parameters or rope_scaling {given!r}; it must be an object")
        fields = ConfigReader(given)
        holder = fields if fields.has("rope_theta") else self
        theta = holder.number("rope_theta", default_theta)
        if theta <= 1:
            raise CheckpointError(f"config.json has rope_theta {theta}; it must be above 1")
        kind = fields._config.get("rope_type", fields._config.get("type", "default"))
        fields.skip("rope_type", "type", "rope_theta")
        scaling = self._scaling(str(kind), fields)
        fields.finish(f"rope scaling '{kind}'")
        return theta, scaling

    def _scaling(self, kind: str, fields: ConfigReader) -> Scaling | None:
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError("partial_rotary_factor isn't supported for this family")
        if kind == "default":
            fields.skip("factor")
            return None
        if kind == "linear":
            return Linear(fields.number("factor"))
        if kind == "dynamic":
            fields.skip("original_max_position_embeddings")
            return DynamicNtk(fields.number("factor"), self.size("max_position_embeddings"))
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            factor, low, high = (fields.number(name) for name in names)
            return Llama3(factor, low, high, fields.size("original_max_position_embeddings"))
        if kind == "yarn":
            return self._yarn(fields)
        if kind == "factors":
            return Factors(fields._get("tensor", str, None))
        raise UnsupportedModelError(
            f"rope scaling '{kind}' isn't supported; supported: default, linear, dynamic, llama3, yarn"
        )

    def _yarn(self, fields: ConfigReader) -> Yarn:
        original = fields.size("original_max_position_embeddings", self.size("max_position_embeddings"))
        factor = fields.number("factor", self.size("max_position_embeddings") / original)

        def log_factor(multiplier: float) -> float:
            return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

        mscale, mscale_all = fields.number("mscale", 0.0), fields.number("mscale_all_dim", 0.0)
        default = log_factor(mscale) / log_factor(mscale_all) if mscale and mscale_all else log_factor(1.0)
        return Yarn(
            factor,
            original,
            attention_factor=fields.number("attention_factor", default),
            beta_fast=fields.number("beta_fast", 32.0),
            beta_slow=fields.number("beta_slow", 1.0),
            truncate=fields.flag("truncate", True),
        )

    def finish(self, what: str) -> None:
        """Refuse fields that nobody read and that are switched on."""
        unknown = {
            name: value
            for name, value in self._config.items()
            if name not in self._read and name not in _SILENT and not _is_off(value)
        }
        if unknown:
            listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
            raise UnsupportedModelError(
                f"{what} doesn't know these config fields, which may change what the model computes: {listed}"
            )


def _is_off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, Sequence | Mapping) and not value)
