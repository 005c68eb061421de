"""The tokenizer of the null model: one token per byte, and ChatML's turn markers."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from turbolm.text.chat_template import named_template
from turbolm.text.tokenizer import BYTE_ALPHABET, Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is "<|im_start|>", 257 "<|im_end|>" (the end of text)."""
    backend = tokenizers.Tokenizer(models.BPE(dict(BYTE_ALPHABET), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(
        backend, special_tokens={"eos_token": "<|im_end|>"}, chat_templates=named_template("chatml").sources
    )
