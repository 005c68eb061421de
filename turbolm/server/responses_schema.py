"""The body of OpenAI's responses API, and what it is as a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from turbolm.errors import RequestError
from turbolm.server.blocks import Fields, check_fields, kind_of, text_content
from turbolm.server.schema import Body, Extensions, StreamOptions, Unserved

_SAME = (
    "model", "temperature", "top_p", "user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip
_NULL: type = type(None)
_ECHOED: Fields = {"id": str, "status": str}  # what the API itself has put into items that come back
_INPUT_TEXT: dict[str, Fields] = {"input_text": {}, "text": {}}
_TEXT: dict[str, Fields] = {**_INPUT_TEXT, "output_text": {"annotations": list, "logprobs": list}}
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


class ResponsesTool(Body):
    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Unserved = None
    generate_summary: Unserved = None


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    format_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Unserved = None


class ResponsesBody(Extensions):
    """POST /v1/responses"""

    input: str | list[dict[str, Any]] = Field(
        description="A text, or items: messages (role and content), function_call, function_call_output, reasoning."
    )
    model: str | None = Field(None, description="The served model's name; may be left out.")
    instructions: str | None = Field(None, description="The system's message; not kept for later responses.")
    max_output_tokens: int | None = Field(None, description="Longest answer in tokens, reasoning included.")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Goes into the request's log line.")
    parallel_tool_calls: bool | None = Field(None, description="false: the first call alone.")
    previous_response_id: str | None = Field(None, description="Go on after a stored response (turbolm serve --store).")
    prompt_cache_key: str | None = Field(None, max_length=512, description="The same as cache_salt.")
    reasoning: Reasoning | None = None
    safety_identifier: str | None = Field(None, max_length=512, description="Goes into the request's log line.")
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = Field(None, description="Keep the response; as the server was started, by default.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events, as it grows.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, description="Divides the logits, 0 to 100; 0 is greedy.")
    text: TextConfig | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    tools: list[ResponsesTool] | None = Field(None, description="Functions that the model may call.")
    top_p: float | None = Field(None, description="Keep the smallest set of tokens whose probability reaches it.")
    truncation: Literal["disabled"] | None = None
    user: str | None = Field(None, max_length=512, description="Goes into the request's log line.")
    background: Literal[False] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        None, max_length=0, description="Nothing can be included."
    )
    top_logprobs: Literal[0] | None = None
    access_programs: Unserved = None
    background_options: Unserved = None
    context_management: Unserved = None
    conversation: Unserved = None
    image: Unserved = None
    max_tool_calls: Unserved = None
    moderation: Unserved = None
    prompt: Unserved = None
    prompt_cache_options: Unserved = None
    prompt_cache_retention: Unserved = None

    instead: ClassVar[dict[str, str]] = {
        "background": "answers are made while the client waits",
        "input": "give a text or a list of items",
        "include": "leave it out; log-probabilities are in /v1/chat/completions",
        "max_tool_calls": "it limits built-in tools, which turbolm doesn't have",
        "top_logprobs": "log-probabilities are in /v1/chat/completions",
        "truncation": "nothing is left out of a conversation silently: shorten the input",
    }

    def chat_fields(self, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The fields of a ChatBody with these messages. Raises RequestError."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields = self.extensions() | {name: getattr(self, name) for name in _SAME}
        fields |= {"messages": [*system, *messages], "max_completion_tokens": self.max_output_tokens}
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.tools is not None:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if isinstance(self.tool_choice, dict):
            choice = check_fields(self.tool_choice, "tool_choice", {"type": str, "name": str})
            kind_of(choice, "tool_choice", {"function": None})
            fields["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        else:
            fields["tool_choice"] = self.tool_choice
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _response_format(self.text.format)
        return fields

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of the chat API. Raises RequestError."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return list(_messages(self.input))

    def input_items(self) -> list[dict[str, Any]]:
        """The input as items."""
        if isinstance(self.input, str):
            content = [{"type": "input_text", "text": self.input}]
            return [{"type": "message", "role": "user", "content": content}]
        return list(self.input)


def _tool(tool: ResponsesTool) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.name is None or form.format_schema is None:
        raise RequestError("text.format of type json_schema needs name and schema", "text")
    fields = {"name": form.name, "description": form.description, "schema": form.format_schema, "strict": form.strict}
    schema = {name: value for name, value in fields.items() if value is not None}
    return {"type": "json_schema", "json_schema": schema}


def _messages(items: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the assistant said in several items is one message."""
    said: dict[str, Any] = {}
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = kind_of(item, where, dict.fromkeys(_ITEMS), default="message")
        piece = _READERS[kind](item, where)
        if piece["role"] == "assistant" and not _begins_anew(said, piece):
            said = _joined(said, piece)
            continue
        if said:
            yield said
        said = {}
        if piece["role"] == "assistant":
            said = piece
        else:
            yield piece
    if said:
        yield said


def _begins_anew(said: dict[str, Any], piece: dict[str, Any]) -> bool:
    """An assistant's message is reasoning, then text, then calls."""
    is_calling, has_text = "tool_calls" in said, said.get("content") is not None
    is_over = is_calling or has_text
    return ("reasoning_content" in piece and is_over) or (piece.get("content") is not None and is_over)


def _joined(said: dict[str, Any], piece: dict[str, Any]) -> dict[str, Any]:
    joined = {"content": None, **said, **{name: value for name, value in piece.items() if value is not None}}
    for name, nothing in (("tool_calls", []), ("reasoning_content", "")):
        if name in said and name in piece:
            joined[name] = (said[name] or nothing) + piece[name]
    return joined


def _message(item: object, where: str) -> dict[str, Any]:
    optional: Fields = {"type": str, **_ECHOED, "phase": _NULL}
    message = check_fields(item, where, {"role": str, "content": object}, optional)
    role = _ROLES.get(message["role"])
    if role is None:
        raise RequestError(f"{where}.role is '{message['role'][:40]}'; served: {', '.join(_ROLES)}", f"{where}.role")
    return {"role": role, "content": text_content(message["content"], f"{where}.content", _TEXT)}


def _call(item: object, where: str) -> dict[str, Any]:
    call = check_fields(item, where, {"type": str, "call_id": str, "name": str, "arguments": str}, _ECHOED)
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"role": "assistant", "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}]}


def _result(item: object, where: str) -> dict[str, Any]:
    result = check_fields(item, where, {"type": str, "call_id": str, "output": object}, _ECHOED)
    content = text_content(result["output"], f"{where}.output", _INPUT_TEXT)
    return {"role": "tool", "tool_call_id": result["call_id"], "content": content}


def _reasoning(item: object, where: str) -> dict[str, Any]:
    optional: Fields = {**_ECHOED, "content": list, "summary": list, "encrypted_content": _NULL}
    reasoning = check_fields(item, where, {"type": str}, optional)
    if reasoning.get("summary"):
        raise RequestError(f"{where}.summary can't be given to the model: send the reasoning's content", where)
    content = text_content(reasoning.get("content") or [], f"{where}.content", {"reasoning_text": {}})
    return {"role": "assistant", "reasoning_content": "".join(block["text"] for block in content if block)}  # type: ignore[index]


_READERS = {"message": _message, "function_call": _call, "function_call_output": _result, "reasoning": _reasoning}
