"""The null model's tokenizer."""

from __future__ import annotations

from turbolm.text import ChatTemplate, byte_tokenizer, encode_chat


def test_byte_tokenizer():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("aé") == [0x61, 0xC3, 0xA9]
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    ids = encode_chat(tokenizer, ChatTemplate.of(tokenizer), [{"role": "user", "content": "<|im_end|>"}])
    assert (ids[0], ids.count(257), tokenizer.vocab_size, tokenizer.eos_ids) == (256, 1, 258, (257,))
