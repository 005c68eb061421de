"""Command-line flags from the configuration dataclasses: one definition, one help text.

    @takes_options("Engine", EngineConfig)
    def serve(model: str, **options: object) -> None:

gives `serve` a flag for each field of EngineConfig; `options` holds those that were given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Optional, TypeVar, get_type_hints

from cyclopts import Group, Parameter

from turbolm.fields import field_help

Command = TypeVar("Command", bound=Callable[..., Any])


def takes_options(
    title: str, cls: type, omit: tuple[str, ...] = (), *, show_defaults: bool = True
) -> Callable[[Command], Command]:
    """Adds a flag per field of the dataclass `cls`, less `omit`, to a command that takes `**options`, under
    `title` in its help. A flag that isn't given isn't in `options`."""

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)  # annotations are strings; flags carry real types
        named = [
            parameter.replace(annotation=hints.get(parameter.name, parameter.annotation))
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD  # only known flags are taken
        ]
        flags = _flags(title, cls, omit, show_defaults)
        command.__signature__ = inspect.Signature([*named, *flags])  # type: ignore[attr-defined]
        return command

    return decorate


def given(options: Mapping[str, object], cls: type) -> dict[str, object]:
    """Those of `options` that are fields of `cls` and were given."""
    return {field.name: options[field.name] for field in fields(cls) if options.get(field.name) is not None}


def _flags(title: str, cls: type, omit: tuple[str, ...], show_defaults: bool) -> list[inspect.Parameter]:
    group = Group(title, sort_key=len(title))
    hints, texts = get_type_hints(cls), field_help(cls)
    flags = []
    for field in fields(cls):
        if field.name in omit:
            continue
        parameter = Parameter(
            name=field.metadata.get("flag"),
            help=texts[field.name],
            group=group,
            show_default=show_defaults and _shown_default(field),
            negative_iterable=(),
        )
        annotation: Any = Annotated[Optional[hints[field.name]], parameter]  # noqa: UP045
        flags.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return flags


def _shown_default(field: Field[Any]) -> Callable[[Any], str] | bool:
    default = field.default
    if default is None or default is MISSING or default == ():
        return False
    text = {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default)
    return lambda _: text
