from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from turbolm.text.detokenizer import Detokenizer


class Toy:
    """Tokens are byte strings; some are special."""

    def __init__(self, tokens: list[bytes], special: set[int] = frozenset()) -> None:
        self.tokens = tokens
        self.special_ids = frozenset(special)
        self.num_token_bytes = self.num_decodes = 0

    def token_bytes(self, token_id: int) -> bytes:
        self.num_token_bytes += 1
        return self.tokens[token_id]

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        self.num_decodes += 1
        kept = [i for i in token_ids if not (skip_special and i in self.special_ids)]
        return b"".join(self.tokens[i] for i in kept).decode("utf-8", "replace")


class Wrapped:
    """A `tokenizers` tokenizer, with its own decoder as the oracle."""

    def __init__(self, tokenizer: Tokenizer, token_bytes: list[bytes], special: set[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = token_bytes
        self.special_ids = frozenset(special)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special)


def byte_level() -> Wrapped:
    """Every byte, a few words and characters in pieces, one special token."""
    alphabet = sorted(ByteLevel.alphabet())
    to_byte = {}
    for code in range(256):  # a byte's letter, learnt from the pre-tokenizer itself
        if code < 128:
            letters = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(code))[0][0]
            to_byte[letters] = code
    for point in range(0x80, 0x110000, 0x40 - 1):
        if 0xD800 <= point < 0xE000:
            continue
        letters = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(point))
        for letter, code in zip("".join(piece for piece, _ in letters), chr(point).encode(), strict=True):
            to_byte[letter] = code
    known = [letter for letter in alphabet if letter in to_byte]
    words = ["Ġhello", "ä½", "ł", "ðŁĺ", "Ģ", "Ġ"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(known + words))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    token_bytes = [bytes(to_byte[letter] for letter in piece) for piece in vocabulary] + [b"<|end|>"]
    return Wrapped(tokenizer, token_bytes, {len(vocabulary)})


def sentencepiece() -> Wrapped:
    """Llama 2's way: ▁ for a space, one space dropped at the start of the text, byte tokens."""
    pieces = ["▁", "▁▁", "▁Hello", "▁world", "Hello", "a▁b", "é", "世界", "\n", "<0x20>", "<0xE4>", "<0xBD>", "<0xA0>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    token_bytes = [
        bytes([int(piece[1:-1], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()
        for piece in pieces
    ]
    return Wrapped(tokenizer, [*token_bytes, b"<s>"], {len(pieces)})


BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece()


def run(detokenizer: Detokenizer, token_ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces of text for `token_ids`, pushed in groups of `sizes`."""
    pieces, position = [], 0
    for size in sizes:
        pieces.append(detokenizer.push(token_ids[position : position + size]))
        position += size
    return [*pieces, detokenizer.push(token_ids[position:]), detokenizer.finish()]


SIZES = st.lists(st.integers(0, 3), max_size=40)


@given(st.lists(st.integers(0, len(BYTE_LEVEL.tokens) - 1), max_size=40), SIZES, st.booleans())
def test_byte_level_equals_the_tokenizers_decode(token_ids, sizes, skip):
    pieces = run(Detokenizer(BYTE_LEVEL, skip_special=skip), token_ids, sizes)
    assert "".join(pieces) == BYTE_LEVEL.decode(token_ids, skip_special=skip)


WHOLE = range(10)  # tokens of whole characters
SPM_IDS = st.lists(st.one_of(st.sampled_from([*WHOLE, 13]).map(lambda i: [i]), st.just([10, 11, 12])), max_size=20)


@given(SPM_IDS, SIZES, st.booleans())
def test_sentencepiece_equals_the_tokenizers_decode(groups, sizes, skip):
    token_ids = [i for group in groups for i in group]
    pieces = run(Detokenizer(SENTENCEPIECE, skip_special=skip), token_ids, sizes)
    assert "".join(pieces) == SENTENCEPIECE.decode(token_ids, skip_special=skip)


def test_sentencepiece_leading_space():
    hello, world, special = 2, 3, 13
    assert Detokenizer(SENTENCEPIECE).push([hello, world]) == "Hello world"
    assert Detokenizer(SENTENCEPIECE).push([special, hello]) == "Hello"
    assert Detokenizer(SENTENCEPIECE, skip_special=False).push([special, hello]) == "<s> Hello"
    assert Detokenizer(SENTENCEPIECE, is_continuation=True).push([world]) == " world"


@given(st.text(max_size=30), st.data())
def test_no_piece_is_ever_broken(text, data):
    """Valid UTF-8, cut anywhere: no U+FFFD that was not in the text, and each character comes as
    soon as its last byte is there."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=len(raw))) | {0, len(raw)})
    tokens = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    detokenizer = Detokenizer(Toy(tokens))
    so_far = ""
    for index, end in enumerate(cuts[1:]):
        so_far += detokenizer.push([index])
        assert so_far == raw[:end].decode("utf-8", "ignore")
    assert detokenizer.finish() == ""
    assert so_far == text


@given(st.lists(st.binary(max_size=4), max_size=20), SIZES)
def test_any_bytes(tokens, sizes):
    token_ids = list(range(len(tokens)))
    assert "".join(run(Detokenizer(Toy(tokens)), token_ids, sizes)) == b"".join(tokens).decode("utf-8", "replace")


def test_bytes_that_become_invalid_are_replaced_at_once():
    detokenizer = Detokenizer(Toy([b"\xe4\xbd", b"a", b"\xff", b"\xf0\x9f"]))
    assert detokenizer.push([0]) == ""
    assert detokenizer.push([1]) == "\ufffda"
    assert detokenizer.push([2]) == "\ufffd"
    assert detokenizer.push([3]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a😀b"),
        ({"skip_special": False}, "a\ufffd<call>\ufffd\ufffd<end>b"),
        ({"keep_ids": [2]}, "a\ufffd<call>\ufffd\ufffdb"),
    ],
)
def test_special_tokens(options, expected):
    smile = "😀".encode()
    toy = Toy([b"a", smile[:2], b"<call>", smile[2:], b"<end>", b"b"], {2, 4})
    detokenizer = Detokenizer(toy, **options)
    assert detokenizer.push(range(6)) + detokenizer.finish() == expected


def test_every_token_is_looked_up_once():
    toy = Toy([b"ab", "é".encode()])
    detokenizer = Detokenizer(toy)
    for _ in range(500):
        detokenizer.push([0, 1])
    assert toy.num_token_bytes == 1000
    assert toy.num_decodes <= 1
