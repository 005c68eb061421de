"""Grammars on rows of logits: what may not come next gets -inf."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from turbolm.grammar import CompiledGrammar, GrammarState, MaskRows, Words, fill_masks
from turbolm.types import Sequence

if TYPE_CHECKING:
    from turbolm.engine.sampler import Choice


class Constraints:
    """Keeps each sequence's place in its grammar, and forgets it with the sequence."""

    def __init__(self) -> None:
        self._states: weakref.WeakKeyDictionary[Sequence, GrammarState] = weakref.WeakKeyDictionary()

    def error(self, sequence: Sequence) -> str | None:
        """Why its grammar allows nothing more."""
        state = self._states.get(sequence)
        return None if state is None else state.error

    def apply(self, logits_rv: Tensor, choices: Rows[Choice]) -> None:
        """In place; a row per choice. The choices of a sequence follow each other: without drafts, with the first, with
        the first two …"""
        rows = [row for row, choice in enumerate(choices) if choice.sequence.request.params.grammar is not None]
        if not rows:
            return
        words_kw = np.full((len(rows), -(-logits_rv.shape[1] // 32)), -1, np.int32)
        constrained = [choices[row] for row in rows]
        fill_masks(self._plan(constrained), words_kw)
        for words, choice in zip(words_kw, constrained, strict=True):
            if choice.num_output < choice.sequence.request.params.min_tokens:
                _postpone(words, choice.stops)
        is_banned_kv = _unpack(words_kw, logits_rv)
        if len(rows) == len(choices):
            logits_rv.masked_fill_(is_banned_kv, float("-inf"))
        else:
            index = torch.tensor(rows, device=logits_rv.device)
            logits_rv[index] = logits_rv[index].masked_fill(is_banned_kv, float("-inf"))

    def _plan(self, choices: Rows[Choice]) -> list[MaskRows]:
        """One entry per sequence."""
        plan: list[MaskRows] = []
        for row, choice in enumerate(choices):
            if row + 1 < len(choices) and choices[row + 1].sequence is choice.sequence:
                continue  # the sequence's last choice has all drafts
            state = self._state(choice.sequence)
            state.follow(choice.sequence.token_ids[choice.sequence.num_prompt :])
            plan.append(MaskRows(state, row - len(choice.drafts), choice.drafts))
        return plan

    def _state(self, sequence: Sequence) -> GrammarState:
        state = self._states.get(sequence)
        if state is None:
            compiled = sequence.request.compiled_grammar
            assert isinstance(compiled, CompiledGrammar), "the engine compiles grammars"
            state = self._states[sequence] = compiled.start()
        return state


_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


def _unpack(words_kw: Words, logits_rv: Tensor) -> Tensor:
    """bool [k, v], true where a bit is 0. Devices get the bits: an eighth of the bytes."""
    octets, size = words_kw.view(np.uint8), logits_rv.shape[1]
    if logits_rv.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(octets, axis=1, count=size, bitorder="little")) == 0
    bits = torch.from_numpy(octets).to(logits_rv.device, non_blocking=True)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> places) & 1).flatten(1)[:, :size] == 0


def _postpone(words: Words, stops: Iterable[int]) -> None:
    """Takes the tokens that end an answer out of a mask, unless nothing else may come."""
    kept = words.copy()
    for token in stops:
        words[token // 32] &= ~_BITS[token % 32]
    if not words.any():
        words[:] = kept
