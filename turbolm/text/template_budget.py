"""The limits of a rendering: what it has used, and how large the result of an operation will be.

A `Budget`
  - looks at the thread's processor time, at each step: nothing between two steps takes long, since
  - it refuses a value above `MAX_SIZE` before it is made, and
  - it adds up what is made and what is written, up to `MAX_ALLOCATED` and `MAX_OUTPUT`.
Sizes are characters; each element of a container counts as `ELEMENT` of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jinja2.utils import Cycler, Namespace

from turbolm.errors import TemplateError

MAX_SIZE = 8 << 20  # of one value
MAX_ALLOCATED = 128 << 20  # of all values made during a rendering
MAX_OUTPUT = 8 << 20
MAX_SECONDS = 1.0  # processor time of a rendering
MAX_BITS = 4096  # of an integer
ELEMENT = 16


class Budget:
    """What one rendering has used."""

    __slots__ = ("allocated", "known", "output", "started", "steps")

    def __init__(self, known: Mapping[int, int]) -> None:
        """`known`: sizes of containers by `id`, which need not be walked again."""
        self.known = known
        self.allocated = self.output = self.steps = 0
        self.started = time.thread_time()

    def step(self) -> None:
        self.steps += 1
        if not self.steps & 15 and time.thread_time() - self.started > MAX_SECONDS:
            raise TemplateError(f"the chat template ran for more than {MAX_SECONDS:g} s of processor time")

    def write(self, size: int) -> None:
        self.step()
        self.output += size
        if self.output > MAX_OUTPUT:
            raise TemplateError(f"the chat template wrote more than {MAX_OUTPUT} characters")

    def expect(self, size: float) -> None:
        """A value of `size` is about to be made."""
        self.step()
        if size > MAX_SIZE:
            raise TemplateError(f"the chat template makes a value of more than {MAX_SIZE} characters or elements")

    def hold(self, value: Any) -> Any:
        """`value`, which was just made out of values that exist."""
        size = len(value) if isinstance(value, str) else self.size(value)
        self.expect(size)
        self.allocated += size if isinstance(value, str) else ELEMENT * count(value)
        if self.allocated > MAX_ALLOCATED:
            raise TemplateError(f"the chat template made more than {MAX_ALLOCATED} characters of values")
        return value

    def size(self, *values: Any) -> int:
        """The size of values, all that they hold included; a shared part counts each time, for so
        it does where a value is printed or compared."""
        total = 0
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                total += len(value)
            elif isinstance(value, (list, tuple, dict, set, frozenset, Namespace, Cycler)):
                known = self.known.get(id(value))
                if known is not None:
                    total += known
                else:
                    children = _children(value)
                    total += ELEMENT * (1 + len(children))
                    stack += children
            else:
                total += ELEMENT
            if total > MAX_SIZE:
                self.expect(total)
        return total


def _children(value: Any) -> list[Any]:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    elif isinstance(value, Cycler):
        value = value.items
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def count(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else 1


def listed(budget: Budget, values: Iterable[Any]) -> list[Any]:
    """A lazy sequence made a list, step by step."""
    items = []
    for item in values:
        budget.step()
        items.append(item)
    return items


def refuse(what: str) -> NoReturn:
    raise TemplateError(f"the chat template uses {what}, which turbolm doesn't allow")


def check_widths(spec: str) -> None:
    if re.search(r"\d{7}", spec):
        refuse("a format with a width of more than 6 digits")


def operator_size(budget: Budget, operator: str, left: Any, right: Any) -> float:
    """The size of `left operator right`, before it is computed; refuses what is no use to a prompt."""
    sequences = (str, list, tuple)
    if operator == "%" and isinstance(left, str):
        return _percent_size(budget, left, right)
    if operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, sequences) and isinstance(times, int):
                return budget.size(sequence) * max(times, 0)
    if isinstance(left, sequences) or isinstance(right, sequences):
        return budget.size(left, right)
    if isinstance(left, int) and isinstance(right, int):
        bits, other = left.bit_length(), right.bit_length()
        needed = {"*": bits + other, "**": bits * max(right, 1) if other < 32 else MAX_BITS + 1}
        if needed.get(operator, max(bits, other) + 1) > MAX_BITS and not (operator == "**" and bits < 2):
            refuse(f"integers of more than {MAX_BITS} bits")
    return 0


def _percent_size(budget: Budget, source: str, values: Any) -> float:
    """The most that `source % values` can be."""
    if "*" in source:
        refuse("a format whose width is computed")
    check_widths(source)
    widths = [int(number) for number in re.findall(r"\d+", source)]
    return len(source) + source.count("%") * (6 * budget.size(values) + max(widths, default=0))


_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "index", "isalnum", "isalpha",
    "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
    "isupper", "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper", "zfill",
))  # fmt: skip
"""String methods that templates may call: those whose work and result can be told beforehand."""


def check_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments for `text.name(...)`, a lazy one made a list, after a look at the size of the result."""
    if name not in _METHODS:
        refuse(f"the string method '{name}'")
    given = [*args, *kwargs.values()]
    number = max([v for v in given if isinstance(v, int)], default=0)
    first: Any = args[0] if args else None
    size: float = len(text)
    if name in ("center", "ljust", "rjust", "zfill"):
        size = max(size, number)
    elif name == "expandtabs":
        size += text.count("\t") * max(number, 8)
    elif name == "join" and args:
        items = list(first) if isinstance(first, (str, list, tuple, dict)) else listed(budget, first)
        size = budget.size(items) + len(text) * len(items)
        args = (items, *args[1:])
    elif name == "replace" and len(args) >= 2:
        size = _replaced_size(text, args[0], args[1])
    elif any(isinstance(v, str) and len(v) * len(text) > 1 << 30 for v in given):
        refuse("a search for a very long text")
    budget.expect(size)
    return args


def _replaced_size(text: str, old: Any, new: Any) -> float:
    if not isinstance(old, str) or not isinstance(new, str):
        return len(text)
    return len(text) + text.count(old) * max(len(new) - len(old), 0)


def filter_size(budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """The size of what a filter makes, for those that make more than they are given."""
    given = [*args, *kwargs.values()]
    if name in ("center", "batch", "slice", "round", "indent") and any(
        isinstance(v, int) and abs(v) > 100_000 for v in given
    ):
        refuse(f"the filter '{name}' with a number above 100000")
    if name == "sum" and any(isinstance(v, (list, tuple)) for v in given):
        refuse("the filter 'sum' for lists")
    if name in ("trim", "join", "replace", "indent", "format"):
        text = value if isinstance(value, str) else str(value) if name != "join" else ""
        strings = [v for v in given if isinstance(v, str)]
        longest = max([len(s) for s in strings], default=0)
        if name == "join":
            return budget.size(value) + longest * count(value)
        if name == "format":
            return _percent_size(budget, text, (*args, *kwargs.values()))
        if name == "trim":
            return len(text) * max(longest / 64, 1)
        if name == "indent":
            width = max([longest, *(v for v in given if isinstance(v, int)), 4])
            return len(text) + len(text.splitlines()) * width
        return _replaced_size(text, strings[0], strings[-1]) if strings else len(text)
    return 0
