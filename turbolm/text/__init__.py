"""Text: tokenizers and chat templates on the way in; detokenizer, stop strings and parsers on the way out."""

from turbolm.text.byte_tokenizer import byte_tokenizer
from turbolm.text.chat_encoding import encode_chat
from turbolm.text.chat_template import ChatTemplate, named_template
from turbolm.text.detokenizer import Detokenizer
from turbolm.text.gguf_tokenizer import tokenizer_from_gguf
from turbolm.text.parser import PartParser, choose_reasoning_format, parser_for
from turbolm.text.stop import StopStrings
from turbolm.text.tokenizer import Tokenizer
from turbolm.text.tokenizer_files import load_tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "PartParser",
    "StopStrings",
    "Tokenizer",
    "byte_tokenizer",
    "choose_reasoning_format",
    "encode_chat",
    "load_tokenizer",
    "named_template",
    "parser_for",
    "tokenizer_from_gguf",
]
