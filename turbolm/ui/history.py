"""A conversation as the page holds it: rows of Gradio's chatbot, from and to what engines know.

A row is `{"role", "content", "metadata"}`; its content is a list of pieces, since Gradio dedents a bare
string. Rows with a title (reasoning, tool calls) are shown folded. They and notes (errors, stops) are no
part of what the model reads.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turbolm.errors import RequestError
from turbolm.types import Part, ReasoningPart, TextPart

Row = dict[str, Any]
_NOTE = "note"  # id of rows about the conversation


def text_of(row: Mapping[str, Any]) -> str:
    """What a row says. RequestError for files, which these models can't read."""
    content = row["content"]
    if isinstance(content, str):
        return content
    for piece in content:
        if not isinstance(piece, str) and piece.get("type") != "text":
            raise RequestError("a message holds a file; this page takes text only", "messages")
    return "".join(piece if isinstance(piece, str) else piece["text"] for piece in content)


def to_messages(rows: Sequence[Mapping[str, Any]], system: str = "") -> list[dict[str, str]]:
    """The rows as OpenAI-style messages, the last of them a question. A question without an answer
    is left out, since roles have to alternate."""
    turns: list[dict[str, str]] = []
    for row in rows:
        metadata = row.get("metadata") or {}
        if metadata.get("title") or metadata.get("id") == _NOTE:
            continue
        message = {"role": str(row["role"]), "content": text_of(row)}
        if turns and turns[-1]["role"] == message["role"] == "assistant":
            turns[-1]["content"] += message["content"]
        elif turns and turns[-1]["role"] == message["role"]:
            turns[-1] = message
        else:
            turns.append(message)
    head = [{"role": "system", "content": system}] if system.strip() else []
    return [*head, *turns]


def question(text: str) -> Row:
    return _row("user", text)


def note(title: str, text: str = "") -> Row:
    """A row about the conversation, not of it: an error, a stop."""
    return _row("assistant", f"**{title}** {html.escape(text)}", id=_NOTE)


def answer_rows(parts: Iterable[Part], seconds: float, is_over: bool) -> list[Row]:
    """What has come of an answer; `seconds`: how long the model has thought, shown with its reasoning."""
    rows: list[Row] = []
    items = list(parts)
    for position, part in enumerate(items):
        if isinstance(part, TextPart):
            if part.text.strip():
                rows.append(_row("assistant", part.text))
        elif isinstance(part, ReasoningPart):
            is_growing = position == len(items) - 1 and not is_over
            if part.text.strip():
                rows.append(_reasoning(part.text, seconds, is_growing))
        else:
            call = f"```json\n{part.arguments}\n```"
            rows.append(_row("assistant", call, title=f"Calls {part.name or 'a tool'}", status="done"))
    return rows


def settled(rows: Sequence[Row]) -> list[Row]:
    """The rows after an answer was stopped: nothing is left pending."""
    done = []
    for row in rows:
        metadata = row.get("metadata") or {}
        done.append({**row, "metadata": {**metadata, "status": "done"}} if metadata.get("status") else row)
    if done and done[-1]["role"] == "user":
        done.append(note("Stopped before the first word."))
    return done


def _reasoning(text: str, seconds: float, is_growing: bool) -> Row:
    if is_growing:
        return _row("assistant", text, title="Thinking", status="pending")
    return _row("assistant", text, title="Thoughts", status="done", duration=round(seconds, 1))


def _row(role: str, text: str, **metadata: object) -> Row:
    return {"role": role, "content": [{"type": "text", "text": text}], "metadata": metadata or None}
