"""Where there is speculation, and what a draft model takes beside the model that it drafts for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turbolm.errors import ConfigError
from turbolm.kv import KvFormat, bytes_per_token
from turbolm.memory import ModelNeeds, StepLimits, weight_bytes, working_memory

if TYPE_CHECKING:
    from turbolm.config import Backend, EngineConfig

#: The largest step of a draft model: sequences, and rows of logits.
MAX_DRAFTED, LOGIT_ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class DraftNeeds:
    """Bytes; all 0 where there is no draft model."""

    name: str = ""
    weights: int = 0
    working: int = 0
    kv_per_token: int = 0


def draft_needs(
    config: EngineConfig, backend: Backend, draft: ModelNeeds | None, limits: StepLimits, reasons: list[str]
) -> DraftNeeds:
    """Its KV cache is not quantized. Of several GPUs the first one has all of it. Raises ConfigError where there can be
    no draft model."""
    if draft is None:
        return DraftNeeds()
    for is_wrong, why in (
        (config.speculation == "off", "speculation is 'off'"),
        (backend.kernels != "native", "kernels is 'reference', which checks no drafts"),
    ):
        if is_wrong:
            raise ConfigError(f"draft_model is {draft.name!r}, but {why}: change one of them")
    needs = DraftNeeds(
        draft.name,
        weight_bytes(draft, backend.device, backend.dtype, unpack=backend.unpack, rounded="auto"),
        working_memory(draft, backend.device, backend.dtype, limits._replace(logit_rows=LOGIT_ROWS), 1).total,
        bytes_per_token(draft.kv_layers, KvFormat.both(backend.kv_dtype)),
    )
    reasons.append(f"draft model {draft.name}: its KV cache takes {needs.kv_per_token} bytes per token")
    return needs


def has_speculation(config: EngineConfig, backend: Backend, reasons: list[str]) -> bool:
    """Whether there are drafts: only where kernels give a token the same bits whatever is computed with it.
    Raises ConfigError where they are asked for and can't be."""
    if config.speculation == "off":
        return False
    if backend.kernels != "native":
        why = "these kernels round differently when they compute several tokens at once"
        if config.speculation == "on":
            raise ConfigError(f"speculation is 'on', but {why}; use 'auto' or 'off'")
        reasons.append(f"speculation off: {why}")
        return False
    if config.speculation == "auto" and backend.device != "cpu" and not config.draft_model:
        reasons.append("speculation off: on a GPU without a draft model it is on only where asked for ('on')")
        return False
    reasons.append("speculation by prompt lookup: text that repeats is computed several tokens at a time")
    return True
