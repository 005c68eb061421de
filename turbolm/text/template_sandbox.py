"""Jinja for templates that nobody has reviewed: a sandbox with limits on time, memory and output.

Jinja's sandbox keeps a template away from the process, not from its time and memory. Here every
block of the compiled template counts as a step, and every operation that can make something large
(operators, literals, slices, calls, filters, output) passes through a `Budget`, which
  - looks at the thread's processor time, at each step: nothing between two steps takes long, since
  - it refuses a value above `MAX_SIZE` before it is made, and
  - it adds up what is made and what is written, up to `MAX_ALLOCATED` and `MAX_OUTPUT`.
Sizes are characters; each element of a container counts as `ELEMENT` of them.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from types import CodeType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Cycler, Namespace
from markupsafe import escape

from turbolm.errors import TemplateError

MAX_SOURCE = 256 * 1024  # characters of a template
MAX_SIZE = 8 << 20  # of one value
MAX_ALLOCATED = 128 << 20  # of all values made during a rendering
MAX_OUTPUT = 8 << 20
MAX_SECONDS = 1.0  # processor time of a rendering
MAX_BITS = 4096  # of an integer
ELEMENT = 16

_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What the code of a template can raise, RecursionError being a RuntimeError."""


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
        self.allocated += size if isinstance(value, str) else ELEMENT * _count(value)
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
        value = value._Namespace__attrs  # type: ignore[attr-defined]
    elif isinstance(value, Cycler):
        value = value.items
    return [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)


def _count(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple, dict, set, frozenset)) else 1


class _Generator(CodeGenerator):
    """Compiles with calls to the budget where Jinja's code would work on its own."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        body = list(nodes_)
        outputs = (child for node in body if isinstance(node, nodes.Output) for child in node.nodes)
        static = sum(len(child.data) for child in outputs if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.step({static})")
        super().blockvisit(body, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(environment.step(0) or ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._held(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._held(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._held(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._held(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _held(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.hold(")
        visit(node, frame)
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's words for training; here, a scope of its own."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's way

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """`str.format`, field by field."""

    def __init__(self, environment: _Environment) -> None:
        super().__init__(environment)
        self._budget = environment.budget

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_widths(format_spec)
        self._budget.size(value)
        text: str = self._budget.hold(super().format_field(value, format_spec))
        self._budget.write(len(text))  # fields add up in a result that nothing else sees growing
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._budget.size(value)
        return self._budget.hold(super().convert_field(value, conversion))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """One for all templates and threads; each thread has its own budget."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing runs while compiling
            finalize=jinja2.pass_context(lambda _context, value: self.text(value)),
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        self._local = threading.local()
        self.globals.pop("lipsum", None)
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        for name in ("urlize", "xmlattr", "pprint", "wordwrap", "striptags"):  # slow, and for web pages
            del self.filters[name]
        self.filters.update(tojson=self._tojson, safe=str, e=_escape, escape=_escape, forceescape=_escape)
        for name, function in list(self.filters.items()):
            self.filters[name] = self._guarded(name, function)
        for name, function in list(self.tests.items()):
            self.tests[name] = self._stepping(function)

    @property
    def budget(self) -> Budget:
        budget = getattr(self._local, "budget", None)
        if budget is None:
            raise nodes.Impossible  # Jinja tries to run something at compile time: it takes no for an answer
        return budget  # type: ignore[no-any-return]

    @budget.setter
    def budget(self, budget: Budget | None) -> None:
        self._local.budget = budget

    # What compiled templates call.

    def step(self, static: int) -> None:
        """A block is entered that writes `static` characters of the template itself."""
        self.budget.write(static)

    def hold(self, value: Any) -> Any:
        return self.budget.hold(value)

    def concat(self, values: tuple[Any, ...]) -> str:
        self.budget.expect(self.budget.size(*values))
        return self.hold("".join([str(value) for value in values]))  # type: ignore[no-any-return]

    def text(self, value: Any) -> str:
        """`value` as it is written out."""
        budget = self.budget
        if not isinstance(value, str):
            budget.size(value)
            value = str(value)
        budget.write(len(value))
        return value  # type: ignore[no-any-return]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.expect(_binop_size(self.budget, operator, left, right))
        return self.hold(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        budget = __self.budget
        owner = getattr(__obj, "__self__", None)
        hidden = ("_loop_vars", "_block_vars", "caller")  # Jinja's own
        budget.expect(budget.size(*args, *(v for k, v in kwargs.items() if k not in hidden)))
        if isinstance(owner, str):
            args = _check_method(budget, owner, __obj.__name__, args)
        elif isinstance(owner, (int, float)) and __obj.__name__ in ("to_bytes", "from_bytes"):
            _refuse(f"the method {__obj.__name__}")
        result = super().call(__context, __obj, *args, **kwargs)
        return budget.hold(result) if isinstance(result, (str, list, tuple, dict, set)) else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        source = value.__self__
        with_map = value.__name__ == "format_map"

        def wrapper(*args: Any, **kwargs: Any) -> str:
            if with_map and (kwargs or len(args) != 1):
                raise TypeError("format_map() takes one mapping")
            names = args[0] if with_map else kwargs
            return self.hold(_Formatter(self).vformat(str(source), () if with_map else args, names))  # type: ignore[no-any-return]

        return wrapper

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        given = getattr(function, "jinja_pass_arg", None)  # what Jinja would put first

        @jinja2.pass_context
        def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            if name in ("join", "list", "sort") and not isinstance(value, (str, list, tuple, dict)):
                value = budget.hold(self._listed(value))
            budget.expect(budget.size(value, *args, *kwargs.values()))
            budget.expect(_filter_size(budget, name, value, args, kwargs))
            first = {
                None: (),
                "context": (context,),
                "eval_context": (context.eval_ctx,),
                "environment": (self,),
            }[given and given.name]
            result = function(*first, value, *args, **kwargs)
            return budget.hold(result) if isinstance(result, (str, list, tuple, dict, set)) else result

        return guarded

    def _listed(self, value: Iterable[Any]) -> list[Any]:
        items = []
        for item in value:
            self.budget.step()
            items.append(item)
        return items

    def _stepping(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            return function(*args, **kwargs)

        if hasattr(function, "jinja_pass_arg"):
            stepping.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return stepping

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers gives it to templates: no HTML escapes, Unicode as it is."""
        if separators is not None and any(len(s) > 16 for s in separators):
            _refuse("a JSON separator of more than 16 characters")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=bool(sort_keys)
        )
        if indent is None:
            return encoder.encode(value)
        if (len(indent) if isinstance(indent, str) else indent) > 64:
            _refuse("a JSON indent of more than 64")
        chunks = []
        for chunk in encoder.iterencode(value):
            self.budget.write(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)


def _refuse(what: str) -> NoReturn:
    raise TemplateError(f"the chat template uses {what}, which turbolm doesn't allow")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the chat template refuses the messages: {message}")


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    if not isinstance(format, str) or len(format) > 256 or re.search(r"%[^A-Za-z%]*\d", format):
        _refuse("a date format with widths, or a very long one")
    return datetime.now().strftime(format)


def _escape(value: object) -> str:
    return str(escape(str(value)))


def _check_widths(spec: str) -> None:
    if any(len(number) > 6 for number in re.findall(r"\d+", spec)):
        _refuse("a format with a width of more than 6 digits")


def _binop_size(budget: Budget, operator: str, left: Any, right: Any) -> float:
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
            _refuse(f"integers of more than {MAX_BITS} bits")
    return 0


def _percent_size(budget: Budget, source: str, values: Any) -> float:
    """The most that `source % values` can be."""
    if "*" in source:
        _refuse("a format whose width is computed")
    widths = [int(number[:7]) for number in re.findall(r"\d+", source)]
    return len(source) + source.count("%") * (6 * budget.size(values) + max(widths, default=0))


_METHODS = frozenset(
    "capitalize casefold center count endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip partition "
    "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
    "strip swapcase title upper zfill".split()
)
"""String methods that templates may call: those whose work and result can be told beforehand."""


def _check_method(budget: Budget, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments for `text.name(...)`, a lazy one made a list, after a look at the size of the result."""
    if name not in _METHODS:
        _refuse(f"the string method '{name}'")
    first = args[0] if args else None
    size: float = len(text)
    if name in ("center", "ljust", "rjust", "zfill") and isinstance(first, int):
        size = max(size, first)
    elif name == "expandtabs" and isinstance(first, int):
        size += text.count("\t") * max(first, 0)
    elif name == "join" and args:
        items = list(first) if isinstance(first, (str, list, tuple, dict)) else _ENVIRONMENT._listed(first)
        size = budget.size(items) + len(text) * len(items)
        args = (items, *args[1:])
    elif name == "replace" and len(args) >= 2:
        size = _replaced_size(text, args[0], args[1])
    elif isinstance(first, str) and len(first) * len(text) > 1 << 30:
        _refuse("a search for a very long text")
    budget.expect(size)
    return args


def _replaced_size(text: str, old: Any, new: Any) -> float:
    if not isinstance(old, str) or not isinstance(new, str):
        return len(text)
    return len(text) + text.count(old) * max(len(new) - len(old), 0)


def _filter_size(
    budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> float:
    """The size of what a filter makes, for those that make more than they are given."""
    given = [*args, *kwargs.values()]
    if name in ("center", "batch", "slice", "round", "indent") and any(
        isinstance(v, int) and abs(v) > 100_000 for v in given
    ):
        _refuse(f"the filter '{name}' with a number above 100000")
    if name == "sum" and any(isinstance(v, (list, tuple)) for v in given):
        _refuse("the filter 'sum' for lists")
    if name in ("trim", "join", "replace", "indent", "format"):
        text = value if isinstance(value, str) else str(value) if name != "join" else ""
        strings = [v for v in given if isinstance(v, str)]
        longest = max([len(s) for s in strings], default=0)
        if name == "join":
            return budget.size(value) + longest * _count(value)
        if name == "format":
            return _percent_size(budget, text, (*args, *kwargs.values()))
        if name == "trim":
            return len(text) * max(longest / 64, 1)
        if name == "indent":
            width = max([longest, *(v for v in given if isinstance(v, int)), 4])
            return len(text) + len(text.splitlines()) * width
        return _replaced_size(text, strings[0], strings[-1]) if strings else len(text)
    return 0


_ENVIRONMENT = _Environment()
assert set(_ENVIRONMENT.filters) <= set(FILTERS)


def compile_template(source: str) -> jinja2.Template:
    """Raises TemplateError for a template that is too long or no valid Jinja."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source)} characters; allowed are {MAX_SOURCE}")
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
    except _FAILURES as error:
        raise TemplateError(f"the chat template can't be compiled: {_describe(error)}") from error


def render_template(template: jinja2.Template, variables: Mapping[str, Any], known: Mapping[int, int]) -> str:
    """The text that `template` writes. `variables` must be plain data; `known` gives the sizes of its
    containers by `id`. Raises TemplateError where the template fails, or goes beyond the limits."""
    _ENVIRONMENT.budget = Budget(known)
    try:
        return "".join(template.generate(**variables))
    except _FAILURES as error:
        raise TemplateError(f"the chat template fails: {_describe(error)}") from error
    finally:
        _ENVIRONMENT.budget = None


def _describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return f"{error}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
