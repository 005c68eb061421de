"""The bodies of Anthropic's messages API, and what they are as a chat request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from turbolm.errors import RequestError
from turbolm.server.blocks import Fields, check_fields, kind_of, text_content
from turbolm.server.schema import Body, Extensions, Unserved

_CACHE: Fields = {"cache_control": dict}
_TEXT: dict[str, Fields] = {"text": {**_CACHE, "citations": type(None)}}
_USER_BLOCKS = ("text", "tool_result")
_ASSISTANT_BLOCKS = ("text", "thinking", "tool_use")


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Thinking(Body):
    type: Literal["adaptive", "disabled"]
    display: Literal["summarized"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    format_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesMetadata(Body):
    user_id: str | None = Field(None, max_length=512, description="Goes into the request's log line.")


class AnthropicTool(Body):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensBody(Extensions):
    """POST /v1/messages/count_tokens"""

    messages: list[dict[str, Any]] = Field(
        description="The conversation: objects with role (user or assistant) and content (a string, or blocks: text, "
        "tool_result; of the assistant text, thinking, tool_use)."
    )
    model: str | None = Field(None, description="The served model's name; may be left out.")
    system: str | list[dict[str, Any]] | None = Field(None, description="A text, or text blocks.")
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: Thinking | None = Field(
        None, description="'disabled' turns reasoning off; 'adaptive' leaves it to the model."
    )
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = Field(None, description="Prompt prefixes are always cached.")
    speed: Literal["standard"] | None = None
    container: Unserved = None
    context_management: Unserved = None
    diagnostics: Unserved = None
    inference_geo: Unserved = None
    mcp_servers: Unserved = None
    user_profile_id: Unserved = None
    workspace_id: Unserved = None

    instead: ClassVar[dict[str, str]] = {
        "thinking.type": "a budget of thinking tokens can't be kept: use 'adaptive' or 'disabled', and max_tokens",
        "thinking.display": "thinking is always sent as the model wrote it",
    }

    def chat_fields(self, *, reasons: bool) -> dict[str, Any]:
        """The fields of a ChatBody. `reasons`: whether the model has reasoning at all. Raises RequestError."""
        fields = self.extensions() | {
            "model": self.model,
            "messages": [*self._system(), *_conversation(self.messages)],
            "tools": [_tool(tool) for tool in self.tools] if self.tools is not None else None,
        }
        if self.tool_choice is not None:
            fields["tool_choice"] = _choice(self.tool_choice)
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        config = self.output_config
        effort: str | None = config.effort if config is not None else None
        if self.thinking is not None and self.thinking.type == "disabled":
            if effort is not None:
                raise RequestError("output_config.effort doesn't go with thinking.type = disabled", "output_config")
            effort = "none" if reasons else None
        fields["reasoning_effort"] = "xhigh" if effort == "max" else effort
        if config is not None and config.format is not None:
            described = {"name": "answer", "schema": config.format.format_schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": described}
        return fields

    def _system(self) -> list[dict[str, Any]]:
        return (
            [] if self.system is None else [{"role": "system", "content": text_content(self.system, "system", _TEXT)}]
        )


class MessagesBody(CountTokensBody):
    """POST /v1/messages"""

    max_tokens: int = Field(description="Longest answer in tokens, thinking included.")
    metadata: MessagesMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    stop_sequences: list[str] | None = Field(None, description="Strings that end the answer; up to 64.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events, as it grows.")
    temperature: float | None = Field(None, description="Divides the logits, 0 to 100; 0 is greedy.")
    top_p: float | None = Field(None, description="Keep the smallest set of tokens whose probability reaches it.")

    def chat_fields(self, *, reasons: bool) -> dict[str, Any]:
        fields = super().chat_fields(reasons=reasons)
        return fields | {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


def _tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                "strict": tool.strict}  # fmt: skip
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: AnthropicToolChoice) -> str | dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError(
            "tool_choice.name goes with tool_choice.type = tool, and is needed there", "tool_choice.name"
        )
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _conversation(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages of the chat API."""
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        content = check_fields(message, where, {"role": str, "content": object})["content"]
        if message["role"] == "assistant":
            yield _assistant(content, f"{where}.content")
        elif message["role"] == "user":
            yield from _user(content, f"{where}.content")
        else:
            raise RequestError(f"{where}.role must be user or assistant (the system's text goes into 'system')", where)
    if messages and messages[-1].get("role") == "assistant":
        raise RequestError("the last message is the assistant's: turbolm doesn't continue given answers", "messages")


def _user(content: object, where: str) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own, in the chat API."""
    if not isinstance(content, list):
        yield {"role": "user", "content": text_content(content, where, _TEXT)}
        return
    texts: list[dict[str, Any]] = []
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        if kind_of(block, place, dict.fromkeys(_USER_BLOCKS)) == "text":
            texts += text_content([block], where, _TEXT)  # type: ignore[arg-type]
            continue
        if texts:
            yield {"role": "user", "content": texts}
            texts = []
        yield _result(block, place)
    if texts:
        yield {"role": "user", "content": texts}


def _result(block: object, where: str) -> dict[str, Any]:
    optional: Fields = {**_CACHE, "content": object, "is_error": bool}
    result = check_fields(block, where, {"type": str, "tool_use_id": str}, optional)
    content = text_content(result.get("content") or "", f"{where}.content", _TEXT)
    if result.get("is_error"):
        content = f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error:"}, *content]
    return {"role": "tool", "tool_call_id": result["tool_use_id"], "content": content}


def _assistant(content: object, where: str) -> dict[str, Any]:
    if not isinstance(content, list):
        return {"role": "assistant", "content": text_content(content, where, _TEXT)}
    texts: list[dict[str, Any]] = []
    thoughts, calls = [], []
    for index, block in enumerate(content):
        place = f"{where}[{index}]"
        kind = kind_of(block, place, dict.fromkeys(_ASSISTANT_BLOCKS))
        if kind == "text":
            texts += text_content([block], where, _TEXT)  # type: ignore[arg-type]
        elif kind == "thinking":
            thought = check_fields(block, place, {"type": str, "thinking": str}, {"signature": str})
            thoughts.append(thought["thinking"])
        else:
            needed: Fields = {"type": str, "id": str, "name": str, "input": dict}
            call = check_fields(block, place, needed, {**_CACHE, "caller": type(None)})
            function = {"name": call["name"], "arguments": json.dumps(call["input"], ensure_ascii=False)}
            calls.append({"id": call["id"], "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": texts or None}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message
