"""Vocabularies that the tests of tokenizers share."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory) -> Path:
    """A folder with a small SentencePiece BPE model with byte fallback, made as Llama's was."""
    path = tmp_path_factory.mktemp("sentencepiece")
    text = (Path(__file__).parents[2] / "benchmarks/data/gpl-3.txt").read_text()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*text.splitlines(), *["    indented", "  two", "[UNUSED_1] x"] * 20]),
        model_prefix=str(path / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        control_symbols=["<|im_start|>", "<|im_end|>", "[UNUSED_1]"],
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        num_threads=1,
    )
    return path


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path) -> dict[str, object]:
    """The tokenizer's part of the default model's metadata."""
    reader = GGUFReader(smollm2_path)
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
