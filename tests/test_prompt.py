"""What comes with a conversation, alike in the sync and the async library: over the null model, by grammars."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from turbolm import LLM, AsyncLLM, SamplingParams
from turbolm.errors import RequestError
from turbolm.form import Grammar
from turbolm.prompt import response_grammar
from turbolm.text import ChatTemplate
from turbolm.types import Output, ToolCallPart

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False,
}  # fmt: skip
UNIT = {
    "type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": UNIT}} for name in ("weather", "time")]
HERMES = (
    '{% if tools %}{{ tools | tojson }} <tool_call>{"name": …, "arguments": …}</tool_call>{% endif %}'
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
)
SHORT = SamplingParams(temperature=0, max_tokens=400)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("null", progress=False, max_context=2048) as loaded:
        template = loaded._llm.chat_template
        assert template is not None
        loaded._llm.chat_template = ChatTemplate(HERMES)
        yield loaded


def answers(llm: LLM, **options: object) -> list[Output]:
    """Of the sync and of the async way."""

    async def one() -> Output:
        return Output.collect([output async for output in llm._llm.chat(HI, SHORT, **options)])  # type: ignore[arg-type]

    return [llm.chat(HI, SHORT, **options)[0].outputs[0], asyncio.run(one())]  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [
    {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
    Grammar("json_schema", SCHEMA),
])  # fmt: skip
def test_response_formats_are_kept_to(llm: LLM, form: object) -> None:
    for output in answers(llm, response_format=form):
        assert json.loads(output.text).keys() == {"ok"} and output.finish_reason == "stop"


@pytest.mark.parametrize(("choice", "names"), [
    ("required", {"weather", "time"}), ({"type": "function", "function": {"name": "time"}}, {"time"}),
])  # fmt: skip
def test_calls_that_are_demanded_come(llm: LLM, choice: object, names: set[str]) -> None:
    for output in answers(llm, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False):
        assert output.error is None
        calls = [part for part in output.parts if isinstance(part, ToolCallPart)]
        assert len(calls) == 1 and calls[0].name in names and output.finish_reason == "tool_calls"


def test_tools_that_are_not_to_be_called_are_not_shown(llm: LLM) -> None:
    prompts = [llm.chat(HI, SHORT, tools=TOOLS, tool_choice=choice)[0].prompt_token_ids for choice in ("auto", "none")]
    assert len(prompts[1]) < len(prompts[0]) and prompts[1] == llm.chat(HI, SHORT)[0].prompt_token_ids


@pytest.mark.parametrize(("options", "parameter"), [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_both_ways(llm: LLM, options: dict, parameter: str) -> None:
    with pytest.raises(RequestError) as sync:
        llm.chat(HI, SHORT, **options)
    with pytest.raises(RequestError) as other:
        llm._llm.chat(HI, SHORT, **options)
    assert sync.value.parameter == other.value.parameter == parameter and str(sync.value) == str(other.value)


def test_one_grammar_at_most(llm: LLM) -> None:
    params = SamplingParams(grammar=Grammar("json"))
    with pytest.raises(RequestError, match="both"):
        llm.chat(HI, params, response_format={"type": "json_object"})


def test_text_is_no_grammar() -> None:
    assert response_grammar({"type": "text"}) is None and response_grammar(None) is None
    assert response_grammar({"type": "json_object"}) == Grammar("json")


def test_conversations_may_have_their_own_params(llm: LLM) -> None:
    own = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 5)]
    assert [len(c.outputs[0].token_ids) for c in llm.chat([HI, HI], own)] == [2, 5]
    with pytest.raises(RequestError, match="2 sampling parameters for 1"):
        llm.chat(HI, own)


# Embeddings


def test_embeddings_of_one_or_several(llm: LLM) -> None:
    """The null model's hidden states are a token's id and its position."""
    assert llm.embed("ab", normalize=False)[0].vector.tolist() == [98.0, 1.0]
    found = llm.embed(["ab", [97, 98, 99]], pooling="mean", normalize=False)
    assert [e.vector.tolist() for e in found] == [[97.5, 0.5], [98.0, 1.0]] and found[1].num_tokens == 3
    assert llm.embed([97, 98], dimensions=1)[0].vector.tolist() == [1.0]
    with pytest.raises(RequestError, match="empty"):
        llm.embed("")


def test_isolated_engines_embed_too() -> None:
    async def main() -> list[float]:
        async with AsyncLLM("null", progress=False, max_context=256, isolated=True) as isolated:
            found = await asyncio.gather(*(isolated.embed("ab" * n, pooling="mean", normalize=False) for n in (1, 100)))
            late = Output.collect([o async for o in isolated.generate("ab", SamplingParams(timeout=1e-4))])
            assert late.finish_reason == "error" and "timeout of 0.0001 s" in str(late.error)
            return [float(x) for embedding in found for x in embedding.vector]

    assert asyncio.run(main()) == [97.5, 0.5, 97.5, 99.5]
