"""The chat's slash commands, and their completion."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from turbolm.cli.conversation import PARAMETERS, Conversation
from turbolm.errors import UserError, nearest

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Command:
    """`run(conversation, argument, say)`; `usage` is what follows the name."""

    usage: str
    about: str
    run: Callable[[Conversation, str, Say], None]


def run_command(line: str, conversation: Conversation, say: Say) -> None:
    """Runs `/name argument`. UserError for an unknown name or a bad argument."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise UserError(f"unknown command {name}.{nearest(name, COMMANDS)} /help lists them")
    command.run(conversation, argument.strip(), say)


def _help(_conversation: Conversation, _argument: str, say: Say) -> None:
    width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items()) + 2
    for name, command in COMMANDS.items():
        say(f"{f'{name} {command.usage}':<{width}}{command.about}")
    say("Enter sends; Alt-Enter (or Esc, Enter) begins a new line; ctrl-C stops an answer; ctrl-D leaves.")


def _reset(conversation: Conversation, _argument: str, say: Say) -> None:
    conversation.reset()
    say("a new conversation" + (", with the same system prompt" if conversation.system else ""))


def _system(conversation: Conversation, argument: str, say: Say) -> None:
    if argument:
        conversation.system = None if argument == "none" else argument
    say(f"system prompt: {conversation.system or 'none'}")


def _params(conversation: Conversation, argument: str, say: Say) -> None:
    try:
        assignments = shlex.split(argument)
    except ValueError as error:
        raise UserError(f"can't read the parameters: {error}") from None
    if assignments:
        conversation.set_params(assignments)
    say(", ".join(f"{name}={getattr(conversation.params, name)!r}" for name in PARAMETERS))


def _save(conversation: Conversation, argument: str, say: Say) -> None:
    path = _path(argument, "save")
    conversation.save(path)
    say(f"saved {len(conversation.turns)} messages to {path}")


def _load(conversation: Conversation, argument: str, say: Say) -> None:
    path = _path(argument, "load")
    conversation.load(path)
    say(f"loaded {len(conversation.turns)} messages from {path}")


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise UserError(f"name a file: /{command} FILE")
    return Path(argument).expanduser()


def _reasoning(conversation: Conversation, _argument: str, say: Say) -> None:
    say(conversation.reasoning.strip() or "the last answer has no reasoning")


def _exit(_conversation: Conversation, _argument: str, _say: Say) -> None:
    raise EOFError


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/reset": Command("", "forget the conversation", _reset),
    "/system": Command("[TEXT]", "show or set the system prompt; 'none' removes it", _system),
    "/params": Command("[NAME=VALUE …]", "show or set sampling parameters", _params),
    "/reasoning": Command("", "show how the model came to its last answer", _reasoning),
    "/save": Command("FILE", "write the conversation to a JSON file", _save),
    "/load": Command("FILE", "take up a saved conversation", _load),
    "/exit": Command("", "leave", _exit),
}


class CommandCompleter(Completer):
    """Completes command names, parameter names and paths; nothing in ordinary text."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for known, command in COMMANDS.items():
                if known.startswith(name):
                    yield Completion(known, -len(name), display_meta=command.about)
        elif name in ("/save", "/load"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name == "/params":
            word = argument.rpartition(" ")[2]
            yield from (Completion(f"{known}=", -len(word)) for known in PARAMETERS if known.startswith(word))
