"""Answers by a grammar, from the null model and from the default model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbolm.errors import RequestError
from turbolm.eval.json_schema import mismatch
from turbolm.form import Grammar
from turbolm.llm import LLM, AsyncLLM
from turbolm.types import Output, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colors": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 4},
    },
    "required": ["name", "age", "colors"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Describe three persons as JSON, all in the same way."}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip


def params(grammar: Grammar | None, **options: object) -> SamplingParams:
    return SamplingParams.of(SamplingParams(temperature=0, max_tokens=200, grammar=grammar), **options)


@pytest.fixture(scope="module")
def null() -> Iterator[LLM]:
    llm = LLM("null", progress=False)
    yield llm
    llm._gather([llm._llm.close()])


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    llm = LLM(str(smollm2_path), progress=False, max_context=1024)
    yield llm
    llm._gather([llm._llm.close()])


def one(llm: LLM, options: SamplingParams) -> Output:
    return llm.chat(ASK, options)[0].outputs[0]


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [(Grammar("choice", ["yes", "no"]), {"yes", "no"}), (Grammar("regex", "[AB]{3}"), None), (Grammar("json"), None)],
)
def test_an_answer_ends_with_its_grammar(null: LLM, grammar: Grammar, texts: set[str] | None) -> None:
    output = one(null, params(grammar, max_tokens=1500, temperature=1.0, seed=3))
    if grammar.kind == "regex":
        assert len(output.text) == 3
        assert set(output.text) <= set("AB")
    assert texts is None or output.text in texts
    if grammar.kind != "json":  # whose strings the null model never ends
        assert output.finish_reason == "stop"


def test_a_bad_grammar_fails_its_own_request(null: LLM) -> None:
    good, bad = params(Grammar("choice", ["yes"])), params(Grammar("regex", "(a"))
    results = [completion.outputs[0] for completion in null.chat([ASK] * 3, [good, bad, good])]
    assert [result.text for result in results] == ["yes", "", "yes"]
    assert isinstance(results[1].error, RequestError)
    assert "unclosed group" in str(results[1].error)


def test_an_impossible_combination_fails_its_own_request(null: LLM) -> None:
    banned = params(Grammar("choice", ["yes"]), logit_bias={ord("y"): -100.0}, bad_words=("y",))
    results = [
        completion.outputs[0] for completion in null.chat([ASK] * 2, [banned, params(Grammar("choice", ["no"]))])
    ]
    assert [result.finish_reason for result in results] == ["error", "stop"]


def test_it_ends_before_min_tokens_only_where_it_has_to(null: LLM) -> None:
    assert one(null, params(Grammar("choice", ["yes"]), min_tokens=50)).text == "yes"
    assert len(one(null, params(Grammar("regex", "a{2,30}"), min_tokens=20)).text) >= 20


def test_what_does_not_go_together() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(grammar=Grammar("json"), ignore_eos=True)
    with pytest.raises(RequestError, match="takes a Grammar"):
        SamplingParams(grammar="json")  # type: ignore[arg-type]


def test_cancelled_and_closed_while_grammars_are_compiled() -> None:
    async def run() -> list[Output]:
        llm = AsyncLLM("null", progress=False)
        gone = llm.chat(ASK, params(Grammar("regex", "[ab]{50}")))
        gone.begin(lambda _: None)
        gone.end()
        left = [llm.chat(ASK, params(Grammar("regex", f"[ab]{{{count}}}"))) for count in range(60, 90)]
        outputs: list[Output] = []
        for answers in left:
            answers.begin(outputs.append)
        await llm.close()
        await asyncio.sleep(0.05)
        assert llm.stats.num_used_blocks == 0
        return outputs

    finals = [output for output in asyncio.run(run()) if output.is_final]
    assert len(finals) == 30


def test_isolated_engines_compile_too() -> None:
    llm = LLM("null", progress=False, isolated=True)
    try:
        grammars = [Grammar("choice", ["yes"]), Grammar("json_schema", {"not": {}}, parameter="response_format")]
        good, bad = [completion.outputs[0] for completion in llm.chat([ASK] * 2, [params(g) for g in grammars])]
        assert good.text == "yes"
        assert isinstance(bad.error, RequestError)
        assert bad.error.parameter == "response_format"
    finally:
        llm._gather([llm._llm.close()])


def test_json_of_a_schema(smollm2: LLM) -> None:
    options = [
        params(Grammar("json_schema", PERSON), temperature=t, seed=s, n=2) for t, s in ((0, 1), (1, 2), (1.5, 3))
    ]
    for completion in smollm2.chat([ASK] * 3, options):
        for output in completion.outputs:
            assert output.finish_reason == "stop"
            assert mismatch(json.loads(output.text), PERSON) is None


def test_the_same_text_with_and_without_speculation(smollm2: LLM, smollm2_path: Path) -> None:
    people = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}
    options = [params(Grammar("json_schema", people)), params(Grammar("json_schema", people), temperature=1.0, seed=7)]
    drafted = smollm2.chat([ASK] * 2, options)
    assert smollm2._llm.stats.num_accepted_tokens > 0
    plain = LLM(str(smollm2_path), progress=False, max_context=1024, speculation="off")
    try:
        assert [c.text for c in plain.chat([ASK] * 2, options)] == [c.text for c in drafted]
    finally:
        plain._gather([plain._llm.close()])


def test_preemption_keeps_the_place(smollm2: LLM, smollm2_path: Path) -> None:
    options = [params(Grammar("json_schema", PERSON), seed=seed, temperature=0.9) for seed in range(8)]
    alone = [smollm2.chat(ASK, option)[0].text for option in options]
    tight = LLM(str(smollm2_path), progress=False, max_context=256, kv_memory="12M", prefix_cache=False)
    try:
        assert [c.text for c in tight.chat([ASK] * 8, options)] == alone
        assert tight._llm.stats.num_preemptions > 0
    finally:
        tight._gather([tight._llm.close()])
