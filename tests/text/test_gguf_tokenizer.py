"""Tokenizers from GGUF metadata, against the tokenizers that the same vocabulary came from."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from turbolm.errors import CheckpointError, UnsupportedModelError
from turbolm.text import Tokenizer, tokenizer_from_gguf

GPL = (Path(__file__).parents[2] / "benchmarks/data/gpl-3.txt").read_text()
TEXTS = (
    "Hello, world! It's 12345 o'clock; WE'LL see. I'M 1.5x",
    "快速的棕色狐狸跳过懒狗。ひらがなカタカナ 한국어 ¥1,234.56",
    "مرحبا بالعالم ١٢٣ कैसे हैं १२३ आप? สวัสดี",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 é vs e\u0301 \u212b",
    "def f(x):\n    return {'a': x**2}\t# http://a/b//\r\n\r\n\r\n",
    "a  b   c\u00a0d\u3000e\u2003f\nx\n\n\ny   ",
    "user says <|im_end|> and <s>",
    "Ωmega ǅ ABCdefGHI McDonald's snake_case camelCase",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aB 1'\n\r/<|>")), max_size=40)


def words(*patterns: str, digits: bool = False, gpt2: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        *[pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in patterns],
        *([pre_tokenizers.Digits(individual_digits=True)] if digits else []),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2),
    ])  # fmt: skip


# As the models' own tokenizer.json files have it: name → (word rules, normalizer).
PUBLISHED = {
    "gpt-2": (words(gpt2=True), None),
    "default": (words(gpt2=True), None),
    "smollm": (words(digits=True, gpt2=True), None),
    "qwen2": (words(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), normalizers.NFC()),
    "qwen35": (words(GGUF_PRE_TOKENIZER_SPLITS["qwen35"]), normalizers.NFC()),
    "deepseek-r1-qwen": (words(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), None),
    **{name: (words(GGUF_PRE_TOKENIZER_SPLITS[name]), None) for name in ("llama-bpe", "tekken", "gpt-4o")},
}


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([GPL[:12000], *TEXTS * 3], trainer)
    return backend


def metadata_of(backend: tokenizers.Tokenizer, pre: str, **more: object) -> dict[str, object]:
    """What a converter writes for this tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def family(request):
    backend = trained(*PUBLISHED[request.param])
    reference = PreTrainedTokenizerFast(tokenizer_object=backend)
    return tokenizer_from_gguf(metadata_of(backend, request.param)), reference


def test_same_ids_as_transformers(family):
    ours, reference = family
    for text in (*TEXTS, GPL[:3000]):
        assert ours.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)
        assert ours.encode(text) == reference.encode(text, split_special_tokens=True)
        assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text))


@quick
@given(text=any_text)
def test_same_ids_on_random_text(family, text):
    ours, reference = family
    assert ours.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("deepseek-v3", "ab 12345中文 x", ["ab", " ", "123", "45", "中文", " x"]),
        ("deepseek-v3", ".name?!\n\n y", [".name", "?!\n\n", " y"]),
        ("deepseek-coder", "x 12中文\ny!", ["x", " ", "1", "2", "中文", "\n", "y", "!"]),
        ("deepseek-llm", "the 12中文\nÖÄ, z", ["the", " ", "12", "中文", "\n", "ÖÄ", ",", " z"]),
        ("falcon", "a+1234 b", ["a", "+", "123", "4", " b"]),
    ],
)
def test_words_of_other_families(pre, text, expected):
    """No token spans two words: with a token for every possible word, encoding shows the words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None)
    # A vocabulary that has merged the text as a whole and each of the words by itself.
    spelled = {w: backend.pre_tokenizer.pre_tokenize_str(w)[0][0] for w in {text, *expected}}
    merges: list[str] = []
    tokens = [*SPECIAL, *sorted(alphabet)]
    for word in sorted(spelled.values(), key=len):
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    ours = tokenizer_from_gguf({
        **metadata_of(backend, pre),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": merges,
    })  # fmt: skip
    assert [ours.token_bytes(i).decode() for i in ours.encode(text)] == expected


@pytest.fixture(scope="module")
def smollm():
    return trained(*PUBLISHED["smollm"])


def test_begin_and_end_tokens(smollm):
    for bos, eos in ((True, False), (True, True), (False, True)):
        metadata = metadata_of(smollm, "smollm", **{"ggml.add_bos_token": bos, "ggml.add_eos_token": eos})
        ids = tokenizer_from_gguf(metadata).encode("hi")
        assert (ids[0] == 1, ids[-1] == 2) == (bos, eos)


def test_begin_token_by_family(smollm):
    for pre, expected in (("smollm", False), ("llama-bpe", True)):
        metadata = metadata_of(smollm, pre)
        del metadata["tokenizer.ggml.add_bos_token"]
        assert (tokenizer_from_gguf(metadata).encode("hi")[0] == 1) is expected


def test_end_of_turn_tokens(smollm):
    told = tokenizer_from_gguf(metadata_of(smollm, "smollm", **{"ggml.eos_token_id": 0, "ggml.eot_token_id": 2}))
    assert told.eos_ids == (0, 2)
    found = tokenizer_from_gguf(metadata_of(smollm, "smollm", **{"ggml.eos_token_id": 0}))
    assert found.eos_ids == (0, 2)


def test_numpy_arrays_and_templates(smollm):
    metadata = metadata_of(smollm, "smollm", chat_template="D", **{"chat_template.tool_use": "T"})
    metadata["tokenizer.ggml.token_type"] = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    metadata["tokenizer.ggml.bos_token_id"] = np.uint32(1)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.chat_template == "D"
    assert tokenizer.chat_templates == {"default": "D", "tool_use": "T"}
    assert tokenizer.special_ids == {0, 1, 2}


def test_user_defined_tokens_are_whole_but_not_special(smollm):
    metadata = metadata_of(smollm, "smollm")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = tokenizer_from_gguf(metadata)
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("a<think>")[-1] == last
    assert last not in tokenizer.special_ids
    assert tokenizer.decode([last]) == "<think>"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"ggml.pre": "lama-bpe"}, UnsupportedModelError, "Did you mean 'llama-bpe'"),
        ({"ggml.pre": "quux"}, UnsupportedModelError, "smollm"),
        ({"ggml.model": "bert"}, UnsupportedModelError, "'bert'"),
        ({"ggml.merges": ["ab"]}, CheckpointError, "'ab'"),
        ({"ggml.merges": ["zzz qqq"]}, CheckpointError, "merges"),
        ({"ggml.merges": []}, CheckpointError, "merges"),
        ({"ggml.tokens": []}, CheckpointError, "tokens"),
        ({"ggml.tokens": ["a", "a"], "ggml.token_type": [1, 1]}, CheckpointError, "twice"),
        ({"ggml.token_type": [1]}, CheckpointError, "token types"),
        ({"ggml.bos_token_id": 10**6}, CheckpointError, "bos"),
        ({"ggml.model": "llama"}, CheckpointError, "score"),
    ],
)
def test_bad_metadata(smollm, change, error, says):
    with pytest.raises(error, match=says):
        tokenizer_from_gguf(metadata_of(smollm, "smollm", **change))


# SentencePiece.


@pytest.fixture(scope="module")
def pieces(sentencepiece_folder):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((sentencepiece_folder / "tokenizer.model").read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [p.piece for p in proto.pieces],
        "tokenizer.ggml.scores": np.array([p.score for p in proto.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([p.type for p in proto.pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def spm(pieces) -> Tokenizer:
    return tokenizer_from_gguf(pieces)


@pytest.fixture(scope="module")
def processor(sentencepiece_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))


@pytest.mark.parametrize("text", [*TEXTS, "  two spaces", "▁", " ", "", "\n    x", GPL[:5000]])
def test_same_ids_as_sentencepiece(spm, processor, text):
    assert spm.encode(text) == [1, *processor.encode(text)]
    assert spm.decode(spm.encode(text)) == processor.decode(processor.encode(text))


@quick
@given(text=any_text)
def test_same_ids_as_sentencepiece_on_random_text(spm, processor, text):
    assert spm.encode(text, add_special=False) == processor.encode(text)


def test_space_prefix(pieces, spm):
    without = tokenizer_from_gguf({**pieces, "tokenizer.ggml.add_space_prefix": False})
    assert without.encode(" the", add_special=False) == spm.encode("the", add_special=False)
    assert without.decode(without.encode(" the")) == " the"
    assert without.encode("the", add_special=False) != spm.encode("the", add_special=False)


def test_user_defined_symbols_are_whole(spm):
    ids = spm.encode("use <tool> now")
    assert spm.token_id("<tool>") in ids
    assert spm.decode(ids).replace(" ", "") == "use<tool>now"


def test_space_prefix_after_a_control_token(spm):
    mark = spm.token_id("<|im_start|>")
    ids = spm.encode("<|im_start|>the", add_special=False, parse_special=True)
    assert ids == [mark, *spm.encode("the", add_special=False)]
    assert spm.encode_parts([("<|im_start|>", True), ("the", False)]) == ids


# The real thing.


def test_smollm2(smollm2_metadata):
    start = time.perf_counter()
    tokenizer = tokenizer_from_gguf(smollm2_metadata)
    seconds = time.perf_counter() - start
    ids = tokenizer.encode(GPL)
    assert len(ids) == 7639
    assert tokenizer.decode(ids) == GPL
    assert seconds < 2  # about 0.15 s on an idle core
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.encode("1234") == [tokenizer.token_id(d) for d in "1234"]
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    assert tokenizer.chat_template is not None
