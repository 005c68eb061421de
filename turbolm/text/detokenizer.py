"""Token ids to text, a few at a time, without ever cutting a character in two."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol


class TokenBytes(Protocol):
    """What a detokenizer needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """The token's part of the UTF-8 text, a leading space included; a special token's spelling."""

    def decode(self, token_ids: list[int], /, *, skip_special: bool = True) -> str: ...


class Detokenizer:
    """The text of one answer as its tokens come. What `push` and `finish` return, concatenated, is
    what the tokenizer decodes all the tokens to. Each byte is decoded once.

    Bytes of an incomplete character wait for the rest of it; those that can't be part of a character
    become U+FFFD, one per maximal part (the practice of the Unicode standard and of byte-level
    tokenizers).
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        skip_special: bool = True,
        keep_ids: Iterable[int] = (),
        is_continuation: bool = False,
    ) -> None:
        """`skip_special` leaves special tokens out, except `keep_ids`: the markers that a parser
        looks for. `is_continuation`: the text goes on right after earlier text, so that the space
        with which SentencePiece begins a word is kept at the start too."""
        self._tokenizer = tokenizer
        kept = frozenset(keep_ids)
        skipped = tokenizer.special_ids if skip_special else frozenset()
        self._skipped = skipped - kept if kept else skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = not is_continuation

    def push(self, token_ids: Iterable[int]) -> str:
        """The further text that is complete with these tokens."""
        token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
        if not self._is_first:
            return self._decoder.decode(b"".join([token_bytes(token) for token in token_ids if token not in skipped]))
        shown = [token_id for token_id in token_ids if token_id not in skipped]
        pieces = [token_bytes(token_id) for token_id in shown]
        for index, (token_id, piece) in enumerate(zip(shown, pieces, strict=True)):
            if piece:
                self._is_first = False
                pieces[index] = self._first_bytes(token_id, piece)
                break
        return self._decoder.decode(b"".join(pieces))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)

    def _first_bytes(self, token_id: int, piece: bytes) -> bytes:
        # Whether a leading space of the text is dropped is a matter of the tokenizer's decoder: ask
        # it, once, unless the token is a fragment of a character.
        try:
            piece.decode()
        except UnicodeDecodeError:
            return piece
        return self._tokenizer.decode([token_id], skip_special=False).encode()
