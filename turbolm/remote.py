"""A model behind an OpenAI-compatible server, with the interface of `AsyncLLM`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import httpx

from turbolm.errors import ConfigError, EngineError, RequestError
from turbolm.events import EventReader, error_message
from turbolm.form import Grammar
from turbolm.types import FinishReason, Output, Part, ReasoningPart, SamplingParams, TextPart, ToolCallPart, Usage

_DEFAULTS = SamplingParams()
_STRUCTURED = {"ebnf": "grammar"}
_RENAMED = {"include_stop": "include_stop_str_in_output"}
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


@dataclass(frozen=True, slots=True)
class RemoteLimits:
    max_context: int  # tokens; 0: the server doesn't say


class RemoteLLM:
    """Chats with one model of the server at `url` (with or without /v1). Asks the server for its models;
    raises ConfigError if it can't be reached or has no model `model`.

    Parameters that differ from the defaults are sent, and those named in `explicit` (here, or with one
    request): for the rest the server's own defaults hold.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        base = url.rstrip("/")
        if not base.startswith(("http://", "https://")):
            raise ConfigError(f"url is '{url}'; give an address such as http://127.0.0.1:8000")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.explicit: Collection[str] = ()
        self.default_params = _DEFAULTS
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.model_name, self.config = self._find(model, headers)
        self._client = httpx.AsyncClient(timeout=httpx.Timeout(10, read=None), headers=headers)

    def _find(self, wanted: str | None, headers: Mapping[str, str]) -> tuple[str, RemoteLimits]:
        try:
            response = httpx.get(f"{self.url}/models", headers=headers, timeout=10)
            if response.status_code >= 400:
                raise ConfigError(f"{self.url}/models answered {response.status_code}: {error_message(response.text)}")
            models = {str(entry["id"]): entry for entry in response.json()["data"]}
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"can't reach a server at {self.url} ({error or type(error).__name__}): is it running?"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{self.url} isn't an OpenAI-compatible server: it doesn't list its models") from None
        name = wanted or next(iter(models), None)
        if name is None or name not in models:
            raise ConfigError(f"the server has no model '{name}'; it serves: {', '.join(models) or 'none'}")
        limit = models[name].get("max_model_len") or 0
        return name, RemoteLimits(limit if isinstance(limit, int) else 0)

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        explicit: Collection[str] = (),
    ) -> AsyncIterator[Output]:
        """Deltas of the answer; closing the iterator hangs up, which cancels. Raises RequestError (refused)
        or EngineError (the server failed or broke off)."""
        body = {
            "model": self.model_name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields(params or _DEFAULTS, {*self.explicit, *explicit}),
        }
        finish: FinishReason | None = None
        usage: Usage | None = None
        try:
            async with self._client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                if response.status_code >= 400:
                    text = error_message((await response.aread()).decode(errors="replace"))
                    kind = RequestError if response.status_code < 500 else EngineError
                    raise kind(f"the server refused ({response.status_code}): {text}")
                async for event in _events(response):
                    usage = _usage(event) or usage
                    for choice in event.get("choices") or ():
                        finish = _finish(choice.get("finish_reason")) or finish
                        parts = tuple(_parts(choice.get("delta") or {}))
                        if parts:
                            yield Output("", parts=parts)
        except httpx.HTTPError as error:
            raise EngineError(f"the connection to {self.url} broke ({error or type(error).__name__})") from None
        if finish is None:
            raise EngineError(f"{self.url} ended the answer without a finish_reason: the server may have stopped")
        yield Output("", finish_reason=finish, usage=usage)

    async def close(self) -> None:
        await self._client.aclose()

    def _fields(self, params: SamplingParams, explicit: Collection[str]) -> dict[str, object]:
        sent: dict[str, object] = {}
        for field in fields(params):
            value = getattr(params, field.name)
            if isinstance(value, Grammar):
                sent |= _grammar_fields(value)
                continue
            if field.name in explicit or value != getattr(_DEFAULTS, field.name):
                sent[_RENAMED.get(field.name, field.name)] = list(value) if isinstance(value, tuple) else value
        return sent


def _grammar_fields(grammar: Grammar) -> dict[str, object]:
    """As OpenAI's API has it, where it does, and as vLLM and turbolm have it."""
    if grammar.kind == "json":
        return {"response_format": {"type": "json_object"}}
    if grammar.kind == "json_schema":
        described = {"name": "answer", "schema": json.loads(grammar.value), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": described}}
    value = list(grammar.value) if grammar.kind == "choice" else grammar.value
    return {"structured_outputs": {_STRUCTURED.get(grammar.kind, grammar.kind): value}}


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    reader = EventReader()
    async for piece in response.aiter_bytes():
        for event in reader.read(piece):
            yield event
        if reader.is_done:
            return


def _parts(delta: Mapping[str, Any]) -> Iterator[Part]:
    reasoning = delta.get("reasoning_content") or delta.get("reasoning")
    if reasoning:
        yield ReasoningPart(str(reasoning))
    if delta.get("content"):
        yield TextPart(str(delta["content"]))
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        yield ToolCallPart(
            call.get("index") or 0, function.get("arguments") or "", call.get("id"), function.get("name")
        )


def _finish(reason: object) -> FinishReason | None:
    return _FINISH.get(str(reason), "stop") if reason else None


def _usage(event: Mapping[str, Any]) -> Usage | None:
    usage = event.get("usage")
    if not isinstance(usage, dict):
        return None
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
