from __future__ import annotations

from dataclasses import dataclass, field, fields

import pytest
from cyclopts import App, CycloptsError

from turbolm.cli.options import given, takes_options
from turbolm.config import EngineConfig
from turbolm.fields import field_help
from turbolm.types import SamplingParams


@dataclass(frozen=True)
class Paint:
    layers: int = 2
    """How many
    layers."""
    glossy: bool = True
    """Shines."""
    colors: tuple[str, ...] = ()
    """Which colors."""
    coats: tuple[str, ...] = field(default=(), metadata={"flag": "--coat"})
    """One at a time."""
    secret: int = 0
    """Not a flag."""


def run(arguments):
    app = App(result_action="return_value")

    @app.default
    @takes_options("Paint", Paint, ("secret",))
    def paint(wall: str, **options: object):
        return wall, given(options, Paint)

    return app(arguments, exit_on_error=False, print_error=False)


def test_a_field_may_name_its_flag():
    assert run(["north", "--coat", "a=b", "--coat", "c"]) == ("north", {"coats": ("a=b", "c")})


def test_only_what_is_given_is_passed_on():
    assert run(["north"]) == ("north", {})
    assert run(["north", "--layers", "0"]) == ("north", {"layers": 0})
    assert run(["north", "--no-glossy", "--colors", "red", "--colors", "blue"]) == (
        "north",
        {"glossy": False, "colors": ("red", "blue")},
    )


@pytest.mark.parametrize("flag", ["--secret", "--layer", "--whatever"])
def test_other_flags_are_refused(flag):
    with pytest.raises(CycloptsError):
        run(["north", flag, "1"])


def test_help_is_the_docstring_of_the_field():
    assert field_help(Paint)["layers"] == "How many layers."


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams])
def test_every_field_of_the_configuration_has_help(cls):
    texts = field_help(cls)
    assert [field.name for field in fields(cls) if not texts.get(field.name)] == []
