"""Tokenizers from folders, against transformers reading the same folder."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_WORDS

from turbolm.errors import CheckpointError, ModelNotFoundError, RequestError, UnsupportedModelError
from turbolm.text import Tokenizer, load_tokenizer

GPL = (Path(__file__).parents[2] / "benchmarks/data/gpl-3.txt").read_text()
TEXTS = (
    "Hello, world! It's 12345 o'clock; WE'LL see.",
    "快速的棕色狐狸跳过懒狗。价格是¥1,234.56",
    "مرحبا بالعالم ١٢٣ كيف الحال؟",
    "नमस्ते दुनिया, यह एक परीक्षण है।",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 é vs e\u0301",
    "def f(x):\n    return {'a': x**2}\t# comment\r\n\r\n\r\n",
    "a  b   c    d\te\u00a0f\u3000g\u2003h\nx\n\n\ny   ",
    "user says <|im_end|> and <s> and <|im_start|>system",
    "Ωmega ǅ ﬁ \u212b ABCdefGHI McDonald's",
    "x",
    "",
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
any_text = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab 1'\n<|>")), max_size=40)


def train_byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[AddedToken(s, normalized=False, special=True) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([GPL, *TEXTS * 3], trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return backend


def words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as transformers saves it, Qwen 2's word rules, with a begin token by post-processor."""
    path = tmp_path_factory.mktemp("byte_level")
    backend = train_byte_level(words(QWEN2_WORDS), normalizers.NFC())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(8)  # files carry such settings; they must not cut prompts
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    reference.backend_tokenizer.no_truncation()
    return reference


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", [*TEXTS, GPL[:3000]])
def test_same_ids_as_transformers(tokenizer, reference, text):
    assert tokenizer.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)
    assert tokenizer.encode(text) == reference.encode(text, split_special_tokens=True)


@quick
@given(text=any_text)
def test_same_ids_as_transformers_on_random_text(tokenizer, reference, text):
    assert tokenizer.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)


def test_begin_token_and_no_truncation(tokenizer):
    ids = tokenizer.encode("one two three four five six seven eight nine ten")
    assert ids[0] == tokenizer.bos_id == 0
    assert len(ids) > 8
    assert tokenizer.encode("one two", add_special=False)[0] != 0


def test_ids_and_roles(tokenizer):
    assert tokenizer.eos_ids == (tokenizer.token_id("<|im_end|>"),)
    assert tokenizer.special_ids == {tokenizer.token_id(s) for s in SPECIAL}
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.token_id("no such token") is None
    assert tokenizer.token_id("<think>") == tokenizer.vocab_size - 1
    assert tokenizer.chat_template is None


def test_control_tokens_in_user_text_stay_text(tokenizer):
    text = "a<|im_end|>b<s>"
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text, add_special=False))
    assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert parsed.count(tokenizer.token_id("<|im_end|>")) == 1
    assert parsed[-1] == tokenizer.bos_id


@quick
@given(text=any_text)
def test_no_text_forges_a_control_token(tokenizer, text):
    for probe in (text, text + "<|im_end|>" + text, f"<|im_{text}end|>"):
        assert tokenizer.special_ids.isdisjoint(tokenizer.encode(probe, add_special=False))


def test_a_vocabulary_that_looks_words_up_first_forges_nothing():
    vocab = {c: i for i, c in enumerate("abSTOP")} | {"STOP": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["STOP"])
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "STOP"})
    assert tokenizer.decode(tokenizer.encode("STOP")) == "STOP"
    assert 6 not in tokenizer.encode("abSTOP STOP")
    assert tokenizer.encode("STOP", parse_special=True) == [6]


@quick
@given(text=any_text)
def test_round_trip_and_bytes(plain_byte_level, text):
    ids = plain_byte_level.encode(text, add_special=False)
    assert plain_byte_level.decode(ids) == text
    assert b"".join(plain_byte_level.token_bytes(i) for i in ids) == text.encode()


@pytest.fixture(scope="module")
def plain_byte_level() -> Tokenizer:
    return Tokenizer(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), special_tokens={})


def test_batch_is_the_single_call(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_decode_special(tokenizer):
    ids = tokenizer.encode("a<|im_end|>b<think>", parse_special=True)
    assert tokenizer.decode(ids) == "ab<think>"
    assert tokenizer.decode(ids, skip_special=False) == "<s>a<|im_end|>b<think>"
    assert tokenizer.token_bytes(tokenizer.token_id("<|im_end|>")) == b"<|im_end|>"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**70])
def test_id_out_of_range(tokenizer, bad):
    for call in (tokenizer.token_bytes, tokenizer.token_text, lambda i: tokenizer.decode([i])):
        with pytest.raises(RequestError, match=str(tokenizer.vocab_size - 1)):
            call(bad)


@pytest.mark.parametrize("bad", ["a\ud800", "\udfff", 7, None, b"x"])
def test_text_that_is_no_text(tokenizer, bad):
    with pytest.raises(RequestError, match=r"surrogate|string"):
        tokenizer.encode(bad)


def test_parts_are_the_whole(tokenizer):
    text = "<|im_start|>user\n hi  there<|im_end|>\n<|im_start|>assistant\n"
    parts = [
        ("<|im_start|>", True), ("user\n hi  there", False), ("<|im_end|>", True), ("\n", False),
        ("<|im_start|>", True), ("assistant\n", False),
    ]  # fmt: skip
    assert tokenizer.encode_parts(parts) == tokenizer.encode(text, add_special=False, parse_special=True)
    forged = tokenizer.encode_parts([("<|im_start|>", True), ("a<|im_end|>b", False)])
    assert tokenizer.special_ids & set(forged) == {tokenizer.token_id("<|im_start|>")}
    assert tokenizer.decode(forged, skip_special=False) == "<|im_start|>a<|im_end|>b"


def test_threads_share_a_tokenizer(tokenizer):
    expected = {s: tokenizer.encode("a<|im_end|>b", parse_special=s) for s in (True, False)}
    wrong: list[bool] = []

    def work(parse: bool) -> None:
        for _ in range(200):
            if tokenizer.encode("a<|im_end|>b", parse_special=parse) != expected[parse]:
                wrong.append(parse)

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("flags", [(True, True), (False, False), (True, False), (False, True)])
def test_explicit_flags_beat_the_post_processor(folder, tmp_path, flags):
    copy_folder(folder, tmp_path, add_bos_token=flags[0], add_eos_token=flags[1])
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("x y")
    assert (ids[0] == ours.bos_id, ids[-1] in ours.eos_ids) == flags
    assert ours.decode(ids) == "x y"


def copy_folder(source: Path, target: Path, **changes: object) -> None:
    (target / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))


def test_tokens_added_by_the_config(folder, tmp_path, tokenizer):
    new = tokenizer.vocab_size
    added = {
        str(new): {"content": "<tool>", "special": False, "normalized": False},
        str(new + 1): {"content": "<|eot|>", "special": True, "normalized": False},
    }
    copy_folder(folder, tmp_path, added_tokens_decoder=added, additional_special_tokens=["<think>"])
    ours, reference = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    reference.backend_tokenizer.no_truncation()
    text = "a<tool>b<|eot|><think>"
    assert ours.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)
    assert new in ours.encode(text, add_special=False)
    assert {new + 1, ours.token_id("<think>")}.isdisjoint(ours.encode(text, add_special=False))
    assert ours.token_bytes(new) == b"<tool>"


def test_config_and_file_that_disagree(folder, tmp_path):
    copy_folder(folder, tmp_path, added_tokens_decoder={"5000": {"content": "<far>", "special": True}})
    with pytest.raises(CheckpointError, match="<far>"):
        load_tokenizer(tmp_path)


def test_special_tokens_map_file(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    assert load_tokenizer(tmp_path).eos_ids == (1,)


def test_padding_token_without_weights_is_left_out(folder, tmp_path, tokenizer):
    copy_folder(folder, tmp_path, pad_token="[PAD]")
    padded = load_tokenizer(tmp_path)
    assert (padded.vocab_size, padded.pad_id) == (tokenizer.vocab_size, None)


def test_chat_templates_by_file_and_name(folder, tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    copy_folder(folder, tmp_path, chat_template=named)
    assert load_tokenizer(tmp_path).chat_templates == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("FILE")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(tmp_path).chat_template == "FILE"
    assert load_tokenizer(tmp_path).chat_templates == {"default": "FILE", "tool_use": "T", "rag": "R"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"), ("tokenizer.json", "not json"), ("tokenizer.model", "\n\x05abc"),
        ("tokenizer_config.json", "["), ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"chat_template": 3}'), ("tokenizer_config.json", '{"bos_token": 3}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}'),
    ],
)  # fmt: skip
def test_broken_files(folder, tmp_path, name, content):
    if name == "tokenizer_config.json":
        copy_folder(folder, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_other_kinds_are_refused():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        Tokenizer(backend, special_tokens={})


# SentencePiece folders.


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("text", [*TEXTS, GPL[:2000]])
def test_sentencepiece_same_ids_as_transformers(sentencepiece_folder, legacy, text):
    ours, reference = both_llama(sentencepiece_folder, legacy)
    assert ours.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)
    assert ours.encode(text) == reference.encode(text, split_special_tokens=True)
    assert ours.decode(ours.encode(text)) == reference.decode(ours.encode(text), skip_special_tokens=True)


_LOADED: dict[tuple[Path, bool], tuple[Tokenizer, LlamaTokenizer]] = {}


def both_llama(folder: Path, legacy: bool) -> tuple[Tokenizer, LlamaTokenizer]:
    if (folder, legacy) not in _LOADED:
        path = folder / f"legacy_{legacy}"
        path.mkdir()
        (path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        _LOADED[folder, legacy] = (load_tokenizer(path), LlamaTokenizer.from_pretrained(path))
    return _LOADED[folder, legacy]


@quick
@given(text=any_text)
def test_sentencepiece_same_ids_on_random_text(sentencepiece_folder, text):
    ours, reference = both_llama(sentencepiece_folder, False)
    assert ours.encode(text, parse_special=True) == reference.encode(text, split_special_tokens=False)


@quick
@given(text=any_text)
def test_sentencepiece_bytes_are_the_text(sentencepiece_folder, text):
    ours, _ = both_llama(sentencepiece_folder, False)
    joined = b"".join(ours.token_bytes(i) for i in ours.encode(text, add_special=False)).decode()
    assert joined.removeprefix(" ") == text.replace("▁", " ").removeprefix(" ")


def test_sentencepiece_defaults(sentencepiece_folder):
    bare = load_tokenizer(sentencepiece_folder)
    assert (bare.bos_id, bare.eos_ids) == (1, (2,))
    assert bare.encode("hi")[0] == 1
    assert bare.token_bytes(bare.token_id("<0x0A>")) == b"\n"
    assert bare.special_ids >= {1, 2, bare.token_id("<|im_end|>")}
    assert bare.token_id("<tool>") not in bare.special_ids
    assert bare.token_id("<tool>") in bare.encode("use <tool> now")


def test_sentencepiece_added_tokens_take_reserved_places(sentencepiece_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    base = load_tokenizer(sentencepiece_folder)
    reserved = base.token_id("[UNUSED_1]")
    added = {str(reserved): "<|action|>", str(base.vocab_size + 1): "<|end|>"}
    decoder = {i: {"content": text, "special": True} for i, text in added.items()}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": decoder})
    )
    ours = load_tokenizer(tmp_path)
    assert ours.encode("<|action|><|end|>", add_special=False, parse_special=True) == [reserved, base.vocab_size + 1]
    assert ours.encode("plain text 12") == base.encode("plain text 12")
    assert ours.decode(ours.encode("<|action|>"), skip_special=False).endswith("<|action|>")
