"""`encode_chat`: messages to token ids, with no way for a message to forge a control token.

A template writes control tokens as text, and messages may spell the same text ("<|im_end|>").
To tell them apart, the prompt is rendered a second time with every character of the messages that
could be part of a control token replaced by a private one. What still reads as a control token
was written by the template. The second rendering must be the first in disguise, character for
character; else the template looks into the characters (splits at "</think>", writes JSON), and
only the characters that spell control tokens, or begin or end one, are disguised. If the template
rewrites even those, the request is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from turbolm.errors import RequestError, TemplateError
from turbolm.text.chat_template import ChatTemplate, Conversation, Message
from turbolm.text.tokenizer import Tokenizer

_PRIVATE = range(0xF0000, 0x10F000, 0x1000)  # starts of blocks of private characters
_ROLES = frozenset((
    "system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation", "model",
    "context", "document",
))  # fmt: skip
_TYPES = frozenset(("text", "function", "object", "string", "number", "integer", "boolean", "array", "null"))


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    **variables: Any,
) -> list[int]:
    """The prompt's token ids. Control tokens come from the template alone; spelled in messages,
    tools, documents or variables they are the tokens of their letters. Begin-of-text is up to the
    template. The other arguments and errors are those of `ChatTemplate.render`."""
    template = template.with_tokens(tokenizer.special_tokens)
    conversation = template.prepare(
        messages,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        continue_final=continue_final,
        **variables,
    )
    text = template.render_prepared(conversation)
    specials = tokenizer.special_texts
    if not specials:
        return tokenizer.encode(text, add_special=False)
    control = re.compile("|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)))
    if any(control.search(key) for key in _keys(conversation)):
        raise RequestError("a name in messages or tools contains a control token of the model: rename it", "messages")
    if not _can_forge(conversation, specials):
        return tokenizer.encode(text, add_special=False, parse_special=True)
    disguised = _disguised(template, conversation, text, specials, control)
    spans = [match.span() for match in control.finditer(disguised)]
    if spans == [match.span() for match in control.finditer(text)]:
        return tokenizer.encode(text, add_special=False, parse_special=True)
    return tokenizer.encode_parts(list(_parts(text, spans)))


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, bool]]:
    """`text` as (piece, is a control token of the template)."""
    end = 0
    for start, stop in spans:
        if start > end:
            yield text[end:start], False
        yield text[start:stop], True
        end = stop
    if end < len(text):
        yield text[end:], False


def _can_forge(conversation: Conversation, specials: Sequence[str]) -> bool:
    """Could characters of the conversation be part of a control token? A quick look that errs on
    the side of yes: there is a first or a last character of one, or a whole string inside one."""
    edges = {s[0] for s in specials} | {s[-1] for s in specials}
    longest = max(map(len, specials))
    for text in _strings(conversation):
        if not edges.isdisjoint(text) or (text and len(text) < longest and any(text in s for s in specials)):
            return True
    return False


def _disguised(
    template: ChatTemplate, conversation: Conversation, text: str, specials: Sequence[str], control: re.Pattern[str]
) -> str:
    """`text` with the characters that may forge a control token replaced, one by one."""
    alphabet = sorted(set("".join(specials)))
    taken = {ord(c) >> 12 for c in text if ord(c) >= _PRIVATE.start}
    for string in _strings(conversation):
        taken |= {ord(c) >> 12 for c in string if ord(c) >= _PRIVATE.start}
    first = next((block for block in _PRIVATE if block >> 12 not in taken), None)
    if first is None or len(alphabet) > _PRIVATE.step:
        raise RequestError("the messages use every block of Unicode's private characters: send plain text", "messages")
    mask = {ord(c): chr(first + n) for n, c in enumerate(alphabet)}
    unmask = {first + n: c for n, c in enumerate(alphabet)}

    def everything(string: str) -> str:
        return string.translate(mask)

    def suspicious(string: str) -> str:
        return _mask_spans(string, specials, control, mask)

    for disguise in (everything, suspicious):
        try:
            disguised = template.render_prepared(_mapped(conversation, disguise))
        except TemplateError:  # it looks into the characters, and refuses what it sees
            continue
        if disguised.translate(unmask) == text:
            return disguised
    if not any(suspicious(string) != string for string in _strings(conversation)):
        return text
    raise RequestError(
        "the messages spell a control token of the model, and the chat template rewrites them so that it could "
        "not be told from the template's own: remove it from the messages",
        "messages",
    )


def _mask_spans(string: str, specials: Sequence[str], control: re.Pattern[str], mask: dict[int, str]) -> str:
    """`string` with its control tokens masked, and what at its ends begins or ends one."""
    if not string:
        return string
    if any(string in s for s in specials):
        return string.translate(mask)
    string = control.sub(lambda match: match[0].translate(mask), string)
    head = max((n for s in specials for n in range(1, len(s)) if string.startswith(s[-n:])), default=0)
    tail = max((n for s in specials for n in range(1, len(s)) if string.endswith(s[:n])), default=0)
    if head + tail >= len(string):
        return string.translate(mask)
    return (
        string[:head].translate(mask) + string[head : len(string) - tail] + string[len(string) - tail :].translate(mask)
    )


def _mapped(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """`conversation` with every string from outside changed, but keys and well-known roles and types,
    which templates compare."""
    return replace(
        conversation,
        messages=[_map_value(message, change) for message in conversation.messages],
        tools=_map_value(conversation.tools, change),
        documents=_map_value(conversation.documents, change),
        variables=_map_value(conversation.variables, change),
    )


def _map_value(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_value(item, change) for item in value]
    if isinstance(value, dict):
        return {k: v if _is_fixed(k, v) else _map_value(v, change) for k, v in value.items()}
    return value


def _is_fixed(key: str, value: Any) -> bool:
    return (key == "role" and value in _ROLES) or (key == "type" and value in _TYPES)


def _strings(conversation: Conversation) -> Iterator[str]:
    """Every string that `_mapped` would change."""
    values: list[Any] = [conversation.messages, conversation.tools, conversation.documents, conversation.variables]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += [v for k, v in value.items() if not _is_fixed(k, v)]


def _keys(conversation: Conversation) -> Iterator[str]:
    values: list[Any] = [conversation.messages, conversation.tools, conversation.documents, conversation.variables]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            yield from value
            values += value.values()
