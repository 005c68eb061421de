"""Chat templates: messages to the prompt that a model was trained on."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbolm.errors import RequestError, TemplateError, nearest
from turbolm.text.template_budget import ELEMENT, MAX_SIZE
from turbolm.text.template_sandbox import compile_template, render_template
from turbolm.text.tokenizer import Tokenizer, check_text

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing, the first the usual one
_MAX_DEPTH = 64  # of nested lists and objects in messages and tools


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a template is given, checked and made plain."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    variables: dict[str, Any]
    continue_final: bool
    add_generation_prompt: bool


class ChatTemplate:
    """A chat template in Jinja, as Hugging Face and GGUF files carry it, compiled once."""

    def __init__(self, source: str | Mapping[str, str], **special_tokens: str | None) -> None:
        """`source`: one template, or templates by name: "tool_use" serves requests with tools,
        "default" the others. `special_tokens` ("bos_token", "eos_token" …) are given to the template
        as variables. Raises TemplateError for an invalid template."""
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if not sources:
            raise TemplateError(_MISSING)
        self.sources = sources
        self._templates = {name: compile_template(text) for name, text in sources.items()}
        self._special_tokens = {name: text for name, text in special_tokens.items() if text is not None}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that came with a model. Raises TemplateError where it has none."""
        return cls(tokenizer.chat_templates, **tokenizer.special_tokens)

    @property
    def source(self) -> str:
        """The Jinja source of the usual template."""
        return self.sources[self._name(has_tools=False)]

    def with_tokens(self, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """This template; the special tokens that it was not given are those of `special_tokens`."""
        other = copy.copy(self)
        other._special_tokens = {**special_tokens, **self._special_tokens}
        return other

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages` ({"role", "content", …}), as text.

        `tools`: JSON schemas; `documents`: {"title", "text"}; `add_generation_prompt`: with the
        words that begin an answer; `continue_final`: the last message is unfinished, and the prompt
        ends where it ends (then without a generation prompt); `variables`: whatever else the
        template reads ("enable_thinking"). Raises RequestError for malformed messages, TemplateError
        where the template fails or refuses them.
        """
        conversation = self.prepare(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
            **variables,
        )
        return self.render_prepared(conversation)

    def prepare(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        **variables: Any,
    ) -> Conversation:
        """The first half of `render`: checks its arguments and brings them into the template's form."""
        joins = not _reads_parts(self.sources[self._name(bool(tools))])
        return Conversation(
            messages=_plain_messages(messages, joins),
            tools=_plain_objects(tools, "tools") if tools else None,
            documents=_plain_objects(documents, "documents") if documents else None,
            variables={name: plain_value(value, name) for name, value in variables.items()},
            continue_final=continue_final,
            add_generation_prompt=add_generation_prompt and not continue_final,
        )

    def render_prepared(self, conversation: Conversation) -> str:
        """The second half of `render`."""
        messages = conversation.messages
        if conversation.continue_final:
            messages = [*messages[:-1], _tagged(messages[-1])]
        variables = {
            **self._special_tokens,
            **conversation.variables,
            "messages": messages,
            "tools": conversation.tools,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        known: dict[int, int] = {}
        total = sum(_measure(value, known) for value in variables.values())
        if total > MAX_SIZE:
            raise RequestError(f"the messages are too long: {total} characters; allowed are {MAX_SIZE}", "messages")
        name = self._name(bool(conversation.tools))
        text = render_template(self._templates[name], variables, known)
        return _cut(text, conversation.messages[-1]) if conversation.continue_final else text

    def _name(self, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(
                f"the model has no 'default' chat template; it has {', '.join(self._templates)}: choose one of them"
            )
        return name


def _reads_parts(source: str) -> bool:
    """Can the template take a message's content as a list of parts?"""
    return bool(
        re.search(r"content\s+is\s+(not\s+)?(string|iterable|sequence|mapping)", source)
        or re.search(r"""\bin\s+[\w.\[\]'"]*content['"\]]*\s*(%}|-%}|\|)""", source)
    )


def _plain_messages(messages: Sequence[Message], joins: bool) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError("messages must be a list of {role, content} objects", "messages")
    if not messages:
        raise RequestError("messages is empty: give at least one message", "messages")
    return [_plain_message(message, index, joins) for index, message in enumerate(messages)]


def _plain_message(message: Message, index: int, joins: bool) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {type(message).__name__}", where)
    plain: dict[str, Any] = plain_value(message, where)
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a string such as user, assistant or system, got {role!r}", where)
    content = plain.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
        if joins:
            plain["content"] = "\n".join(texts)
    elif content is None:
        if role != "assistant":
            raise RequestError(f"{where}.content is missing: give a string or a list of text parts", where)
    elif not isinstance(content, str):
        raise RequestError(
            f"{where}.content must be a string or a list of text parts, got {type(content).__name__}", where
        )
    if plain.get("tool_calls") is not None:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    reasoning = next((plain[name] for name in _REASONING if plain.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _part_text(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise RequestError(
            f'{where} is of type {kind!r}; supported is {{"type": "text", "text": …}}'
            if kind != "text"
            else f"{where}.text must be a string",
            where,
        )
    return text


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: requests carry the JSON text that the model
    wrote, templates want to write it themselves. Text that is no object stays text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestError(f"{where} must be a list of tool calls", where)
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{index}] needs function.name", where)
        if isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except (ValueError, RecursionError):
                continue
            if isinstance(arguments, dict):
                function["arguments"] = arguments
    return calls


def _plain_objects(values: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    plain = plain_value(values, where)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise RequestError(f"{where} must be a list of objects", where)
    return plain


def plain_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain JSON types: templates must not reach into objects. Raises RequestError
    for other types and for text that is not valid Unicode."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        if not value.isascii():
            check_text(value)
        return str(value)
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where} is nested deeper than {_MAX_DEPTH} levels", where)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(f"{where} has keys that are not strings", where)
        return {plain_value(k, where): plain_value(v, where, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(v, where, depth + 1) for v in value]
    raise RequestError(f"{where} has a value of type {type(value).__name__}; allowed are JSON types", where)


def _measure(value: Any, known: dict[int, int]) -> int:
    """The size of plain data as `Budget` counts it, noted in `known` for each container."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        size = ELEMENT * (1 + 2 * len(value)) + sum(len(k) + _measure(v, known) for k, v in value.items())
    elif isinstance(value, list):
        size = ELEMENT * (1 + len(value)) + sum(_measure(v, known) for v in value)
    else:
        return ELEMENT
    known[id(value)] = size
    return size


_TAG = "\U0010f8fe\U0010f8fd"  # marks the end of an unfinished message


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with the tag at its end, and a space by which to see whether the template trims."""
    content = message.get("content")
    if isinstance(content, list) and content:
        last = {**content[-1], "text": content[-1]["text"] + _TAG + " "}
        return {**message, "content": [*content[:-1], last]}
    if not isinstance(content, str):
        raise RequestError("continue_final needs a last message with text content", "messages")
    return {**message, "content": content + _TAG + " "}


def _cut(text: str, message: dict[str, Any]) -> str:
    """`text` up to the end of the last message, which is trimmed if the template trims messages."""
    content = message["content"]
    final = content if isinstance(content, str) else content[-1]["text"]
    at = text.rfind(_TAG)
    if at < 0 or final.strip() not in text:
        raise TemplateError("continue_final: the chat template leaves out the last message, or rewrites it")
    return text[:at] if text.startswith(_TAG + " ", at) else text[:at].rstrip()


_MISSING = (
    "the model has no chat template: give one (a .jinja file or a named one: "
    "chatml, llama2, llama3, mistral, internlm2), or send a plain prompt"
)

_NAMED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + "
        "'\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
        "{% set turns = messages %}{% endif %}{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + "
        "message['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns, the user first') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message['content'] + "
        "' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "internlm2": (
        "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}


def named_template(name: str, **special_tokens: str | None) -> ChatTemplate:
    """A well-known template, for models that come without one: chatml, llama2, llama3, mistral,
    internlm2. `encode_chat` completes the special tokens. Raises TemplateError for other names."""
    source = _NAMED.get(name)
    if source is None:
        raise TemplateError(f"no chat template is called '{name}'.{nearest(name, _NAMED)} Known: {', '.join(_NAMED)}")
    return ChatTemplate(source, **special_tokens)
