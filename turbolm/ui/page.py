"""The page: Gradio's own components, and what happens when they are used."""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable
from pathlib import PurePath
from typing import Any

import gradio as gr
from gradio.components import Component

from turbolm.ui.chat import Chat
from turbolm.ui.controls import Control
from turbolm.ui.history import Row, question, settled, text_of

_LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


def build_page(chat: Chat, system: str = "") -> gr.Blocks:
    """The page for `chat`; `system` stands in the field for the system prompt at first."""
    model = PurePath(chat.engine.model_name).name  # a page doesn't tell where files lie
    name = html.escape(model)
    page = gr.Blocks(title=f"{model} · turbolm", analytics_enabled=False, fill_height=True)
    with page:
        with gr.Sidebar(label="Settings", open=False, position="right", width=340):
            prompt = gr.Textbox(
                system, label="system prompt", info="Said to the model before the conversation.", lines=3, max_lines=12
            )
            gr.Markdown("**Sampling.** What is left empty is as the model recommends (in grey).")
            fields = [_field(control) for control in chat.form()]
        chatbot = gr.Chatbot(
            label=name, height="70vh", scale=1, editable="user", layout="bubble", buttons=["copy", "copy_all"],
            latex_delimiters=_LATEX, feedback_options=None,
            placeholder=f"### {name}\nAsk it something.", allow_file_downloads=False,
        )  # fmt: skip
        status = gr.Markdown("", container=False, elem_id="status")
        box = gr.Textbox(
            placeholder="Message", show_label=False, autofocus=True, submit_btn=True, stop_btn=False, max_lines=8,
            elem_id="message",
        )  # fmt: skip
        _wire(chat, chatbot, status, box, [prompt, *fields])
    page.queue(default_concurrency_limit=None)
    return page


def _field(control: Control) -> gr.Textbox:
    # Not gr.Number: an empty one arrives as 0.
    return gr.Textbox(
        control.value, label=control.name.replace("_", " "), info=control.explanation,
        placeholder=control.placeholder, max_lines=4 if control.name == "stop" else 1,
    )  # fmt: skip


def _wire(chat: Chat, chatbot: gr.Chatbot, status: gr.Markdown, box: gr.Textbox, settings: list[Component]) -> None:
    """Every way to ask (send, retry, edit) first changes the conversation, then has it answered."""
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}

    async def answer(rows: list[Row], system: str, *values: object) -> AsyncIterator[tuple[list[Row], str]]:
        async for update in chat.answer(rows, system, values):
            yield update

    answers = []
    for event, change, inputs in (
        (box.submit, _send, [box, chatbot]),
        (chatbot.retry, _retry, [chatbot]),
        (chatbot.edit, _edit, [chatbot]),
    ):
        listen: Callable[..., Any] = event
        asked = listen(change, inputs, [chatbot, box, status], **quick)
        named = {"api_name": "answer"} if change is _send else {"api_visibility": "private"}
        answered = asked.success(
            answer,
            [chatbot, *settings],
            [chatbot, status],
            show_progress="hidden",
            **named,
        )
        answered.then(_ready, None, box, **quick)
        answers.append(answered)
    box.stop(None, None, None, cancels=answers, **quick).then(
        _stopped, [chatbot, status], [chatbot, status, box], **quick
    )
    chatbot.undo(_undo, [chatbot], [chatbot, box, status], cancels=answers, **quick)
    chatbot.clear(lambda: ([], _ready(), ""), None, [chatbot, box, status], cancels=answers, **quick)


def _ready() -> gr.Textbox:
    return gr.Textbox(submit_btn=True, stop_btn=False, interactive=True)


def _busy(**changes: Any) -> gr.Textbox:
    return gr.Textbox(submit_btn=False, stop_btn=True, interactive=False, **changes)


def _send(text: str, rows: list[Row]) -> tuple[list[Row], gr.Textbox, str]:
    if not text.strip():
        return rows, _ready(), ""  # no question, so there is nothing to answer
    return [*rows, question(text)], _busy(value=""), "reading…"


def _retry(rows: list[Row], event: gr.RetryData) -> tuple[list[Row], gr.Textbox, str]:
    return rows[: _position(event.index) + 1], _busy(), "reading…"


def _edit(rows: list[Row], event: gr.EditData) -> tuple[list[Row], gr.Textbox, str]:
    return [*rows[: _position(event.index)], question(str(event.value))], _busy(), "reading…"


def _undo(rows: list[Row], event: gr.UndoData) -> tuple[list[Row], gr.Textbox, str]:
    """Takes the last question back into the box."""
    position = _position(event.index)
    return rows[:position], gr.Textbox(text_of(rows[position]), submit_btn=True, stop_btn=False, interactive=True), ""


def _stopped(rows: list[Row], status: str) -> tuple[list[Row], str, gr.Textbox]:
    return settled(rows), f"{status} — stopped", _ready()


def _position(index: int | tuple[int, int]) -> int:
    """Which row an event is about."""
    return index if isinstance(index, int) else index[0]
