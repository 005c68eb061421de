"""Where two texts differ, word by word."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

_TOKEN = re.compile(r"[A-Za-z0-9_]+|\s+|.", re.DOTALL)
_MAX_TOKENS = 1200  # of what differs; more is marked as a whole, since comparing takes time quadratic in it


class Segment(NamedTuple):
    is_changed: bool
    text: str


def differences(a: str, b: str) -> tuple[list[Segment], list[Segment]]:
    """Both texts in segments; what the other text hasn't is changed."""
    ours, theirs = _TOKEN.findall(a), _TOKEN.findall(b)
    head = _common(ours, theirs)
    tail = _common(ours[head:][::-1], theirs[head:][::-1])
    middle_a, middle_b = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    if max(len(middle_a), len(middle_b)) > _MAX_TOKENS:
        blocks = [(True, middle_a, middle_b)]
    else:
        matcher = difflib.SequenceMatcher(None, middle_a, middle_b, autojunk=False)
        blocks = [(tag != "equal", middle_a[i:j], middle_b[k:m]) for tag, i, j, k, m in matcher.get_opcodes()]
    start, end = ours[:head], ours[len(ours) - tail :]
    blocks = [(False, start, start), *blocks, (False, end, end)]
    return _segments([block[:2] for block in blocks]), _segments([(block[0], block[2]) for block in blocks])


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Tokens that both begin with."""
    return next((number for number, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _segments(blocks: Sequence[tuple[bool, Sequence[str]]]) -> list[Segment]:
    """Joined where neighbours are of a kind; none is empty."""
    segments: list[Segment] = []
    for is_changed, tokens in blocks:
        text = "".join(tokens)
        if text and segments and segments[-1].is_changed == is_changed:
            segments[-1] = Segment(is_changed, segments[-1].text + text)
        elif text:
            segments.append(Segment(is_changed, text))
    return segments
