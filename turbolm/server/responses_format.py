"""What /v1/responses sends: OpenAI's response object, and the events of its growth."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from turbolm.server.answer import Answer
from turbolm.server.failures import ApiError, to_json
from turbolm.server.items import Change, Item, Items
from turbolm.server.responses_schema import ResponsesBody
from turbolm.types import Output, Usage

Keep = Callable[[dict[str, Any], Sequence[Item]], None]


class ResponsesFormat:
    def __init__(self, body: ResponsesBody, model: str, keep: Keep | None) -> None:
        """`keep` takes the whole response, to store it."""
        self.identity = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._keep = keep
        self._echo = _echo(body, model, is_stored=keep is not None)
        self._items = Items(one_call=body.parallel_tool_calls is False)
        self._num_events = 0
        self._final: Output | None = None

    def chunk(self, _: int, answer: Answer) -> bytes:
        events = []
        if not self._num_events:
            started = self._response("in_progress", [])
            events = [self._event(f"response.{name}", response=started) for name in ("created", "in_progress")]
        events += self._events(self._items.take(answer.parts))
        if answer.final is not None:
            self._final = answer.final
            events += self._events(self._items.finish())
        return b"".join(events)

    def ending(self, usage: Usage) -> bytes:
        response = self._ended(self._final, usage)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        response = self._response("failed", [_whole(item) for item in self._items.all])
        response["error"] = {"code": "server_error", "message": str(error)}
        return self._event("response.failed", response=response)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        self._items.collect(answers[0].parts)
        return self._ended(answers[0].final, usage)

    def _ended(self, final: Output | None, usage: Usage) -> dict[str, Any]:
        is_cut = final is not None and final.finish_reason == "length"
        items = [_whole(item) for item in self._items.all]
        if is_cut and items:
            items[-1]["status"] = "incomplete"
        response = self._response("incomplete" if is_cut else "completed", items)
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": None,
            "total_tokens": usage.total_tokens,
        }
        if self._keep is not None:
            self._keep(response, self._items.all)
        return response

    def _response(self, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": items,
            "usage": None,
            **self._echo,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return (
            f"event: {kind}\ndata: ".encode() + to_json({"type": kind, "sequence_number": number, **fields}) + b"\n\n"
        )

    def _events(self, changes: Iterable[tuple[Change, Item, str]]) -> list[bytes]:
        events = []
        for change, item, text in changes:
            place = {"item_id": _item_id(item), "output_index": item.index}
            if item.kind != "call":
                place["content_index"] = 0
            if change == "begin":
                events += self._begin(item, place)
            elif change == "grow":
                events.append(self._event(f"response.{_TEXTS[item.kind]}.delta", **place, delta=text, **_extra(item)))
            else:
                events += self._end(item, place)
        return events

    def _begin(self, item: Item, place: dict[str, Any]) -> list[bytes]:
        shown = _shown(item, "", "in_progress")
        if item.kind != "call":
            shown["content"] = []
        events = [self._event("response.output_item.added", output_index=item.index, item=shown)]
        if item.kind != "call":
            events.append(self._event("response.content_part.added", **place, part=_part(item, "")))
        return events

    def _end(self, item: Item, place: dict[str, Any]) -> list[bytes]:
        done = f"response.{_TEXTS[item.kind]}.done"
        if item.kind == "call":
            events = [self._event(done, **place, name=item.name, arguments=item.text)]
        else:
            events = [
                self._event(done, **place, text=item.text, **_extra(item)),
                self._event("response.content_part.done", **place, part=_part(item, item.text)),
            ]
        return [*events, self._event("response.output_item.done", output_index=item.index, item=_whole(item))]


_TEXTS = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}


def call_id(item: Item) -> str:
    return f"call_{item.id}"


def _item_id(item: Item) -> str:
    return f"{_PREFIXES[item.kind]}_{item.id}"


def _extra(item: Item) -> dict[str, Any]:
    return {"logprobs": []} if item.kind == "text" else {}


def _part(item: Item, text: str) -> dict[str, Any]:
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _whole(item: Item) -> dict[str, Any]:
    return _shown(item, item.text, "completed")


def _shown(item: Item, text: str, status: str) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": _item_id(item), "status": status}
    if item.kind == "call":
        return shown | {"type": "function_call", "call_id": call_id(item), "name": item.name, "arguments": text}
    if item.kind == "reasoning":
        return shown | {"type": "reasoning", "summary": [], "content": [_part(item, text)]}
    return shown | {"type": "message", "role": "assistant", "content": [_part(item, text)]}


def _echo(body: ResponsesBody, model: str, *, is_stored: bool) -> dict[str, Any]:
    """The request's fields, as the response repeats them."""
    given = body.model_dump(by_alias=True, exclude_none=True)
    names = (
        "instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key", "reasoning",
        "safety_identifier", "temperature", "top_p", "user",
    )  # fmt: skip
    return {name: given.get(name) for name in names} | {
        "background": False,
        "metadata": given.get("metadata", {}),
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "service_tier": "default",
        "store": is_stored,
        "text": given.get("text") or {"format": {"type": "text"}},
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": 0,
        "truncation": "disabled",
    }
