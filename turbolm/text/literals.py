"""JSON values and Python literals, read as they arrive, written as JSON."""

from __future__ import annotations

import json
import math
import re

from turbolm.text.scanner import SPACE, Mismatch, Scanner, Sink, Steps

MAX_DEPTH = 64  # of nested Python literals; JSON is read without recursion

_JSON_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_JSON_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_JSON_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_WORD = re.compile(r"[-+.\w]*")
_IDENTIFIER = re.compile(r"\w*")
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_PYTHON_RUNS = {"'": re.compile(r"[^'\\]*"), '"': re.compile(r'[^"\\]*')}
_PYTHON_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|[\s\S])")
_PYTHON_ESCAPES = {
    "\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t",
    "v": "\v",
}  # fmt: skip


def ignore(_: str) -> None:
    """A sink for what is read and not needed."""


def read_json(scan: Scanner, sink: Sink) -> Steps[None]:
    """One JSON value (RFC 8259), verbatim but for control characters inside strings: models write
    bare line breaks there, which become the escapes that JSON asks for."""
    closers: list[str] = []
    while True:
        yield from scan.run(SPACE, sink)
        char = yield from scan.peek()
        if char == '"':
            yield from read_json_string(scan, sink)
        elif char in ("{", "["):
            scan.step(sink)
            closers.append("}" if char == "{" else "]")
            yield from scan.run(SPACE, sink)
            if (yield from scan.peek()) != closers[-1]:
                if char == "{":
                    yield from _read_json_key(scan, sink)
                continue
        else:
            yield from _read_json_scalar(scan, sink)
        while closers:
            yield from scan.run(SPACE, sink)
            char = yield from scan.peek()
            if char == closers[-1]:
                scan.step(sink)
                closers.pop()
            elif char == ",":
                scan.step(sink)
                yield from scan.run(SPACE, sink)
                if closers[-1] == "}":
                    yield from _read_json_key(scan, sink)
                break
            else:
                raise Mismatch
        else:
            return


def read_json_string(scan: Scanner, sink: Sink) -> Steps[None]:
    """A JSON string, its quotes included."""
    if (yield from scan.peek()) != '"':
        raise Mismatch
    scan.step(sink)
    while True:
        yield from scan.run(_JSON_RUN, sink)
        char = yield from scan.peek()
        if char == '"':
            scan.step(sink)
            return
        if char == "\\":
            yield from scan.fill(2)
            if scan.text.startswith("\\u", scan.position):
                yield from scan.fill(6)
            escape = _JSON_ESCAPE.match(scan.text, scan.position)
            if escape is None:
                raise Mismatch
            scan.step(sink, len(escape[0]))
        elif char:
            scan.position += 1
            sink(json.dumps(char)[1:-1])
        else:
            raise Mismatch


def _read_json_key(scan: Scanner, sink: Sink) -> Steps[None]:
    yield from read_json_string(scan, sink)
    yield from scan.run(SPACE, sink)
    yield from scan.expect(":")
    sink(":")


def _read_json_scalar(scan: Scanner, sink: Sink) -> Steps[None]:
    word = yield from scan.take(_WORD)
    if not _JSON_SCALAR.fullmatch(word):
        raise Mismatch
    sink(word)


def take_json_string(scan: Scanner) -> Steps[str]:
    """The text that a JSON string stands for."""
    pieces: list[str] = []
    yield from read_json_string(scan, pieces.append)
    text: str = json.loads("".join(pieces))
    return text


def as_json(text: str) -> str | None:
    """`text` as `read_json` writes it, if it is one whole JSON value, spaces around it allowed."""
    scan = Scanner(text.strip(), is_ended=True)
    pieces: list[str] = []
    try:
        for _ in read_json(scan, pieces.append):
            raise AssertionError("waits for text after the end")
    except Mismatch:
        return None
    return "".join(pieces) if scan.position == len(scan.text) else None


def read_python(scan: Scanner, sink: Sink, depth: int = 0) -> Steps[None]:
    """One Python literal as JSON: strings, numbers, True, False, None (and JSON's names for them),
    lists, tuples, dicts with string keys."""
    if depth == MAX_DEPTH:
        raise Mismatch
    yield from scan.skip_space()
    char = yield from scan.peek()
    if char in ("'", '"'):
        sink(quote((yield from _take_python_string(scan, char))))
    elif char == "{":
        scan.position += 1
        yield from _read_python_items(scan, sink, "{}", depth)
    elif char in ("[", "("):
        scan.position += 1
        yield from _read_python_items(scan, sink, "[]" if char == "[" else "()", depth)
    else:
        sink(_python_scalar((yield from scan.take(_WORD))))


def _read_python_items(scan: Scanner, sink: Sink, brackets: str, depth: int) -> Steps[None]:
    """The items of a list, tuple or dict whose opening bracket was read."""
    is_dict = brackets == "{}"
    sink("{" if is_dict else "[")
    is_first = True
    while True:
        yield from scan.skip_space()
        if (yield from scan.has(brackets[1])):
            break
        if not is_first:
            sink(", ")
        is_first = False
        if is_dict:
            char = yield from scan.peek()
            if char not in ("'", '"'):
                raise Mismatch
            sink(quote((yield from _take_python_string(scan, char))) + ": ")
            yield from scan.skip_space()
            yield from scan.expect(":")
        yield from read_python(scan, sink, depth + 1)
        yield from scan.skip_space()
        if not (yield from scan.has(",")):
            yield from scan.expect(brackets[1])
            break
    sink("}" if is_dict else "]")


def read_python_arguments(scan: Scanner, sink: Sink) -> Steps[None]:
    """`name=literal, …)` as a JSON object; the opening parenthesis was read."""
    names: set[str] = set()
    sink("{")
    while True:
        yield from scan.skip_space()
        if (yield from scan.has(")")):
            break
        name = yield from scan.take(_IDENTIFIER)
        if not name.isidentifier() or name in names:
            raise Mismatch
        yield from scan.skip_space()
        yield from scan.expect("=")
        sink((", " if names else "") + quote(name) + ": ")
        names.add(name)
        yield from read_python(scan, sink)
        yield from scan.skip_space()
        if not (yield from scan.has(",")):
            yield from scan.expect(")")
            break
    sink("}")


def _take_python_string(scan: Scanner, mark: str) -> Steps[str]:
    closer = mark * 3 if (yield from scan.has(mark * 3)) else mark
    if closer == mark:
        yield from scan.expect(mark)
    pieces: list[str] = []
    while True:
        yield from scan.run(_PYTHON_RUNS[mark], pieces.append)
        if (yield from scan.has(closer)):
            break
        yield from scan.fill(2)
        size = 2 if scan.text.startswith("\\", scan.position) else 1
        if len(scan.text) - scan.position < size:
            raise Mismatch
        scan.step(pieces.append, size)
    return _PYTHON_ESCAPE.sub(_unescape, "".join(pieces))


def _unescape(match: re.Match[str]) -> str:
    code = match[1]
    if code in _PYTHON_ESCAPES:
        return _PYTHON_ESCAPES[code]
    if code[0] in "01234567":
        return chr(int(code, 8))
    if len(code) > 1:
        point = int(code[1:], 16)
        return chr(point) if point < 0x110000 else "\ufffd"
    return match[0]  # Python keeps the backslash of an unknown escape


def _python_scalar(word: str) -> str:
    if word in _PYTHON_NAMES:
        return _PYTHON_NAMES[word]
    if _JSON_SCALAR.fullmatch(word):
        return word
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        raise Mismatch from None
    if not math.isfinite(number):
        raise Mismatch
    return repr(number)


def quote(text: str) -> str:
    """`text` as a JSON string. Halves of surrogate pairs are joined; lone ones become U+FFFD, since
    they have no UTF-8."""
    if not text.isascii():
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(text, ensure_ascii=False)
