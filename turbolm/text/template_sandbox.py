"""Jinja for templates that nobody has reviewed: a sandbox with limits on time, memory and output.

Jinja's sandbox keeps a template away from the process, not from its time and memory. Here every
block of the compiled template counts as a step, and every operation that can make something large
(operators, literals, slices, calls, filters, output) passes through a `Budget`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from markupsafe import escape

from turbolm.errors import TemplateError
from turbolm.text.template_budget import (
    Budget,
    check_method,
    check_widths,
    filter_size,
    listed,
    operator_size,
    refuse,
)

MAX_SOURCE = 128 * 1024  # characters of a template

_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What the code of a template can raise, RecursionError being a RuntimeError."""


class _Generator(CodeGenerator):
    """Compiles with calls to the budget where Jinja's code would work on its own."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        body = list(nodes_)
        outputs = (child for node in body if isinstance(node, nodes.Output) for child in node.nodes)
        static = sum(len(child.data) for child in outputs if isinstance(child, nodes.TemplateData))
        self.writeline(f"environment.step({static})")
        super().blockvisit(body, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.joined((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        self.write("(environment.step(0) or ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._held(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._held(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._held(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802
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
        check_widths(format_spec)
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

    def joined(self, values: tuple[Any, ...]) -> str:
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
        self.budget.expect(operator_size(self.budget, operator, left, right))
        return self.hold(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget = __self.budget
        owner = getattr(__obj, "__self__", None)
        hidden = ("_loop_vars", "_block_vars", "caller")  # Jinja's own
        budget.expect(budget.size(*args, *(v for k, v in kwargs.items() if k not in hidden)))
        if isinstance(owner, str):
            args = check_method(budget, owner, __obj.__name__, args, kwargs)
        elif isinstance(owner, (int, float)) and __obj.__name__ in ("to_bytes", "from_bytes"):
            refuse(f"the method {__obj.__name__}")
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

    def _guarded(self, name: str, function: Any) -> Callable[..., Any]:
        given = getattr(function, "jinja_pass_arg", None)  # what Jinja would put first

        @jinja2.pass_context
        def guarded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            if name in ("join", "list", "sort") and not isinstance(value, (str, list, tuple, dict)):
                value = budget.hold(listed(budget, value))
            budget.expect(budget.size(value, *args, *kwargs.values()))
            budget.expect(filter_size(budget, name, value, args, kwargs))
            first = {
                None: (),
                "context": (context,),
                "eval_context": (context.eval_ctx,),
                "environment": (self,),
            }[given and given.name]
            result = function(*first, value, *args, **kwargs)
            return budget.hold(result) if isinstance(result, (str, list, tuple, dict, set)) else result

        return guarded

    def _stepping(self, function: Any) -> Callable[..., Any]:
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
            refuse("a JSON separator of more than 16 characters")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=bool(sort_keys)
        )
        if indent is None:
            return encoder.encode(value)
        if (len(indent) if isinstance(indent, str) else indent) > 64:
            refuse("a JSON indent of more than 64")
        chunks = []
        for chunk in encoder.iterencode(value):
            self.budget.write(len(chunk))
            chunks.append(chunk)
        return "".join(chunks)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the chat template refuses the messages: {message}")


def _strftime_now(format: str) -> str:  # noqa: A002 - the name that templates use
    if not isinstance(format, str) or len(format) > 256 or re.search(r"%[^A-Za-z%]*\d", format):
        refuse("a date format with widths, or a very long one")
    return datetime.now().strftime(format)


def _escape(value: object) -> str:
    return str(escape(str(value)))


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
