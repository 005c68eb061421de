"""Questions that short benchmarks miss, made from a seed: no download, and no model has learned them.

long answers, exact JSON in tool calls, a fact in a long context, chains of arithmetic, Chinese and English.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from turbolm.errors import ConfigError, nearest
from turbolm.eval.data import Item, read_item

_NAMES = ("Ada", "Bela", "Chen", "Dora", "Emil", "Fatma", "Goro", "Hana", "Ivan", "Jun", "Kofi", "Lena")
_CITIES = ("Lisbon", "Osaka", "Quito", "Tromsø", "Nairobi", "Chengdu", "Galway", "Izmir")
_GOODS = ("lanterns", "kettles", "maps", "violins", "seeds", "lenses", "anchors", "candles")
_PLACES = ("harbour", "market", "library", "station", "old mill", "observatory", "garden", "bridge")
_WORDS = {
    "one": "一", "two": "二", "three": "三", "four": "四", "five": "五", "six": "六", "seven": "七", "eight": "八",
}  # fmt: skip
_COLOURS = {"red": "红色", "blue": "蓝色", "green": "绿色", "white": "白色", "black": "黑色", "yellow": "黄色"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "book_shipment",
        "description": "Book the transport of goods.",
        "parameters": {
            "type": "object",
            "properties": {
                "goods": {"type": "string"},
                "count": {"type": "integer"},
                "destination": {"type": "string"},
                "fragile": {"type": "boolean"},
            },
            "required": ["goods", "count", "destination", "fragile"],
        },
    },
}
_MAX_DRAWS = 20  # for each item, until one is new
_SENTENCES = (
    "In {city}, {name} counted {count} {goods} at the {place} before noon.",
    "The {place} of {city} was closed for {count} days while {name} repaired it.",
    "{name} wrote that {count} {goods} had arrived from {city} without a note.",
    "Nobody at the {place} remembered why {name} had left {city} with {count} {goods}.",
)


def make_probes(kinds: tuple[str, ...], count: int, seed: int, context_words: int) -> list[Item]:
    """`count` different items of each kind, or as many as there are; always the same of the same arguments.
    `context_words`: how long the texts are in which a fact hides. ConfigError for an unknown kind."""
    items: dict[str, Item] = {}  # by key: two equal questions would count one answer twice
    for kind in kinds:
        if kind not in PROBES:
            raise ConfigError(f"unknown probe '{kind}'.{nearest(kind, PROBES)} Known: {', '.join(PROBES)}")
        rng = random.Random(f"{seed} {kind}")
        wanted = len(items) + count
        for _ in range(_MAX_DRAWS * count):
            if len(items) == wanted:
                break
            number = len(items) - wanted + count + 1
            item = read_item({"id": f"{kind} {number}", **PROBES[kind](rng, context_words)}, 0, group=kind)
            items.setdefault(item.key, item)
    return list(items.values())


def _ask(question: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **fields}


def _long_answer(rng: random.Random, _words: int) -> dict[str, Any]:
    """A list that must be kept up for hundreds of tokens; one slip fails it."""
    first, step, count = rng.randint(2, 60), rng.randint(2, 9), 60
    numbers = range(first, first + step * count, step)
    return _ask(
        f"Count from {first} in steps of {step} until you have written {count} numbers. Write nothing but the numbers, "
        f"separated by commas and spaces, beginning with: {', '.join(map(str, numbers[:3]))}",
        reference=", ".join(map(str, numbers)),
        check="contains",
        max_tokens=512,
    )


def _tool_call(rng: random.Random, _words: int) -> dict[str, Any]:
    goods, city, count, fragile = rng.choice(_GOODS), rng.choice(_CITIES), rng.randint(2, 9000), rng.random() < 0.5
    arguments = {"goods": goods, "count": count, "destination": city, "fragile": fragile}
    return _ask(
        f"Book {count} {goods} to {city}. They are {'' if fragile else 'not '}fragile.",
        tools=[_TOOL],
        reference=[{"name": "book_shipment", "arguments": arguments}],
        max_tokens=128,
    )


def _json(rng: random.Random, _words: int) -> dict[str, Any]:
    """The same as text, for models whose template knows no tools."""
    record = {"name": rng.choice(_NAMES), "city": rng.choice(_CITIES), "count": rng.randint(10, 9999)}
    constants = {key: {"const": value} for key, value in record.items()}
    return _ask(
        f"{record['name']} lives in {record['city']} and owns {record['count']} {rng.choice(_GOODS)}. Answer with a "
        'JSON object alone, with the keys "name" (text), "city" (text) and "count" (number). Example: '
        + json.dumps({"name": "Zoe", "city": "Riga", "count": 5}),
        schema={"type": "object", "properties": constants, "required": list(record), "additionalProperties": False},
        max_tokens=64,
    )


def _retrieval(rng: random.Random, words: int) -> dict[str, Any]:
    name, code = rng.choice(_NAMES), rng.randint(100_000, 999_999)
    sentences: list[str] = []
    num_words = 0
    while num_words < words:
        sentence = rng.choice(_SENTENCES).format(
            city=rng.choice(_CITIES), name=rng.choice(_NAMES), count=rng.randint(2, 99), goods=rng.choice(_GOODS),
            place=rng.choice(_PLACES),
        )  # fmt: skip
        sentences.append(sentence)
        num_words += len(sentence.split())
    sentences.insert(rng.randrange(len(sentences)), f"The secret code of {name} is {code}.")
    return _ask(
        f"{' '.join(sentences)}\n\nWhat is the secret code of {name}? Answer with the number alone.",
        reference=str(code),
        check="contains",
        max_tokens=24,
    )


def _arithmetic(rng: random.Random, _words: int) -> dict[str, Any]:
    value = start = rng.randint(5, 50)
    steps = []
    for _ in range(4):
        operand = rng.randint(2, 9)
        kind = rng.choice(("add", "subtract", "multiply by"))
        value = {"add": value + operand, "subtract": value - operand, "multiply by": value * operand}[kind]
        steps.append(f"{kind} {operand}")
    return _ask(
        f"Start with {start}. Then {', then '.join(steps)}. Work step by step, and end with the result as a number.",
        reference=value,
        max_tokens=256,
    )


def _languages(rng: random.Random, _words: int) -> dict[str, Any]:
    """A word of one language asked for in the other."""
    words = {**_WORDS, **_COLOURS}
    english = rng.choice(sorted(words))
    if rng.random() < 0.5:
        chinese = words[english].removesuffix("色")
        return _ask(f"把英文单词“{english}”翻译成中文，只写译文。", reference=chinese, max_tokens=24)
    question = f"Translate the Chinese word “{words[english]}” into English. Answer with one word."
    return _ask(question, reference=english, max_tokens=24)


PROBES: Mapping[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "long answer": _long_answer,
    "tool call": _tool_call,
    "json": _json,
    "retrieval": _retrieval,
    "arithmetic": _arithmetic,
    "languages": _languages,
}
