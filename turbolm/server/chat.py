"""POST /v1/chat/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from json.encoder import encode_basestring as quote  # JSON of a string, non-ASCII as it is
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from turbolm.delivery import Answers
from turbolm.errors import RequestError
from turbolm.server.answer import Answer, chat_logprobs
from turbolm.server.body import read_body
from turbolm.server.conversation import check_messages
from turbolm.server.exchange import Record
from turbolm.server.failures import ApiError, to_json
from turbolm.server.schema import ChatBody, NamedTool
from turbolm.server.service import Service
from turbolm.server.stream import DONE, AnswerResponse, error_event, usage_object
from turbolm.text import Tokenizer
from turbolm.text.parser import choose_tool_format
from turbolm.types import Usage


class ChatFormat:
    """OpenAI's chat completion objects. Of a chunk, all but the delta is made once per answer."""

    def __init__(
        self, identity: str, model: str, tokenizer: Tokenizer, *, logprobs: bool, usage: bool, one_call: bool
    ) -> None:
        """`logprobs`, `usage`: whether the request asks for them; `one_call`: further tool calls are left out."""
        self._identity = identity
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._one_call = one_call
        self._heads: dict[int, str] = {}
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"

    def chunk(self, choice: int, answer: Answer) -> bytes:
        head = self._heads.get(choice)
        events = ""
        if head is None:
            head = self._heads[choice] = self._head(choice)
            events = self._event(head, '"role":"assistant","content":""', "null", "null")
        logprobs = "null"
        if answer.logprobs:
            logprobs = to_json(chat_logprobs(self._tokenizer, answer.logprobs)).decode()
        delta = self._delta(answer)
        if delta or answer.logprobs:
            events += self._event(head, delta, logprobs, "null")
        if answer.final is not None:
            events += self._event(head, "", "null", f'"{answer.final.finish_reason}"')
        return events.encode()

    def ending(self, usage: Usage) -> bytes:
        if not self._usage:
            return DONE
        body = self._object("chat.completion.chunk") | {"choices": [], "usage": usage_object(usage)}
        return b"data: " + to_json(body) + b"\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._object("chat.completion") | {"choices": choices, "usage": usage_object(usage)}

    def _object(self, kind: str) -> dict[str, Any]:
        return {"id": self._identity, "object": kind, "created": self._created, "model": self._model}

    def _head(self, choice: int) -> str:
        start = to_json(self._object("chat.completion.chunk")).decode()[:-1]
        return f'data: {start},"choices":[{{"index":{choice},"delta":{{'

    def _event(self, head: str, delta: str, logprobs: str, reason: str) -> str:
        return f'{head}{delta}}},"logprobs":{logprobs},"finish_reason":{reason}}}]{self._tail}'

    def _delta(self, answer: Answer) -> str:
        text = answer.text
        if text and not answer.calls:
            reasoning = answer.reasoning
            return (
                f'"reasoning_content":{quote(reasoning)},"content":{quote(text)}'
                if reasoning
                else f'"content":{quote(text)}'
            )
        fields = []
        if reasoning := answer.reasoning:
            fields.append(f'"reasoning_content":{quote(reasoning)}')
        if text:
            fields.append(f'"content":{quote(text)}')
        if calls := self._calls(answer, is_delta=True):
            fields.append(f'"tool_calls":{to_json(calls).decode()}')
        return ",".join(fields)

    def _calls(self, answer: Answer, is_delta: bool) -> list[dict[str, Any]]:
        calls = []
        for part in answer.calls:
            if self._one_call and part.index > 0:
                continue
            function: dict[str, Any] = {"arguments": part.arguments}
            call: dict[str, Any] = {"index": part.index} if is_delta else {}
            if part.name is not None:
                function = {"name": part.name, **function}
                call |= {"id": part.id, "type": "function"}
            calls.append(call | {"function": function})
        return calls

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        text, reasoning, calls = answer.text, answer.reasoning, self._calls(answer, is_delta=False)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, answer.logprobs) if self._logprobs else None,
            "finish_reason": answer.final.finish_reason if answer.final else None,
        }


async def chat(request: Request) -> Response:
    """Answers a conversation."""
    service: Service = request.app.state.service
    record: Record = request.scope["record"]
    body, data = await read_body(request, ChatBody, service.config.max_body_bytes)
    record.details |= body.model_dump(include={"user", "metadata", "safety_identifier"}, exclude_none=True)
    if service.config.log_prompts:
        record.details["body"] = data.decode("utf-8", "replace")
    adapter = service.find_model(body.model)
    body.check_stream()
    source, num_answers = await submit(service, body, adapter)
    form = ChatFormat(
        f"chatcmpl-{uuid.uuid4().hex}",
        adapter or service.name,
        service.llm.tokenizer,
        logprobs=bool(body.logprobs),
        usage=body.includes_usage,
        one_call=body.parallel_tool_calls is False,
    )
    return AnswerResponse(partial(service.exchange, [source], num_answers, record), form, bool(body.stream))


async def submit(service: Service, body: ChatBody, adapter: str | None) -> tuple[Answers, int]:
    """The answers that a conversation asks for of an adapter, or of the model, which begin when they are read, and
    their number. Raises ApiError or RequestError."""
    check_messages(body.messages, service.config.max_messages, service.llm.chat_template)
    tools = chat_tools(body, service)
    params = body.sampling(service.llm.default_params, body.num_logprobs, **body.length_limit)
    if params.n > service.config.max_answers:
        raise RequestError(f"n is {params.n}; this server allows {service.config.max_answers}", "n")
    source = await service.chat(
        body.messages,
        params=params,
        tools=tools,
        tool_choice=body.tool_choice.model_dump()
        if isinstance(body.tool_choice, NamedTool)
        else body.tool_choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_variables=service.template_variables(body.chat_template_kwargs, body.reasoning_effort),
        adapter=adapter,
        priority=body.priority,
        tenant=body.cache_salt or body.prompt_cache_key or "",
    )
    return source, params.n


def chat_tools(body: ChatBody, service: Service) -> list[dict[str, Any]] | None:
    """The tools that the model is shown. RequestError where it would not see them, or nobody would read its calls."""
    if not body.tools:
        if body.tool_choice not in (None, "none") and (body.tools is None or body.tool_choice != "auto"):
            raise RequestError("tool_choice goes with tools alone", "tool_choice")
        return None
    for index, tool in enumerate(body.tools):
        name = tool.function.get("name")
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{index}].function.name is missing: give the function a name", "tools")
    if body.tool_choice == "none":
        return None
    template = service.llm.chat_template
    sources = "" if template is None else "\n".join(template.sources.values())
    if template is not None and ("tools" not in sources or choose_tool_format(template.source) is None):
        raise RequestError(f"'{service.name}' takes no tools: its chat template has no place for them", "tools")
    return [tool.model_dump() for tool in body.tools]
