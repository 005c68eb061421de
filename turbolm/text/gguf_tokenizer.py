"""Tokenizers from the metadata of GGUF files (keys `tokenizer.*`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from turbolm.errors import CheckpointError, UnsupportedModelError, nearest
from turbolm.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, Pieces, add_tokens, build_backend, unique_vocab
from turbolm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text into words before merging."""

    patterns: tuple[str, ...] = ()  # regular expressions, one after the other; each match is a word
    digits: bool = False  # every digit is a word
    gpt2_words: bool = False  # then GPT-2's own word pattern
    punctuation: bool = False  # runs of punctuation are words, before everything else
    ignore_merges: bool = False  # a word in the vocabulary is one token, whatever the merges say
    compose: bool = False  # Unicode NFC first
    adds_bos: bool = False  # unless the file says otherwise


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
)  # fmt: skip
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
)  # fmt: skip
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, numbers: str) -> str:
    """Words split where lower case turns to upper case (tekken, o200k)."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _TAIL
    )


# The letters with case that DeepSeek's first tokenizer knows (Unicode 11's, less a few blocks).
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)  # fmt: skip
_CJK = "[一-龥\u0800-一가-\ud7ff]+"

_GPT2 = PreTokenizer(gpt2_words=True)
_DIGITS = PreTokenizer(digits=True, gpt2_words=True)
_LLAMA3_LIKE = PreTokenizer((_LLAMA3,))
_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True)
_O200K = PreTokenizer((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
_DEEPSEEK_V3 = PreTokenizer((
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _TAIL,
))  # fmt: skip

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(("default", "gpt-2", "mpt", "olmo", "phi-2", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA_BPE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), _LLAMA3_LIKE),
    "qwen2": PreTokenizer((_QWEN2,), compose=True),
    "qwen35": PreTokenizer((_QWEN35,), compose=True),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), PreTokenizer((_QWEN2,))),
    "deepseek-llm": PreTokenizer((
        r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$", _CJK, r"\p{N}+",
    )),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK), digits=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), _O200K),
    "falcon": PreTokenizer(("[0-9][0-9][0-9]",), gpt2_words=True, punctuation=True),
}  # fmt: skip
"""`tokenizer.ggml.pre` → rules."""

# Names of end-of-turn tokens, for files that don't tell theirs.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that GGUF metadata describes. Values are Python's (or numpy arrays of numbers).
    Raises UnsupportedModelError for a kind of tokenizer that is not known, CheckpointError for
    metadata that contradicts itself."""
    model = metadata.get("tokenizer.ggml.model")
    texts = _strings(metadata, "tokenizer.ggml.tokens")
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.full(len(texts), NORMAL)), np.int64)
    if len(types) != len(texts):
        raise CheckpointError(f"the file has {len(texts)} tokens but {len(types)} token types")
    if model == "gpt2":
        backend, adds_bos = _byte_level(metadata, texts, types)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(metadata, texts, types), True
    else:
        raise UnsupportedModelError(
            f"the file's tokenizer is of the kind {model!r}; supported are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece)"
        )
    special_tokens: dict[str, str] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = _token_id(metadata, key, len(texts))
        if token_id is not None:
            special_tokens[f"{role}_token"] = texts[token_id]
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    return Tokenizer(
        backend,
        special_tokens=special_tokens,
        eos_ids=_turn_ends(metadata, texts, types),
        chat_templates=_chat_templates(metadata),
        frame=(bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)), adds_eos),
    )


def _byte_level(
    metadata: Mapping[str, object], texts: Sequence[str], types: np.ndarray[Any, Any]
) -> tuple[tokenizers.Tokenizer, bool]:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    rules = PRE_TOKENIZERS.get(name)
    if rules is None:
        raise UnsupportedModelError(
            f"the file's pre-tokenizer '{name}' is not known.{nearest(name, PRE_TOKENIZERS)} "
            f"Known: {', '.join(PRE_TOKENIZERS)}"
        )
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise CheckpointError(f"the file's merge {merge!r} is not two tokens with a space between")
        merges.append((left, right))
    vocab = unique_vocab(texts)
    try:
        model = models.BPE(vocab, merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library has no class of its own for this
        raise CheckpointError(f"the file's merges don't fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if rules.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(rules)
    backend.decoder = decoders.ByteLevel()
    _add_typed(backend, texts, types)
    return backend, rules.adds_bos


def _pre_tokenizer(rules: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.gpt2_words)
    splits = [pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in rules.patterns]
    digits = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    if rules.punctuation:
        return pre_tokenizers.Sequence([
            pre_tokenizers.Punctuation("contiguous"), words, pre_tokenizers.Digits(individual_digits=False), *splits,
        ])  # fmt: skip
    return pre_tokenizers.Sequence([*splits, *digits, words])


def _sentencepiece(
    metadata: Mapping[str, object], texts: Sequence[str], types: np.ndarray[Any, Any]
) -> tokenizers.Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(texts):  # type: ignore[arg-type]
        raise CheckpointError("a SentencePiece vocabulary needs one score per token: tokenizer.ggml.scores")
    unknown = _token_id(metadata, "unknown", len(texts))
    if unknown is None:
        marked = np.flatnonzero(types == UNKNOWN)
        unknown = int(marked[0]) if len(marked) else 0
    kinds: list[int] = types.tolist()
    values: list[float] = np.asarray(scores, np.float64).tolist()
    pieces = Pieces(texts, values, kinds, unknown_id=unknown)
    return build_backend(pieces, "segment" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never")


def _add_typed(backend: tokenizers.Tokenizer, texts: Sequence[str], types: np.ndarray[Any, Any]) -> None:
    rows = np.flatnonzero((types != NORMAL) & (types != BYTE)).tolist()
    add_tokens(backend, [texts[i] for i in rows], [int(types[i]) for i in rows])


def _turn_ends(metadata: Mapping[str, object], texts: Sequence[str], types: np.ndarray[Any, Any]) -> list[int]:
    """End-of-turn tokens besides the end-of-text token."""
    named = [_token_id(metadata, key, len(texts)) for key in ("eot", "eom")]
    found = [i for i in named if i is not None]
    if named[0] is None:
        control = {texts[i]: i for i in np.flatnonzero(types == CONTROL).tolist()}
        if "<|return|>" in control:  # there "<|end|>" ends a message within the answer
            return found
        found += [control[name] for name in _TURN_ENDS if name in control]
    return found


def _chat_templates(metadata: Mapping[str, object]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    named = {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{prefix}.") and isinstance(v, str)}
    default = metadata.get(prefix)
    return {**({"default": default} if isinstance(default, str) else {}), **named}


def _token_id(metadata: Mapping[str, object], name: str, size: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    number: int = int(value)  # type: ignore[call-overload]
    if number in (-1, 0xFFFFFFFF):  # how writers say "none"
        return None
    if not 0 <= number < size:
        raise CheckpointError(f"the file's {name} token is {number}, outside its {size} tokens")
    return number


def _strings(metadata: Mapping[str, object], key: str) -> Sequence[str]:
    value = metadata.get(key)
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], str):
        raise CheckpointError(f"the file has no {key}: it holds no tokenizer, or a broken one")
    return value
