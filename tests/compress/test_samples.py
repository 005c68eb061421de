from __future__ import annotations

import itertools
import json
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbolm.compress.samples import SHIPPED, load_samples
from turbolm.errors import ConfigError
from turbolm.text import Tokenizer, byte_tokenizer

TOKENIZER = byte_tokenizer()
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def write(tmp_path, text, name="data.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rows_of_all_kinds(tmp_path):
    rows = [{"text": "plain"}, {"prompt": "2+2=", "completion": "4"}, {"messages": MESSAGES, "id": 7}]
    data = write(tmp_path, "\n".join(json.dumps(row) for row in rows) + "\n\n")
    samples = load_samples(data, TOKENIZER, 10, 512)
    texts = [TOKENIZER.decode(sample, skip_special=False) for sample in samples.token_ids]
    assert texts[:2] == ["plain", "2+2=\n4"]
    assert texts[2].startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>")
    assert 256 in samples.token_ids[2]  # a control token, not its letters
    assert any("3 samples; 10 were asked for" in warning for warning in samples.warnings)
    assert any("tokens only" in warning for warning in samples.warnings)


def test_models_without_a_template_get_plain_text(tmp_path):
    plain = Tokenizer(TOKENIZER._backend, special_tokens={})
    samples = load_samples(write(tmp_path, json.dumps({"messages": MESSAGES})), plain, 10, 512)
    assert plain.decode(samples.token_ids[0]) == "Hi\n\nHello!"
    assert "no chat template" in samples.warnings[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not valid JSON"),
        ("[1]", "line 2: each line must be an object"),
        ('{"question": "x"}', "line 2 has question; it needs"),
        ('{"text": 3}', "line 2: 'prompt' and 'text' must be strings"),
        ('{"messages": "x"}', "line 2: "),
        ('{"messages": [{"content": "x"}]}', "line 2: "),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    data = write(tmp_path, json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_samples(data, TOKENIZER, 10, 512)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no text"), ("a.txt", b"", "holds no text"), ("a.json", b"[]", "one object per line"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_samples(str(path), TOKENIZER, 10, 512)


def test_missing_file_and_package(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        load_samples(str(tmp_path / "none.txt"), TOKENIZER, 10, 512)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        load_samples("hf:nobody/nothing", TOKENIZER, 10, 512)


def test_datasets(monkeypatch):
    """Names and splits are passed on; rows are those of .jsonl files."""
    asked = []

    class Rows(list):
        def take(self, count):
            return self[:count]

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        if name == "org/broken":
            raise ValueError("no such split")
        return Rows([{"text": "a" * 20}, {"prompt": "b", "completion": "c"}, {"other": 1}])

    errors = types.SimpleNamespace(DatasetsError=OSError)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, exceptions=errors))
    assert [len(ids) for ids in load_samples("hf:org/name:test", TOKENIZER, 2, 10).token_ids] == [10, 3]
    with pytest.raises(ConfigError, match="hf:org/name, row 3 has other; it needs"):
        load_samples("hf:org/name", TOKENIZER, 3, 10)
    with pytest.raises(ConfigError, match="can't load hf:org/broken: no such split"):
        load_samples("hf:org/broken", TOKENIZER, 3, 10)
    assert asked == [("org/name", "test", True), ("org/name", "train", True), ("org/broken", "train", True)]


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 3000), count=st.integers(1, 20), context=st.integers(2, 300))
def test_text_is_cut_into_pieces_that_are_spread_over_it(tmp_path_factory, length, count, context):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = "".join(chr(97 + i % 26) for i in range(length))
    path.write_text(text)
    samples = load_samples(str(path), TOKENIZER, count, context)
    assert 1 <= len(samples.token_ids) <= count
    places = []
    for sample in samples.token_ids:
        assert len(sample) <= context
        assert all(b - a in (1, -25) for a, b in itertools.pairwise(sample))
        places.append(sample[0])
    if length >= context:
        assert sum(map(len, samples.token_ids)) >= min(count, length // context) * context - context // 2


def test_shipped_text():
    assert SHIPPED.stat().st_size > 25_000
    samples = load_samples("", TOKENIZER, 128, 512)
    assert samples.num_tokens > 10_000
    assert samples.warnings == ()
    roles = [json.loads(line).get("messages", [{}])[-1].get("role") for line in SHIPPED.read_text().splitlines()]
    assert roles.count("assistant") > 10
    assert roles.count(None) > 10
