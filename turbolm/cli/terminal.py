"""The interactive chat: a prompt with history and commands, answers that can be stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style
from rich.console import Console

from turbolm.answer import Answer, ChatEngine
from turbolm.cli.commands import CommandCompleter, run_command
from turbolm.cli.conversation import Conversation
from turbolm.cli.plain_view import PlainView, stream_answer
from turbolm.cli.view import MarkdownView
from turbolm.env import cache_folder
from turbolm.errors import ContextOverflowError, TurbolmError

_STYLE = Style.from_dict({"prompt": "bold ansigreen", "bottom-toolbar": "noreverse fg:ansibrightblack"})


class Terminal:
    """A conversation between a person at a terminal and `engine`. `plain`: no markdown, no redrawing."""

    def __init__(self, engine: ChatEngine, conversation: Conversation, *, plain: bool) -> None:
        self._engine = engine
        self._conversation = conversation
        self._plain = plain
        self._last: Answer | None = None
        self._console = Console(highlight=False, markup=False, emoji=False, soft_wrap=plain)
        self._session: PromptSession[str] = PromptSession(
            [("class:prompt", "› ")],
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="  ",
            bottom_toolbar=None if plain else self._toolbar,
            style=_STYLE,
            history=_history(),
            completer=CommandCompleter(),
            complete_while_typing=Condition(lambda: self._session.default_buffer.text.startswith("/")),
            reserve_space_for_menu=6,
        )

    async def run(self) -> None:
        """Until /exit or ctrl-D."""
        with _no_echo():
            await self._converse()

    async def _converse(self) -> None:
        while True:
            try:
                text = (await self._session.prompt_async()).strip()
                if text.startswith("/"):
                    run_command(text, self._conversation, self._say)
                elif text:
                    await self._ask(text)
            except KeyboardInterrupt:
                continue  # at the prompt: what was typed is dropped, as in a shell
            except EOFError:
                return
            except TurbolmError as error:
                self._say(f"{error}")

    async def _ask(self, text: str) -> None:
        """One question and its answer. Ctrl-C keeps the part of the answer that came."""
        answer, note = Answer(), None
        self._conversation.ask(text)
        view: MarkdownView | PlainView = PlainView() if self._plain else MarkdownView()
        task = asyncio.ensure_future(stream_answer(self._engine, self._conversation, answer, view))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
            note = answer.ending(self._engine.config.max_context)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # it wasn't ctrl-C
            note = "stopped"
        except ContextOverflowError:
            limit = self._engine.config.max_context
            note = f"the conversation no longer fits the context of {limit} tokens: /reset begins a new one"
        except TurbolmError as error:
            note = str(error)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            self._conversation.keep(answer.text)
            self._conversation.reasoning = answer.reasoning
            view.finish(answer, note)
        if answer.parts:
            self._last = answer

    def _say(self, text: str) -> None:
        self._console.print(text, style=None if self._plain else "dim")

    def _toolbar(self) -> str:
        words = [self._engine.model_name]
        if self._last:
            words.append(self._last.statistics(self._engine.config.max_context))
        elif self._engine.config.max_context:
            words.append(f"context of {self._engine.config.max_context} tokens")
        return " · ".join(words)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history() -> History:
    """What was typed before; in memory only where the cache folder can't be written."""
    path = cache_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # it may hold secrets
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)


@contextlib.contextmanager
def _no_echo() -> Iterator[None]:
    """Keys pressed during an answer don't show up in it; they wait for the next prompt. (The prompt itself
    has the terminal in raw mode and draws what is typed.)"""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
