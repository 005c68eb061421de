"""What tests of grammars share: texts fed to a grammar, and random texts that it allows."""

from __future__ import annotations

import random

import numpy as np
import pytest

from turbolm.grammar import CompiledGrammar, GrammarState, MaskRows, fill_masks
from turbolm.text import Tokenizer


def _allowed(state: GrammarState, num_words: int) -> set[int]:
    """The tokens that may come next."""
    words = np.full((1, num_words), -1, np.int32)
    fill_masks([MaskRows(state, 0)], words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def _accepts(grammar: CompiledGrammar, tokens: list[int], eos: int) -> bool:
    """Whether these tokens, and then the end, are allowed one by one."""
    state = grammar.start()
    for count, token in enumerate([*tokens, eos]):
        state.follow(tokens[:count])
        if token not in _allowed(state, grammar.num_words):
            return False
    return True


def _random_answer(grammar: CompiledGrammar, tokenizer: Tokenizer, seed: int, limit: int = 3000) -> list[int]:
    """Tokens of an answer that ends. What closes something is likelier than it would be by chance, so that it does."""
    choose, answer, state = random.Random(seed), [], grammar.start()
    eos = tokenizer.eos_ids[0]
    for _ in range(limit):
        state.follow(answer)
        options = _allowed(state, grammar.num_words)
        assert options, state.error
        if eos in options and (len(options) == 1 or choose.random() < 0.5):
            return answer
        closing = sorted(options & set(b'"]}0'))
        ordinary = sorted(options & set(range(32, 127)))
        answer.append(
            choose.choice(closing if closing and choose.random() < 0.4 else ordinary or sorted(options - {eos}))
        )
    raise AssertionError("the answer doesn't end")


@pytest.fixture(scope="session")
def allowed():
    return _allowed


@pytest.fixture(scope="session")
def accepts():
    return _accepts


@pytest.fixture(scope="session")
def random_answer():
    return _random_answer
