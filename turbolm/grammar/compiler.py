"""From a `Grammar` to what finds the tokens that it allows."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from turbolm.errors import ConfigError, RequestError
from turbolm.form import Grammar
from turbolm.grammar.lark import literal
from turbolm.grammar.state import GrammarState
from turbolm.text import Tokenizer

MAX_CACHED = 128  # compiled grammars
_STACK_BYTES = 1 << 29  # of address space: rules that lead to rules are followed by recursion
#: Space between the parts of JSON. Bounded, because models fond of line breaks would write them for ever.
JSON_SPACE = r" |\n[ \t]{0,32}"
_MAX_SYMBOLS = 100_000  # of a grammar's productions
_MAX_FUEL = 5_000_000  # of a grammar's regular expressions, when it is compiled: about 100 ms


class CompiledGrammar:
    """A grammar over one vocabulary. Immutable."""

    def __init__(self, matcher: Any, executor: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._executor = executor
        self._vocab_size = vocab_size

    def start(self) -> GrammarState:
        """The state before an answer's first token."""
        return GrammarState(self._matcher.deep_copy(), self._executor)

    @property
    def num_words(self) -> int:
        """int32 words of a mask: a bit per token."""
        return -(-self._vocab_size // 32)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those used last. The first takes 0.5 s (vocabulary of 49,152
    tokens) to 3 s (151,936) more, a typical one 1 to 70 ms. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Sequence[int] = ()) -> None:
        """`eos_token_ids`: what may end an answer; none given: as the tokenizer says."""
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids or tokenizer.eos_ids)
        self._lock = threading.Lock()
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._vocabulary: Any = None
        self._executor: Any = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises RequestError: the grammar is wrong, matches nothing, or takes too much; ConfigError where the package
        that does it is not there."""
        with self._lock:
            found = self._cache.pop(grammar, None)
            if found is None:
                found = _on_large_stack(lambda: self._compile(grammar))
                while len(self._cache) >= MAX_CACHED:
                    self._cache.popitem(last=False)
            self._cache[grammar] = found
        return found

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        llguidance = _load_llguidance()
        if self._vocabulary is None:
            self._vocabulary = self._load_vocabulary(llguidance)
            self._executor = llguidance.LLExecutor()
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_MAX_FUEL, max_grammar_size=_MAX_SYMBOLS, verbose_errors=False
        )
        matcher = llguidance.LLMatcher(self._vocabulary, self._source(llguidance, grammar), log_level=0, limits=limits)
        name = grammar.parameter
        if not matcher.is_error():
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            raise RequestError(f"{name} can't be used: {_reason(matcher.get_error())}", name)
        for token in self._eos:
            mask &= ~(1 << token)
        if not mask and not matcher.is_accepting():
            raise RequestError(f"{name} can't be used: it matches no text at all", name)
        return CompiledGrammar(matcher, self._executor, self._tokenizer.vocab_size)

    def _load_vocabulary(self, llguidance: Any) -> Any:
        if not self._eos:
            raise RequestError(
                "this model has no end-of-text token, so an answer can't end where a grammar does", "grammar"
            )
        vocabulary = _Vocabulary(self._tokenizer, self._eos[0])
        slices = llguidance.LLTokenizer.json_slices()
        return llguidance.LLTokenizer(
            vocabulary, n_vocab=self._tokenizer.vocab_size, eos_token=self._eos, slices=slices
        )

    def _source(self, llguidance: Any, grammar: Grammar) -> str:
        """The grammar as llguidance reads it."""
        kinds, value = llguidance.LLMatcher, grammar.value
        options = {"whitespace_pattern": JSON_SPACE}
        if grammar.kind == "json":
            source = kinds.grammar_from_json_schema('{"type":"object"}', overrides=options)
        elif grammar.kind == "json_schema":
            source = kinds.grammar_from_json_schema(value, overrides=options)
        elif grammar.kind == "regex":
            source = kinds.grammar_from_regex(value)
        elif grammar.kind == "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            source = _lark(f"start: TEXT\nTEXT: {texts}")  # in capitals: one automaton, for any number of them
        else:
            source = _lark(_from_gbnf(value, grammar.parameter) if "::=" in value else value)
        return source if grammar.thoughts is None else self._after_thoughts(source, *grammar.thoughts)

    def _after_thoughts(self, source: str, opener: str, closer: str) -> str:
        """The grammar, with free text up to `closer` before it."""
        token = self._tokenizer.token_id(closer)
        is_control = token is not None and token in self._tokenizer.special_ids
        start = f"{literal(opener, self._tokenizer)} thoughts" if opener else "thoughts"
        head = [
            f"start: {f'({start})?' if opener else start} @answer",
            f"thoughts: free {f'<[{token}]>' if is_control else ''} gap",
            r"free: /(.|\n)*/" if is_control else rf"free[suffix={json.dumps(closer)}]: /(.|\n)*/",
            r"gap: /[\r\n]{0,4}/",
        ]
        answer = json.loads(source)["grammars"]
        answer[0]["name"] = "answer"
        return json.dumps({"grammars": [{"lark_grammar": "\n".join(head)}, *answer]})


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special=False)


def _on_large_stack(work: Callable[[], CompiledGrammar]) -> CompiledGrammar:
    """Does it in a thread that no grammar of the allowed size brings to its end."""
    future: Future[CompiledGrammar] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  (raised again below)
            future.set_exception(error)

    with _stack_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="turbolm-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return future.result()


_stack_lock = threading.Lock()


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _from_gbnf(text: str, parameter: str) -> str:
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except (GbnfToLarkError, LookupError, ValueError, AttributeError, RecursionError) as error:
        raise RequestError(f"{parameter} can't be used: {_reason(str(error))}", parameter) from None


def _reason(text: str) -> str:
    if text.startswith("NoExtension"):
        return "it matches no text at all"
    return " ".join(text.split())[:500]


def _load_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError("answers by a grammar need the package llguidance: pip install llguidance") from error
    return llguidance
