"""From a text or a conversation to the tokens that the model sees, and to how its answer is read."""

from __future__ import annotations

import numbers
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from turbolm.errors import ContextOverflowError, RequestError, nearest
from turbolm.form import Grammar
from turbolm.grammar import tool_grammar
from turbolm.text import ChatTemplate, PartParser, Tokenizer, choose_reasoning_format, encode_chat, parser_for
from turbolm.text.parser import choose_tool_format
from turbolm.types import SamplingParams

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
#: One text, one list of token ids, or several of either.
Texts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
#: For all prompts, or one for each; None: what the checkpoint recommends.
Params = SamplingParams | Sequence[SamplingParams] | None
#: "auto", "none", "required" or {"type": "function", "function": {"name": …}}.
ToolChoice = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What comes with a conversation. RequestError for what doesn't go together."""

    tools: Tools | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | Grammar | None = None
    template_variables: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.tools and self.tool_choice not in ("auto", "none"):
            raise RequestError("tool_choice goes with tools alone", "tool_choice")

    @property
    def shown_tools(self) -> Tools | None:
        """Those that the model is told of."""
        return None if self.tool_choice == "none" else self.tools


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to compute, and how to read the answer."""

    token_ids: tuple[int, ...]
    parser: Callable[[], PartParser]
    is_continuation: bool
    thoughts: tuple[str, str] | None = None  # as in Grammar


def plain_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> Prompt:
    """A text, or token ids, that the answer continues. Control tokens spelled in the text are control tokens: who
    writes a whole prompt may have applied a template. (Those in messages are letters.)"""
    token_ids = tokenizer.encode(prompt, parse_special=True) if isinstance(prompt, str) else prompt
    if isinstance(next(iter(token_ids), None), np.integer):
        token_ids = np.asarray(token_ids).tolist()
    return Prompt(tuple(token_ids), PartParser, is_continuation=True)


def chat_prompt(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """A conversation, up to where the answer begins."""
    token_ids = encode_chat(tokenizer, template, messages, tools=tools, **(template_variables or {}))
    reasoning = choose_reasoning_format(template.source)
    tail = tokenizer.decode(token_ids[-16:], skip_special=False)
    is_open = reasoning is not None and reasoning.is_open(tail)  # some templates open the block themselves

    def parser() -> PartParser:
        return parser_for(template.source, tools_given=bool(tools), tools=tools or (), starts_in_reasoning=is_open)

    thoughts = None
    if reasoning is not None and not tail.rstrip().endswith(reasoning.closer):
        thoughts = ("" if is_open else reasoning.opener, reasoning.closer)
    return Prompt(tuple(token_ids), parser, is_continuation=False, thoughts=thoughts)


def check_limits(
    token_ids: Sequence[int], params: SamplingParams, max_context: int, vocab_size: int, *, has_answer: bool
) -> None:
    """Raises RequestError for what is no token id, and for what the model's context and vocabulary don't allow."""
    num_prompt = len(token_ids)
    wanted = 1 if params.max_tokens is None else params.max_tokens
    if not has_answer and num_prompt > max_context:
        raise ContextOverflowError(
            f"the text has {num_prompt} tokens, and the context {max_context}: shorten the text or raise max_context",
            "prompt",
        )
    if has_answer and num_prompt + wanted > max_context:
        answer = "an answer" if params.max_tokens is None else f"max_tokens {params.max_tokens}"
        raise ContextOverflowError(
            f"the prompt has {num_prompt} tokens; with {answer} that exceeds the context of {max_context} tokens. "
            "Shorten the prompt, lower max_tokens or raise max_context",
            "prompt",
        )
    _check_ids("prompt", token_ids, vocab_size)
    if params.logit_bias:
        _check_ids("logit_bias", params.logit_bias, vocab_size)
    if params.stop_token_ids:
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Hundreds of prompts may come at once, so it's done in passes of C code: 2 of them."""
    kind = type(next(iter(ids), 0))
    try:
        found = np.frombuffer(array("I", ids), np.uint32)
    except OverflowError:
        found = None
    except TypeError:
        kind = next((type(token) for token in ids if not isinstance(token, numbers.Integral)), kind)
    if not issubclass(kind, numbers.Integral):
        raise RequestError(f"the {name} holds a {kind.__name__}: give a text or token ids; messages are for chat", name)
    if found is None or (len(found) and np.maximum.reduce(found) >= vocab_size):
        token = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"{name} holds token id {token}; the vocabulary is 0 to {vocab_size - 1}", name)


def constrained(
    params: SamplingParams, options: ChatOptions, tokenizer: Tokenizer, template: ChatTemplate | None
) -> SamplingParams:
    """`params`, with the grammar that the options demand. Raises RequestError where there is more than one."""
    grammar, tools = response_grammar(options.response_format), options.shown_tools
    if grammar is not None:
        if params.grammar is not None:
            raise RequestError("response_format and params.grammar both say what the answer is: give one", "grammar")
        params = replace(params, grammar=grammar)
    if tools and params.grammar is not None:
        raise RequestError(
            "an answer can't be by a grammar and with tools: use tool_choice 'none', or no grammar", "tools"
        )
    if not tools or options.tool_choice == "auto":
        return params
    calls = _forced_calls(tokenizer, template, tools, options.tool_choice, is_single=not options.parallel_tool_calls)
    return replace(params, grammar=calls)


def _forced_calls(
    tokenizer: Tokenizer, template: ChatTemplate | None, tools: Tools, choice: ToolChoice, *, is_single: bool
) -> Grammar:
    """Of an answer that has to call a function."""
    name = None
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
    if choice != "required" and not isinstance(name, str):
        raise RequestError(
            f"tool_choice is 'auto', 'none', 'required' or names a function, got {choice!r:.80}", "tool_choice"
        )
    form = choose_tool_format(template.source if template else None)
    if form is None:
        raise RequestError("this model takes no tools: its chat template has no place for them", "tools")
    return tool_grammar(form.name, tools, tokenizer, name=name, is_single=is_single or name is not None)


def response_grammar(response_format: Mapping[str, Any] | Grammar | None) -> Grammar | None:
    """OpenAI's response_format as a grammar: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema",
    "json_schema": {"schema": …}}. Raises RequestError."""
    name = "response_format"
    if response_format is None or isinstance(response_format, Grammar):
        return response_format
    if not isinstance(response_format, Mapping):
        raise RequestError(
            f"{name} takes an object such as {{'type': 'json_object'}}, got {response_format!r:.80}", name
        )
    kinds = {"text": {"type"}, "json_object": {"type"}, "json_schema": {"type", "json_schema"}}
    kind = response_format.get("type")
    if kind not in kinds:
        raise RequestError(f"{name}.type is {kind!r:.80}; allowed: {', '.join(kinds)}", name)
    _check_names(response_format, kinds[kind], name)
    if kind != "json_schema":
        return Grammar("json", parameter=name) if kind == "json_object" else None
    form = response_format.get("json_schema")
    if not isinstance(form, Mapping) or form.get("schema") is None:
        raise RequestError(f"{name}.json_schema.schema is missing", name)
    _check_names(form, {"name", "description", "schema", "strict"}, f"{name}.json_schema")
    return Grammar("json_schema", form["schema"], parameter=name)


def _check_names(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise RequestError(f"unknown field '{where}.{name}'.{nearest(str(name), known)}", where)


def bad_words_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it's tokenized at the start of a text and after a space."""
    if not words:
        return ()
    variants = (tokenizer.encode(p + w, add_special=False) for w in words for p in ("", " "))
    return tuple(dict.fromkeys(tuple(ids) for ids in variants if ids))


def one_each(params: Params, count: int) -> Sequence[SamplingParams | None]:
    """The parameters of each of so many prompts. Raises RequestError."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sampling parameters for {count} prompts: give one for each, or one for all", "params"
        )
    return params


def listed(given: Texts) -> list[Any]:
    """One text, or one list of token ids, as a list of one."""
    is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    return [given] if is_one else list(given)
