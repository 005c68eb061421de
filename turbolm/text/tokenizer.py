"""`Tokenizer`: text to token ids and back, over one backend (the `tokenizers` library).

Made by `load_tokenizer` (a model folder) or `tokenizer_from_gguf` (a GGUF file's metadata).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from turbolm.errors import CheckpointError, RequestError, UnsupportedModelError


class Tokenizer:
    """Text ↔ token ids. Immutable, so that threads may share it.

    *Special* tokens are the control tokens of the vocabulary (begin and end of text, turn markers).
    Other added tokens ("<think>", user-defined symbols) are ordinary text that has a token of its own.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        chat_templates: Mapping[str, str] | None = None,
        frame: tuple[bool, bool] | None = None,
    ) -> None:
        """`special_tokens` maps roles to tokens as chat templates know them ("bos_token" → "<s>");
        `eos_ids` are end-of-turn tokens besides "eos_token"; `chat_templates` maps names to Jinja
        sources, "default" being the usual one; `frame`: are "bos_token" and "eos_token" put around
        a text (None: the backend's post-processor says). Raises CheckpointError, UnsupportedModelError."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self._plain = _without_special(backend, self._added)
        self._anchored: tuple[tokenizers.Tokenizer, str] | None = None
        self._lock = threading.Lock()
        self._bytes: dict[int, bytes] = {}  # what `token_bytes` found: streams ask for the same ones again and again
        self._is_byte_level = _is_byte_level(backend)
        self.special_tokens = dict(special_tokens)
        self.chat_templates = dict(chat_templates or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise CheckpointError("the tokenizer's vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        """Largest token id + 1. The model's logits may be wider (padding)."""
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self._control = {token.content: (i, token) for i, token in self._added.items() if token.special}
        self.bos_id = self._role_id("bos_token")
        self.pad_id = self._role_id("pad_token")
        first = self._role_id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if first is None else [first]), *eos_ids]))
        """Tokens that end an answer; the first is the "eos_token"."""
        unknown = self._role_id("unk_token")
        self._forbidden = self.special_ids - ({unknown} if unknown is not None else set())
        if frame is None:
            self._prefix, self._suffix = self._find_frame()
        else:
            self._prefix = [self.bos_id] if frame[0] and self.bos_id is not None else []
            self._suffix = [first] if frame[1] and first is not None else []

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        if text is None:
            return None
        token_id: int | None = self._backend.token_to_id(text)
        if token_id is None:
            raise CheckpointError(f"the tokenizer's {role} {text!r} is not in its vocabulary")
        return token_id

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The control tokens, as text spells them."""
        return tuple(self._control)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the usual chat template, None where the model has none."""
        return self.chat_templates.get("default")

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        `add_special`: with the begin (and end) tokens that the model wants around a text.
        `parse_special`: control tokens spelled in `text` become control tokens. Off, as it must be
        for text from users, they become the tokens of their letters.
        Raises RequestError for text that is no valid Unicode.
        """
        return self.encode_batch([text], add_special=add_special, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """`encode` for many texts at once, in parallel."""
        for text in texts:
            check_text(text)
        backend = self._backend if parse_special else self._plain
        if len(texts) == 1:
            # Not through the batch call: it wakes a thread pool, which a later fork would not survive.
            batch = [backend.encode(texts[0], add_special_tokens=False).ids]
        else:
            batch = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if not parse_special:
            batch = [self._respell(ids) for ids in batch]
        if add_special:
            batch = [[*self._prefix, *ids, *self._suffix] for ids in batch]
        return batch

    def encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of a prompt given in parts: (text, False), in which control tokens are only
        text, and (one control token, True). The same ids as `encode(joined text, add_special=False,
        parse_special=True)` as long as no text spells a control token."""
        ids: list[int] = []
        strip_next = False
        for index, (text, is_control) in enumerate(parts):
            if is_control:
                token_id, token = self._control[text]
                ids.append(token_id)
                strip_next = token.rstrip
                continue
            piece = text.lstrip() if strip_next else text
            strip_next = False
            if index + 1 < len(parts) and parts[index + 1][1] and self._control[parts[index + 1][0]][1].lstrip:
                piece = piece.rstrip()
            if piece:
                ids += self._encode_middle(piece) if index else self.encode(piece, add_special=False)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises RequestError for ids out of range."""
        for token_id in ids:
            self._check_id(token_id)
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_text(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token ("Ġthe", "▁the", "<0x0A>"); empty for an unassigned id."""
        self._check_id(token_id)
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, a part of a UTF-8 character perhaps. Control tokens
        give the bytes of their name. Raises RequestError for an id out of range."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        text = self.token_text(token_id)
        if token_id in self._added:
            return text.encode()
        if self._is_byte_level:
            try:
                return text.translate(_BYTES).encode("latin-1")
            except UnicodeEncodeError:  # not in that alphabet
                return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def token_id(self, text: str) -> int | None:
        """The id of the token spelled `text` in the vocabulary (as `token_text` gives it), or None."""
        token_id: int | None = self._backend.token_to_id(text)
        return token_id

    def to_json(self) -> str:
        """A tokenizer.json of the same vocabulary and rules. It doesn't say what is put around a text: `frame` does."""
        return str(self._backend.to_str(pretty=True))

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that `encode` puts before and after a text."""
        return list(self._prefix), list(self._suffix)

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary: allowed are 0 to {self.vocab_size - 1}")

    def _encode_middle(self, text: str) -> list[int]:
        """Ids of plain text that follows a control token: some tokenizers treat the start of the
        whole text differently. An anchor that nobody can guess stands for the control token."""
        with self._lock:
            if self._anchored is None:
                anchor = f"<|{secrets.token_hex(16)}|>"
                backend = _without_special(self._backend, self._added)
                backend.add_tokens([tokenizers.AddedToken(anchor, normalized=False, special=False)])
                self._anchored = (backend, anchor)
        backend, anchor = self._anchored
        ids = backend.encode(anchor + text, add_special_tokens=False).ids
        return self._respell(ids[1:])

    def _respell(self, ids: list[int]) -> list[int]:
        """`ids` of plain text, free of control tokens. The model itself may yield one: where a whole
        word is looked up before any merge, and the word is the name of a control token."""
        if self._forbidden.isdisjoint(ids):
            return ids
        plain: list[int] = []
        for token_id in ids:
            if token_id not in self._forbidden:
                plain.append(token_id)
                continue
            name = self.token_text(token_id)
            for half in (name[:1], name[1:]):
                halves = self._plain.encode(half, add_special_tokens=False).ids
                plain += [i for i in halves if i not in self._forbidden]
        return plain

    def _find_frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the backend's post-processor puts before and after a text."""
        for text in ("a", "1", " ", "\n"):
            body = self._plain.encode(text, add_special_tokens=False).ids
            if body:
                framed = self._plain.encode(text, add_special_tokens=True).ids
                start = next(i for i in range(len(framed)) if framed[i : i + len(body)] == body)
                return framed[:start], framed[start + len(body) :]
        return [], []


def check_text(text: object) -> None:
    """Raises RequestError where `text` is no string of valid Unicode."""
    if not isinstance(text, str):
        raise RequestError(f"text must be a string, got {type(text).__name__}", "prompt")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has an unpaired surrogate (U+{ord(text[error.start]):04X}) at position {error.start}: "
            "send valid Unicode",
            "prompt",
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level vocabularies: printable Latin-1 stands for itself, the other
    bytes, in order, for the characters from U+0100 on (GPT-2's convention)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(rest)}


BYTE_ALPHABET = _byte_alphabet()
#: The same for `str.translate`, to the byte's Latin-1 character; what isn't in the alphabet isn't in Latin-1.
_BYTES = dict.fromkeys(range(256), 0x100) | {ord(char): byte for char, byte in BYTE_ALPHABET.items()}


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Which of the two spellings of bytes the vocabulary uses: GPT-2's alphabet, or SentencePiece's."""
    kinds: set[str] = set()
    for part in (backend.decoder, backend.pre_tokenizer):
        if part is not None:
            _collect_types(json.loads(part.__getstate__()), kinds)
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return False
    named = ", ".join(sorted(kinds)) or "none"
    raise UnsupportedModelError(
        f"the tokenizer's decoder ({named}) is not supported; supported are byte-level tokenizers and SentencePiece"
    )


def _collect_types(node: object, kinds: set[str]) -> None:
    if isinstance(node, dict):
        kinds.add(str(node.get("type")))
        for value in node.values():
            _collect_types(value, kinds)
    elif isinstance(node, list):
        for value in node:
            _collect_types(value, kinds)


def _without_special(backend: tokenizers.Tokenizer, added: Mapping[int, tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """`backend` that reads control tokens in text as text. The backend has a switch for that, but
    switching is not thread-safe; so a second one, which shares the vocabulary, merges and rules."""
    plain = tokenizers.Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    plain.add_tokens([added[i] for i in sorted(added)])
    if plain.get_added_tokens_decoder().keys() != added.keys():  # ids with gaps: only a full copy keeps them
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    return plain
