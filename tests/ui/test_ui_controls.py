from __future__ import annotations

import pytest

from turbolm.errors import RequestError
from turbolm.fields import field_help
from turbolm.types import SamplingParams
from turbolm.ui.controls import NAMES, controls, read


def values(**given):
    return [given.get(name, "") for name in NAMES]


def test_the_form_explains_every_parameter_and_shows_what_is_recommended():
    form = {c.name: c for c in controls(SamplingParams(temperature=0.6, stop=("a", "b")), {})}
    texts = field_help(SamplingParams)
    assert all(c.explanation.startswith(texts[name]) and not c.value for name, c in form.items())
    assert form["temperature"].placeholder == "0.6"
    assert form["stop"].placeholder == "a\nb"
    assert form["max_tokens"].placeholder == "no limit"
    assert {c.placeholder for c in controls(None, {})} == {"as the server says"}


def test_parameters_of_the_command_line_stand_in_the_form_and_are_read_back():
    given = {"temperature": 0.1, "max_tokens": 7, "stop": ("x y", "z"), "seed": 12345678901234567}
    form = controls(SamplingParams(), given)
    assert read([c.value for c in form]) == given
    assert SamplingParams.of(None, **given)


def test_empty_fields_are_not_given():
    assert read(values()) == {}
    assert read([None] * len(NAMES)) == {}
    assert read(values(temperature=" ", stop="\n")) == {}


def test_numbers_are_numbers():
    assert read(values(temperature=" 0.5 ", top_k="4", top_p=1)) == {"temperature": 0.5, "top_k": 4, "top_p": 1.0}
    with pytest.raises(RequestError, match="temperature is '0,5'; give a number"):
        read(values(temperature="0,5"))
    with pytest.raises(RequestError, match=r"top_k is '1\.5'; give a whole number"):
        read(values(top_k="1.5"))
    with pytest.raises(RequestError, match="max_tokens is '9999"):
        read(values(max_tokens="9" * 10_000))
