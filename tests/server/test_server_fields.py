"""Every field that OpenAI's and Anthropic's clients know: honoured, or refused with 400 and its name.

The fields are read off the clients' own packages, so that what they add shows here."""

from __future__ import annotations

import ast
import importlib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import is_typeddict

import turbolm.server
from turbolm.errors import RequestError
from turbolm.server.body import parse
from turbolm.server.conversation import check_messages
from turbolm.server.embeddings import EmbeddingsBody
from turbolm.server.failures import ApiError, to_api_error, to_json
from turbolm.server.messages_schema import CountTokensBody, MessagesBody
from turbolm.server.responses_schema import ResponsesBody
from turbolm.server.schema import ChatBody, CompletionBody

MESSAGES = [{"role": "user", "content": "Hi"}]
APIS = {
    "chat": (ChatBody, "openai.types.chat.completion_create_params.CompletionCreateParams", {"messages": MESSAGES}),
    "completions": (CompletionBody, "openai.types.completion_create_params.CompletionCreateParams", {"prompt": "Hi"}),
    "embeddings": (EmbeddingsBody, "openai.types.embedding_create_params.EmbeddingCreateParams", {"input": "Hi"}),
    "responses": (ResponsesBody, "openai.types.responses.response_create_params.ResponseCreateParams", {"input": "Hi"}),
    "messages": (
        MessagesBody, "anthropic.types.message_create_params.MessageCreateParams",
        {"messages": MESSAGES, "max_tokens": 5},
    ),
    "count_tokens": (
        CountTokensBody, "anthropic.types.message_count_tokens_params.MessageCountTokensParams", {"messages": MESSAGES}
    ),
}  # fmt: skip
# Fields of which only values are accepted that change nothing, or that are so at any rate.
NOTHING_TO_DO = {
    "modalities": "text alone", "service_tier": "the usual one alone", "store": "false alone", "speed": "standard",
    "background": "false alone", "include": "an empty list", "top_logprobs": "0 in responses", "truncation": "disabled",
    "cache_control": "prompt prefixes are always cached",
}  # fmt: skip


def variants(path: str) -> list[type]:
    """The TypedDicts of a name that may stand for a union of them."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return [found] if is_typeddict(found) else list(typing.get_args(found))


def documented(path: str) -> dict[str, Any]:
    """Field → its type."""
    fields: dict[str, Any] = {}
    for variant in variants(path):
        fields |= typing.get_type_hints(variant, vars(importlib.import_module(path.rpartition(".")[0])))
    return fields


CASES = [(api, field) for api, (_, path, _) in APIS.items() for field in documented(path)]


def members(hint: Any) -> Iterator[Any]:
    """The types in unions and lists."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, list, typing.Required, typing.NotRequired) or (
        origin is not None and getattr(origin, "__name__", "") in ("Iterable", "Sequence")
    ):
        for inner in typing.get_args(hint):
            yield from members(inner)
    else:
        yield hint


def refusal(form: type, body: dict[str, Any]) -> ApiError | None:
    """What is wrong with a body, as far as its form, its sampling and its messages tell."""
    try:
        parsed = parse(to_json(body), form)
        if isinstance(parsed, ResponsesBody):
            check_messages(parsed.chat_fields(parsed.messages())["messages"], 100, None)
        elif isinstance(parsed, CountTokensBody):
            check_messages(parsed.chat_fields(reasons=True)["messages"], 100, None)
        elif isinstance(parsed, ChatBody):
            check_messages(parsed.messages, 100, None)
    except (ApiError, RequestError) as error:
        return to_api_error(error)
    return None


def _names_read() -> set[str]:
    """Attributes that the server's code reads, and names in its tables of fields."""
    found: set[str] = set()
    for path in Path(turbolm.server.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, (ast.Tuple, ast.Set)):
                found |= {e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)}
    return found


READ = _names_read()


@pytest.mark.parametrize(("api", "field"), CASES)
def test_documented_fields_are_read_or_refused_by_name(api: str, field: str) -> None:
    form, _, minimal = APIS[api]
    served = form.model_fields.get(field)
    if served is not None and served.annotation is not type(None):
        assert field in READ or field in NOTHING_TO_DO, "accepted, and nobody looks at it"
        return
    for value in ({"any": "thing"}, "x", 1, True, []):
        error = refusal(form, minimal | {field: value})
        assert error is not None and error.status == 400 and error.parameter == field and field in str(error)
    assert served is None or refusal(form, minimal | {field: None}) is None, "null is what clients send for nothing"


@pytest.mark.parametrize(("api", "field"), CASES)
def test_documented_values_are_accepted_or_refused_by_name(api: str, field: str) -> None:
    form, path, minimal = APIS[api]
    for hint in members(documented(path)[field]):
        for value in typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ():
            error = refusal(form, minimal | {field: value})
            assert error is None or (error.status == 400 and str(error.parameter).split(".")[0] == field)


def sample(hint: Any, depth: int = 0) -> Any:
    """A value of a type, with every field that it may have; None where there is no telling."""
    hint = next(members(hint))
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)[0]
    if is_typeddict(hint) and depth < 4:
        return {name: sample(kind, depth + 1) for name, kind in nested(hint).items()}
    return {str: "x", int: 1, float: 0.5, bool: True}.get(hint, {} if typing.get_origin(hint) is dict else None)


def nested(kind: type) -> dict[str, Any]:
    names = vars(importlib.import_module(kind.__module__))
    return typing.get_type_hints(kind, names)


NESTED = [
    (api, field, kind)
    for api, (_, path, _) in APIS.items()
    for field, hint in documented(path).items()
    for kind in dict.fromkeys(member for member in members(hint) if is_typeddict(member))
]


@pytest.mark.parametrize(("api", "field", "kind"), NESTED, ids=[f"{a}-{f}-{k.__name__}" for a, f, k in NESTED])
def test_objects_within_fields_hold_nothing_that_is_ignored(api: str, field: str, kind: type) -> None:
    """Each documented object, in full: accepted, or refused by a name that begins with the field's. And none takes
    a field that nobody knows."""
    form, path, minimal = APIS[api]
    hint = documented(path)[field]
    is_list = not any(member is kind for member in _direct(hint))
    whole = sample(kind)
    if isinstance(whole, dict):
        for value in (whole, whole | {"unheard_of": 1}):
            error = refusal(form, minimal | {field: [value] if is_list else value})
            if "unheard_of" in value:
                assert error is not None, "an unknown field is accepted"
            if error is not None:
                assert error.status == 400
                assert str(error.parameter).replace("[", ".").split(".")[0] in (field, "messages", "reasoning_effort")


def _direct(hint: Any) -> list[Any]:
    """The members of a union that stand by themselves, in no list."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Required, typing.NotRequired):
        return [member for inner in typing.get_args(hint) for member in _direct(inner)]
    return [hint]
