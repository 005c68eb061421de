"""A conversation: its messages and sampling parameters, saved and loaded as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from turbolm.errors import RequestError, UserError, nearest
from turbolm.types import SamplingParams

#: Fields of SamplingParams that make no sense for one conversation in a terminal.
OMITTED = ("n", "logit_bias", "logprobs", "prompt_logprobs", "grammar")
PARAMETERS = tuple(field.name for field in fields(SamplingParams) if field.name not in OMITTED)
#: For models that recommend nothing.
CHAT_DEFAULTS = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.05)


class Conversation:
    """What was said, and how the next answer is sampled: `base`, changed by what the user has `given`."""

    def __init__(self, base: SamplingParams, given: Mapping[str, object], system: str | None = None) -> None:
        self.base = base
        self.given = dict(given)
        self.params = SamplingParams.of(base, **self.given)
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.reasoning = ""  # of the last answer; not part of the messages

    @property
    def messages(self) -> list[dict[str, str]]:
        """OpenAI-style: the system prompt, if any, then the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def ask(self, text: str) -> None:
        self.turns.append({"role": "user", "content": text})

    def keep(self, text: str) -> None:
        """Keeps an answer; a question without one is forgotten, since roles have to alternate."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        elif self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def reset(self) -> None:
        self.turns.clear()

    def set_params(self, assignments: Sequence[str]) -> None:
        """`temperature=0.5`, `stop='["a", "b"]'`, `seed=none`. All or nothing; RequestError for bad ones."""
        changed = dict(self.given)
        for assignment in assignments:
            name, sign, value = assignment.partition("=")
            name = name.strip().replace("-", "_")
            if not sign:
                raise RequestError(f"'{assignment}' isn't name=value, such as temperature=0.5", name)
            if name not in PARAMETERS:
                raise RequestError(
                    f"unknown parameter '{name}'.{nearest(name, PARAMETERS)} Known: {', '.join(PARAMETERS)}", name
                )
            changed[name] = _value(value.strip())
        self._give(changed)

    def _give(self, given: Mapping[str, object]) -> None:
        self.params = SamplingParams.of(self.base, **given)
        self.given.clear()  # in place: others look at it
        self.given.update(given)

    def save(self, path: Path) -> None:
        """Writes messages and parameters. UserError if the file can't be written."""
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in self.given.items()}
        text = json.dumps({"messages": self.messages, "params": given}, ensure_ascii=False, indent=1)
        try:
            path.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"can't write {path}: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Takes over what `save` wrote. UserError if the file isn't there or isn't a conversation."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{path} isn't a saved conversation: not JSON") from None
        messages = saved.get("messages") if isinstance(saved, dict) else None
        params = saved.get("params", {}) if isinstance(saved, dict) else {}
        if not isinstance(messages, list) or not all(map(_is_message, messages)) or not isinstance(params, dict):
            raise UserError(
                f"{path} isn't a saved conversation: it needs 'messages', a list of objects with the texts 'role' "
                "(system, user or assistant) and 'content'"
            )
        self._give(params)
        system = [message["content"] for message in messages if message["role"] == "system"]
        self.system = "\n".join(system) or None
        self.turns = [dict(message) for message in messages if message["role"] != "system"]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
    )


def _value(text: str) -> object:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value
