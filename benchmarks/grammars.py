"""llguidance, which turbolm's grammars use, beside xgrammar: seconds to compile a JSON schema, microseconds for a mask,
and whether they take what a schema allows and nothing else.

    pip install xgrammar
    python benchmarks/grammars.py [--model smollm2-135m] [--save]

Each case is a schema, JSON that fits it and JSON that doesn't, in the spirit of the JSON Schema Test Suite: one keyword
each, then some as people write them. JSON that fits has to be taken token by token to an end; other JSON must not be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import machine, save

from turbolm.form import Grammar
from turbolm.grammar import GrammarCompiler
from turbolm.grammar.state import MaskRows, fill_masks
from turbolm.hub import fetch
from turbolm.loading import load_text
from turbolm.text import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
CALLS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, arguments in (("add_person", PERSON), ("plant", {"type": "object", "properties": {"tree": {}}}))
        ]
    },
}
Case = tuple[str, dict[str, Any], list[Any], list[Any]]
CASES: list[Case] = [
    ("integer", {"type": "integer"}, [0, -7, 12345], [1.5, "1", True, None]),
    ("number", {"type": "number"}, [0, -1.5, 1e30], ["1", None, []]),
    ("string", {"type": "string"}, ["", 'é\n"', "日本"], [1, None]),
    ("boolean", {"type": "boolean"}, [True, False], [0, "true"]),
    ("null", {"type": "null"}, [None], [0, ""]),
    ("types", {"type": ["integer", "null"]}, [3, None], ["3", 1.5]),
    ("enum", {"enum": ["red", 3, None, [1]]}, ["red", 3, None, [1]], ["blue", 4, [2]]),
    ("const", {"const": {"a": 1}}, [{"a": 1}], [{"a": 2}, {}]),
    ("minimum", {"type": "integer", "minimum": 3, "maximum": 12}, [3, 10, 12], [2, 13, -3]),
    ("exclusive bounds", {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}, [1, 9], [0, 10]),
    ("number bounds", {"type": "number", "minimum": 0, "maximum": 1}, [0, 0.5, 1], [1.5, -0.5]),
    ("multipleOf", {"type": "integer", "multipleOf": 7}, [0, 7, 49], [1, 50]),
    ("minLength", {"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "日本語", "abcd"], ["a", "abcde"]),
    ("pattern", {"type": "string", "pattern": "^[a-f]+[0-9]{2}$"}, ["abc12", "f00"], ["abc1", "xyz12"]),
    ("date", {"type": "string", "format": "date"}, ["2026-11-22"], ["22.11.2026", "2026-13-01"]),
    ("uuid", {"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ("items", {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, None]]),
    (
        "minItems",
        {"type": "array", "items": {}, "minItems": 2, "maxItems": 3},
        [[1, 2], [1, "a", None]],
        [[1], [1] * 4],
    ),
    (
        "prefixItems",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[1, "a"]],
        [["a", 1], [1, "a", 2]],
    ),
    (
        "properties",
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        [{}, {"a": 1}, {"b": "x"}],
        [{"a": "x"}],
    ),
    (
        "required",
        {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
        [{"b": 1}, {"a": 1, "b": 2}],
        [{}, {"a": 1}],
    ),
    (
        "no additional",
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        [{}, {"a": 1}],
        [{"b": 1}],
    ),
    ("additional", {"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"x": 1}], [{"x": "a"}]),
    (
        "patternProperties",
        {"type": "object", "patternProperties": {"^n_": {"type": "number"}}, "additionalProperties": False},
        [{}, {"n_a": 1}],
        [{"n_a": "x"}, {"x": 1}],
    ),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, [5, "a"], ["ab", None]),
    ("allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, [3, 5], [2, 6]),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "null"}]}, [5, None], ["a"]),
    (
        "nested",
        {"type": "object", "properties": {"p": PERSON}, "required": ["p"], "additionalProperties": False},
        [{"p": {"name": "Ada", "age": 36}}],
        [{"p": {"name": "", "age": 36}}, {"p": {"name": "Ada", "age": -1}}],
    ),
    ("recursion", TREE, [{"value": 1, "children": [{"value": 2, "children": []}]}], [{"value": 1, "children": [{}]}]),
    (
        "tool calls",
        CALLS,
        [[{"name": "add_person", "arguments": {"name": "Ada", "age": 36}}]],
        [[], [{"name": "add_person", "arguments": {"age": 36}}], [{"name": "other", "arguments": {}}]],
    ),
]


class Matcher(NamedTuple):
    fill_mask: Callable[[], np.ndarray]  # int32 words [vocabulary / 32], a bit per token
    accept: Callable[[int], None]


Compile = Callable[[dict[str, Any]], Callable[[], Matcher]]


def with_llguidance(tokenizer: Tokenizer) -> Compile:
    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        compiled = GrammarCompiler.compile(compiler, Grammar("json_schema", schema))

        def start() -> Matcher:
            state, answer = compiled.start(), []
            words = np.zeros((1, compiled.num_words), np.int32)

            def fill_mask() -> np.ndarray:
                fill_masks([MaskRows(state, 0)], words)
                return words[0]

            def accept(token: int) -> None:
                answer.append(token)
                state.follow(answer)

            return Matcher(fill_mask, accept)

        return start

    compiler = GrammarCompiler(tokenizer)
    return compile_schema


def with_xgrammar(tokenizer: Tokenizer) -> Compile:
    import xgrammar

    size = tokenizer.vocab_size
    vocabulary = [b"" if i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in range(size)]
    info = xgrammar.TokenizerInfo(
        vocabulary, xgrammar.VocabType.RAW, vocab_size=size, stop_token_ids=list(tokenizer.eos_ids)
    )
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile_schema(schema: dict[str, Any]) -> Callable[[], Matcher]:
        compiled = compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

        def start() -> Matcher:
            matcher = xgrammar.GrammarMatcher(compiled)
            words = xgrammar.allocate_token_bitmask(1, size)

            def fill_mask() -> np.ndarray:
                if not matcher.fill_next_token_bitmask(words):  # all may come
                    words.fill_(-1)
                return words[0].numpy()

            return Matcher(fill_mask, matcher.accept_token)

        return start

    return compile_schema


def walk(start: Callable[[], Matcher], tokens: list[int], eos: int) -> Iterator[tuple[bool, float]]:
    """Of each token, and of the end: whether it may come, and the seconds that its mask took. Ends at the first that
    may not."""
    matcher = start()
    for token in [*tokens, eos]:
        before = time.perf_counter()
        words = matcher.fill_mask()
        seconds = time.perf_counter() - before
        allowed = bool(int(words[token // 32]) >> token % 32 & 1)
        yield allowed, seconds
        if not allowed:
            return
        if token != eos:
            matcher.accept(token)


def judge(compile_schema: Compile, tokenizer: Tokenizer) -> dict[str, Any]:
    compile_schema({"type": "object"})  # loads the vocabulary
    compiling, masks, refused, taken, unusable = [], [], [], [], {}
    eos = tokenizer.eos_ids[0]
    for name, schema, right, wrong in CASES:
        before = time.perf_counter()
        try:
            start = compile_schema(schema)
        except Exception as error:  # noqa: BLE001 (of another package, which has none of its own)
            unusable[name] = str(error)[:200]
            continue
        compiling.append(time.perf_counter() - before)
        for values, is_right in ((right, True), (wrong, False)):
            for value in values:
                text = json.dumps(value, ensure_ascii=False)
                steps = list(walk(start, tokenizer.encode(text, add_special=False), eos))
                masks += [seconds for _, seconds in steps]
                if steps[-1][0] != is_right:
                    (refused if is_right else taken).append(f"{name}: {text}")
    return {
        "compile_ms": {"median": 1e3 * statistics.median(compiling), "max": 1e3 * max(compiling)},
        "mask_us": {"median": 1e6 * statistics.median(masks), "99%": 1e6 * float(np.quantile(masks, 0.99))},
        "refused_wrongly": refused,
        "taken_wrongly": taken,
        "unusable": unusable,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_text(options.model, fetch(options.model).path).tokenizer
    record: dict[str, Any] = {"machine": machine(), "model": options.model, "vocabulary": tokenizer.vocab_size}
    record["cases"] = sum(len(right) + len(wrong) for _, _, right, wrong in CASES)
    for name, make in (("llguidance", with_llguidance), ("xgrammar", with_xgrammar)):
        record[name] = {"version": version(name), **judge(make(tokenizer), tokenizer)}
        print(name, json.dumps(record[name], indent=1, ensure_ascii=False), flush=True)
    if options.save:
        print(save("grammars", record))


if __name__ == "__main__":
    main()
