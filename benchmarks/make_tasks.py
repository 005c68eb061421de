"""Writes turbolm/eval/examples/tasks.jsonl: questions with right answers that small models solve in part.

Made from word lists and a seed, so nothing of it is anybody's: sentiment, common sense and word meanings by the
likeliest choice; extraction, arithmetic and JSON by what the model writes. A solved one or two come before
most questions, for models that follow examples better than instructions.

    python benchmarks/make_tasks.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turbolm.eval.data import EXAMPLES

SEED = 7
Fields = dict[str, Any]
Turn = tuple[str, str]

GOOD = ("delicious", "friendly", "brilliant", "comfortable", "charming", "reliable", "wonderful", "spotless")
BAD = ("terrible", "rude", "broken", "boring", "filthy", "useless", "disappointing", "awful")
THINGS = ("soup", "hotel room", "film", "waiter", "phone", "train", "concert", "sofa", "museum", "laptop")
PRAISE = ("I would come back any time.", "We loved it.", "It made my day.", "I recommend it to everybody.")
BLAME = ("I want my money back.", "Never again.", "It ruined our day.", "Stay away from it.")

#: (question, right, wrong)
SENSE: tuple[tuple[str, str, str], ...] = (
    ("To cut paper, you use", "scissors", "a spoon"), ("To see in the dark, you use", "a lamp", "a fork"),
    ("Fish live in", "water", "trees"), ("Birds build", "nests", "cars"), ("Ice is", "cold", "hot"),
    ("Fire is", "hot", "wet"), ("Bees make", "honey", "bread"), ("Cows give", "milk", "juice"),
    ("In winter people wear", "coats", "swimsuits"), ("At night the sky is", "dark", "green"),
    ("A baker makes", "bread", "shoes"), ("A dentist looks after", "teeth", "roofs"),
    ("When it rains, you open", "an umbrella", "a book"), ("To open a locked door, you need", "a key", "a pillow"),
    ("A bicycle has two", "wheels", "wings"), ("Letters are delivered by the", "post office", "bakery"),
    ("You sleep in a", "bed", "bathtub"), ("You wash your hands with", "soap", "butter"),
    ("To hang a picture, you need a nail and a", "hammer", "pencil"), ("The sun rises in the", "east", "west"),
    ("Trees grow from", "seeds", "stones"), ("A week has seven", "days", "months"), ("Snow is", "white", "purple"),
    ("A doctor works in a", "hospital", "garage"), ("Planes land at an", "airport", "oven"),
    ("Children learn to read at", "school", "sea"), ("Books are borrowed from a", "library", "butcher"),
    ("You hear with your", "ears", "knees"), ("You smell with your", "nose", "elbow"), ("Sugar is", "sweet", "salty"),
    ("A thermometer measures", "temperature", "weight"), ("A clock shows the", "time", "price"),
    ("Ships sail on the", "sea", "road"), ("Grass is", "green", "blue"), ("A knife is", "sharp", "soft"),
    ("A pillow is", "soft", "sharp"), ("The opposite of early is", "late", "fast"),
    ("Stones are", "hard", "hungry"), ("A farmer works on a", "farm", "stage"), ("Wool comes from", "sheep", "cows"),
)  # fmt: skip

#: (word, its kind); the other kinds are the wrong choices.
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("horse", "eagle", "salmon", "spider", "goat", "tiger", "pigeon", "whale"),
    "colour": ("red", "yellow", "purple", "brown", "orange", "grey", "pink", "white"),
    "country": ("France", "Brazil", "Japan", "Kenya", "Canada", "Poland", "India", "Peru"),
    "vehicle": ("bus", "truck", "bicycle", "train", "tractor", "ship", "van", "tram"),
    "job": ("teacher", "plumber", "nurse", "pilot", "farmer", "lawyer", "baker", "painter"),
}
NAMES = ("Anna", "Bruno", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Irene", "Jonas")
CITIES = ("Lisbon", "Osaka", "Nairobi", "Toronto", "Vienna", "Lima", "Cairo", "Oslo", "Seoul", "Prague")
GOODS = ("books", "lamps", "chairs", "bottles", "tickets", "apples", "boxes", "stamps")


def sentiment(rng: random.Random) -> Iterator[Fields]:
    def review(is_good: bool) -> str:
        word, end = rng.choice(GOOD if is_good else BAD), rng.choice(PRAISE if is_good else BLAME)
        return f"Review: The {rng.choice(THINGS)} was {word}. {end}\nSentiment:"

    while True:
        first, second, is_good = rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5
        shots = [f"{review(shot)} {'positive' if shot else 'negative'}\n\n" for shot in (first, second)]
        choices = [" positive", " negative"]
        yield {"prompt": "".join(shots) + review(is_good), "choices": choices, "reference": choices[not is_good]}


def sense(rng: random.Random) -> Iterator[Fields]:
    for start, right, wrong in rng.sample(SENSE, len(SENSE)):
        choices = [f" {right}.", f" {wrong}."]
        yield {"prompt": start, "choices": rng.sample(choices, 2), "reference": choices[0]}


def meaning(rng: random.Random) -> Iterator[Fields]:
    pairs = [(word, kind) for kind, words in KINDS.items() for word in words]
    choices = [f" {kind}." for kind in KINDS]
    for word, kind in rng.sample(pairs, len(pairs)):
        yield {"prompt": f"The word '{word}' is the name of a", "choices": choices, "reference": f" {kind}."}


def arithmetic(rng: random.Random) -> Iterator[Fields]:
    def task() -> Turn:
        first, second = rng.randint(2, 30), rng.randint(2, 9)
        if rng.random() < 0.5:
            return f"{first} + {second} =", str(first + second)
        return f"{first + second} - {second} =", str(first)

    while True:
        *shots, (question, right) = [task() for _ in range(4)]
        if question not in [shot[0] for shot in shots]:
            yield written([f"{asked} {answer}\n" for asked, answer in shots], question, right, 4)


def extraction(rng: random.Random) -> Iterator[Fields]:
    def task() -> Turn:
        name, city, count, goods = rng.choice(NAMES), rng.choice(CITIES), rng.randint(3, 90), rng.choice(GOODS)
        asked, right = rng.choice((("City", city), ("Person", name), ("Number", str(count))))
        return f"Text: {name} flew to {city} and bought {count} {goods} there.\n{asked}:", right

    while True:
        *shots, (question, right) = [task() for _ in range(3)]
        yield written([f"{asked} {answer}\n\n" for asked, answer in shots], question, right, 5)


def written(shots: Sequence[str], question: str, right: str, max_tokens: int) -> Fields:
    """A prompt whose continuation begins with the right answer, as a word of its own."""
    check = {"kind": "regex", "pattern": rf"^\s*{right}\b"}
    return {"prompt": "".join(shots) + question, "reference": right, "check": check, "max_tokens": max_tokens}


def record(rng: random.Random) -> Iterator[Fields]:
    def task() -> tuple[str, Fields]:
        found = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "age": rng.randint(20, 80)}
        return f"{found['name']} is {found['age']} years old and lives in {found['city']}.", found

    while True:
        (shot, answer), (question, right) = task(), task()
        schema = {
            "type": "object",
            "properties": {key: {"const": value} for key, value in right.items()},
            "required": list(right),
            "additionalProperties": False,
        }
        roles = (("user", shot), ("assistant", json.dumps(answer)), ("user", question))
        messages = [{"role": role, "content": text} for role, text in roles]
        yield {"messages": messages, "schema": schema, "max_tokens": 32}


#: What makes the items of a group, and how many of them.
GROUPS: dict[str, tuple[Callable[[random.Random], Iterator[Fields]], int]] = {
    "sentiment": (sentiment, 40),
    "common sense": (sense, 40),
    "word meanings": (meaning, 40),
    "arithmetic": (arithmetic, 40),
    "extraction": (extraction, 40),
    "json": (record, 20),
}


def items() -> Iterator[Fields]:
    """All of them; no two of a group ask the same."""
    for name, (make, count) in GROUPS.items():
        seen: set[str] = set()
        found = make(random.Random(f"{SEED} {name}"))
        while len(seen) < count:
            fields = next(found)
            asked = fields["prompt"] if "prompt" in fields else fields["messages"][-1]["content"]
            if asked not in seen:
                seen.add(asked)
                yield {"id": f"{name} {len(seen)}", "group": name, **fields}


def main() -> None:
    path: Path = EXAMPLES["examples/tasks"]
    path.write_text("".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in items()), encoding="utf-8")


if __name__ == "__main__":
    main()
