"""What a model answered to an item, and what it scored: kept once, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbolm.eval.checks import ToolCall


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a changed model's distribution follows the base's along the base's answer."""

    kl: float
    """Mean Kullback-Leibler divergence from the base per token, in nats; a lower bound of it, since all tokens
    beyond the likeliest are counted as one."""
    top1: float
    """The part of the tokens where both find the same token likeliest."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str = ""  # of a choice: the likeliest one
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    finish_reason: str = ""
    score: float | None = None  # of its check, 0 to 1; None: it has none
    note: str = ""  # why it scored so
    log_likelihoods: tuple[float, ...] = ()  # of the choices; or of a text, per token
    agreement: Agreement | None = None  # with the base
    error: str | None = None  # the engine's, for this item alone

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Answer:
        fields: dict[str, Any] = json.loads(text)
        agreement: Mapping[str, float] | None = fields["agreement"]
        return cls(
            **{
                **fields,
                "tool_calls": tuple(ToolCall(*call) for call in fields["tool_calls"]),
                "token_ids": tuple(fields["token_ids"]),
                "log_likelihoods": tuple(fields["log_likelihoods"]),
                "agreement": Agreement(**agreement) if agreement else None,
            }
        )

    @property
    def shown(self) -> str:
        """Text and tool calls, for people."""
        calls = [f"{call.name}({call.arguments})" for call in self.tool_calls]
        return "\n".join([*([self.text] if self.text else []), *calls]) or (
            f"error: {self.error}" if self.error else ""
        )


@dataclass(frozen=True, slots=True)
class Distributions:
    """The likeliest k tokens at each of t positions, likeliest first."""

    token_ids: NDArray[np.int32]  # [t, k]
    logprobs: NDArray[np.float32]  # [t, k]

    def to_bytes(self) -> bytes:
        """t and k as int32, then both arrays."""
        shape = np.array(self.token_ids.shape, np.int32)
        return shape.tobytes() + self.token_ids.tobytes() + self.logprobs.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Distributions:
        t, k = (int(size) for size in np.frombuffer(data, np.int32, 2))
        token_ids = np.frombuffer(data, np.int32, t * k, 8).reshape(t, k)
        return cls(token_ids, np.frombuffer(data, np.float32, t * k, 8 + 4 * t * k).reshape(t, k))
