"""What the benchmarks of quality are measured on: a held-out text in windows, and questions."""

from __future__ import annotations

from pathlib import Path

TEXT = Path(__file__).parent / "data" / "gpl-3.txt"
WINDOW = 512  # tokens; the second half of each is scored
QUESTIONS = [
    "Why is the sky blue?", "Name three primary colours.", "Write a haiku about rain.", "What is a prime number?",
    "Explain recursion to a child.", "Who was Ada Lovelace?", "What is 17 + 25?", "Translate 'good morning' to German.",
    "Give me a recipe for pancakes.", "What causes tides?", "Write a Python function that reverses a string.",
    "What is the boiling point of water?", "Summarize the plot of Romeo and Juliet.", "How do vaccines work?",
    "List the planets of the solar system.", "What is the difference between a list and a tuple in Python?",
]  # fmt: skip


def windows_of(token_ids: list[int]) -> list[list[int]]:
    """The text's whole windows."""
    return [token_ids[start : start + WINDOW] for start in range(0, len(token_ids) - WINDOW + 1, WINDOW)]
