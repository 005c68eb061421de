"""The sampling parameters that the page offers, made from `SamplingParams`: one definition, one help text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turbolm.errors import RequestError
from turbolm.fields import field_help
from turbolm.types import SamplingParams

NAMES = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop",
)  # fmt: skip
_WHOLE = ("max_tokens", "top_k", "seed")


@dataclass(frozen=True, slots=True)
class Control:
    """One text field of the form. Empty stands for what the model, or the server, recommends."""

    name: str
    explanation: str
    placeholder: str
    value: str  # at first


def controls(recommended: SamplingParams | None, given: Mapping[str, object]) -> list[Control]:
    """The form's fields in order. `recommended`: what holds for an empty field, None where a server decides;
    `given`: what stands in the fields at first."""
    texts = field_help(SamplingParams)
    return [
        Control(
            name=name,
            explanation=texts[name] + (" One per line." if name == "stop" else ""),
            placeholder="as the server says" if recommended is None else _shown(name, getattr(recommended, name)),
            value=_shown(name, given[name]) if name in given else "",
        )
        for name in NAMES
    ]


def read(values: Sequence[object]) -> dict[str, object]:
    """The fields of the form that were filled in, by name. RequestError for what isn't a number."""
    texts = {name: "" if value is None else str(value) for name, value in zip(NAMES, values, strict=True)}
    return {name: _parse(name, text) for name, text in texts.items() if text.strip()}


def _parse(name: str, text: str) -> object:
    if name == "stop":
        return tuple(line for line in text.split("\n") if line)
    try:
        return int(text) if name in _WHOLE else float(text)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number such as 0.5"
        raise RequestError(f"{name} is '{text.strip()[:40]}'; give {kind}, or nothing", name) from None


def _shown(name: str, value: object) -> str:
    """As it stands in a field."""
    if value is None or value == ():
        return {"max_tokens": "no limit", "seed": "random"}.get(name, "none")
    if isinstance(value, tuple):
        return "\n".join(value)
    return str(value)
