"""Pieces of grammars in Lark's notation, as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from turbolm.text import Tokenizer


def literal(text: str, tokenizer: Tokenizer) -> str:
    """This text. Where it spells control tokens, these tokens."""
    return " ".join(_pieces(text, tokenizer)) or '""'


def _pieces(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    controls = [name for name in tokenizer.special_texts if name in text]
    pattern = "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
    for piece in re.split(f"({pattern})", text) if controls else [text]:
        if piece in controls:
            yield f"<[{tokenizer.token_id(piece)}]>"
        elif piece:
            yield json.dumps(piece, ensure_ascii=False)
