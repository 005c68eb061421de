"""Which part of a model is whose."""

from __future__ import annotations

from dataclasses import dataclass

# Parts of a vocabulary are whole groups of the sampler (1,024 tokens), which ranks can then draw from together.
_VOCABULARY_UNIT = 1024
_SMALL_VOCABULARY_UNIT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """The rank-th of `size` parts."""

    rank: int = 0
    size: int = 1

    def copy_of(self, num_parts: int) -> tuple[int, int]:
        """(index, count) of this rank's part where there are `num_parts` indivisible ones: with fewer of them
        than ranks, several ranks hold the same one."""
        count = min(self.size, num_parts)
        return self.rank * count // self.size, count

    def vocabulary_size(self, vocab_size: int) -> int:
        """Tokens of each rank's part: equal ones, so that the last may reach past the vocabulary's end."""
        part = -(-vocab_size // self.size)
        unit = _VOCABULARY_UNIT if part >= 8 * _VOCABULARY_UNIT else _SMALL_VOCABULARY_UNIT
        return -(-part // unit) * unit

    def vocabulary(self, vocab_size: int) -> range:
        """This rank's tokens; fewer than `vocabulary_size` at the end."""
        part = self.vocabulary_size(vocab_size)
        return range(min(self.rank * part, vocab_size), min((self.rank + 1) * part, vocab_size))
