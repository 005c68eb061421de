"""The user's questions: JSON lines, read strictly. Every problem is reported with its line number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError, UserError, nearest
from turbolm.eval.checks import Check, DataError, read_check

_EXAMPLES = Path(__file__).with_name("examples")
#: Names that stand for questions shipped with turbolm; "examples/similarity" needs further packages.
EXAMPLES = {
    "examples": _EXAMPLES / "examples.jsonl",
    "examples/tasks": _EXAMPLES / "tasks.jsonl",
    "examples/similarity": _EXAMPLES / "similarity.jsonl",
}
_ROLES = ("system", "user", "assistant", "tool", "developer")
_FIELDS = (
    *("id", "messages", "prompt", "text", "reference", "choices", "check", "schema"),
    *("tools", "max_tokens", "group"),
)
_MAX_SHOWN = 20  # problems in one message


@dataclass(frozen=True, slots=True)
class Item:
    """One question (`messages` or `prompt`), or one text whose perplexity is measured."""

    id: str
    line: int  # in its file, from 1; 0: made by a probe
    group: str = "data"
    """Items of a group are scored together; those of probes have the probe's name."""
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | None = None
    """Continued as it stands, without a chat template."""
    text: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    check: Check | None = None
    max_tokens: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """As given."""

    @property
    def key(self) -> str:
        """A hash of all that its answer and its score depend on."""
        content = {name: value for name, value in self.fields.items() if name not in ("id", "group")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def is_probe(self) -> bool:
        return not self.line

    @property
    def question(self) -> str:
        """What is asked, for people."""
        if self.messages:
            return "\n".join(f"{message['role']}: {_content(message)}" for message in self.messages)
        return self.prompt or self.text or ""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why an item can't be used."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}" if self.line else self.message


def read_items(data: str | Path, *, allow_code: bool = False) -> tuple[list[Item], list[Problem]]:
    """The items of a file of JSON lines ("examples": those shipped with turbolm), and the lines that are none.
    ConfigError where there is no such file, or nothing in it."""
    path = data_path(data)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"can't read the data file {path}: {error.strerror}; --data takes a .jsonl file") from None
    items: list[Item] = []
    problems: list[Problem] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = read_item(_parse(line), number, allow_code=allow_code)
            if item.id in lines_of:
                raise DataError(f"the id '{item.id}' is that of line {lines_of[item.id]}, too; give each item its own")
        except DataError as error:
            problems.append(Problem(number, str(error)))
            continue
        lines_of[item.id] = number
        items.append(item)
    if not items and not problems:
        raise ConfigError(
            f"the data file {path} is empty; it takes one JSON object a line, with 'messages' or 'prompt'"
        )
    return items, problems


def keeps_going(data: str | None) -> bool:
    """Of the shipped questions those that a model has no place for are left out: they aren't the user's to mend."""
    return data in EXAMPLES


def data_path(data: str | Path) -> Path:
    return EXAMPLES.get(str(data)) or Path(data).expanduser()


def report_problems(problems: Sequence[Problem], *, keep_going: bool) -> None:
    """UserError that lists the problems, unless `keep_going`."""
    if not problems or keep_going:
        return
    shown = [f"  {problem}" for problem in problems[:_MAX_SHOWN]]
    if len(problems) > _MAX_SHOWN:
        shown.append(f"  and {len(problems) - _MAX_SHOWN} more")
    raise UserError(
        f"{len(problems)} items of the data can't be used; mend them, or leave them out with --keep-going:\n"
        + "\n".join(shown)
    )


def read_item(fields: Mapping[str, Any], line: int, *, group: str = "data", allow_code: bool = False) -> Item:
    """DataError where the fields are no item."""
    for name in fields:
        if name not in _FIELDS:
            raise DataError(f"unknown field '{name}'.{nearest(name, _FIELDS)} Known: {', '.join(_FIELDS)}")
    given = [name for name in ("messages", "prompt", "text") if fields.get(name) is not None]
    if len(given) != 1:
        raise DataError(f"give one of 'messages', 'prompt' and 'text'; this has {' and '.join(given) or 'none'}")
    for name, kind in (("prompt", str), ("text", str), ("id", (str, int)), ("group", str), ("tools", list)):
        if fields.get(name) is not None and (not isinstance(fields[name], kind) or fields[name] in ("", [])):
            raise DataError(f"'{name}' must be a non-empty {'list' if kind is list else 'text'}, got {fields[name]!r}")
    max_tokens = fields.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise DataError(f"'max_tokens' must be a whole number, 1 or more, got {max_tokens!r}")
    check = read_check(fields, allow_code=allow_code)
    if check is not None and fields.get("text") is not None:
        raise DataError("a 'text' has no answer that could be checked; use 'prompt' or 'messages'")
    return Item(
        id=str(fields.get("id", f"line {line}")),
        line=line,
        group=fields.get("group") or group,
        messages=_messages(fields.get("messages")),
        prompt=fields.get("prompt"),
        text=fields.get("text"),
        tools=tuple(_tools(fields.get("tools") or ())),
        check=check,
        max_tokens=max_tokens,
        fields=dict(fields),
    )


def _parse(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"a JSON object is wanted, with 'messages' or 'prompt'; got {type(value).__name__}")
    return value


def _messages(messages: object) -> tuple[Mapping[str, Any], ...]:
    if messages is None:
        return ()
    if not isinstance(messages, list) or not messages:
        raise DataError('\'messages\' must be a non-empty list of {"role": …, "content": …}')
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise DataError(f"message {number} has the role {role!r}; allowed: {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"message {number} has no 'content' that is a text")
    if messages[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's: nothing is left to answer; make it the 'reference'")
    return tuple(messages)


def _tools(tools: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f'tool {number} must be {{"type": "function", "function": {{"name": …, "parameters": …}}}}')
    return tools


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else json.dumps(message.get("tool_calls"), ensure_ascii=False)
