from __future__ import annotations

import pytest

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError
from turbolm.ladder.rungs import Rung, all_rungs, default_rungs, parse_rung, read_rungs


def test_the_default_is_the_flow_of_four_steps() -> None:
    assert [rung.name for rung in default_rungs(is_packed=False)] == [
        "base", "kv=int8", "weights=awq", "weights=awq+kv=int8",
    ]  # fmt: skip
    assert [rung.name for rung in default_rungs(is_packed=True)] == ["base", "kv=int8"]


@pytest.mark.parametrize(
    ("text", "title", "options"),
    [
        ("base", "base", {}),
        ("kv=int8", "KV int8", {"kv": "int8"}),
        ("weights=awq:64+kv=int4", "AWQ weights, groups of 64 + KV int4", {"kv": "int4"}),
        ("weights=fp8", "fp8 weights", {"weights": "fp8"}),
        ("kv=int4+skip=0,-1", "KV int4 but for 2 layers", {"kv": "int4", "kv_skip_layers": "0,-1"}),
        ("kv=int8:k,int4:v", "KV int8:k,int4:v", {"kv": "int8:k,int4:v"}),
        ("kv=int8+model=./a+b=c", "./a+b=c + KV int8", {"kv": "int8"}),
    ],
)
def test_spelling(text: str, title: str, options: dict[str, str]) -> None:
    rung = parse_rung(text)
    assert (rung.title, rung.engine_options) == (title, options)
    assert parse_rung(rung.name) == rung
    EngineConfig.of(None, **rung.engine_options)


@pytest.mark.parametrize("rung", all_rungs(is_packed=False), ids=lambda rung: rung.name)
def test_every_combination_can_be_spelled(rung: Rung) -> None:
    assert parse_rung(rung.name) == rung
    EngineConfig.of(None, **rung.engine_options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", "can't read the rung 'int8'"),
        ("kvs=int8", "Did you mean 'kv'"),
        ("kv=int8+kv=int4", "can't read the rung"),
        ("weights=awk", "Did you mean 'awq'"),
        ("weights=awq:100", "awq and gptq take 32, 64, 128"),
        ("weights=int8:64", "awq and gptq take"),
        ("model=./x", None),
        ("weights=awq+model=./x", "names a model and weights"),
        ("skip=0", "add kv=int8"),
    ],
)
def test_what_is_no_rung(text: str, message: str | None) -> None:
    if message is None:
        assert parse_rung(text).model == "./x"
        return
    with pytest.raises(ConfigError) as error:
        parse_rung(text)
    assert message in str(error.value)


def test_a_list_of_rungs_begins_with_the_base() -> None:
    names = [rung.name for rung in read_rungs("kv=int8 base 'model=./my model' kv=int8", is_packed=False)]
    assert names == ["base", "kv=int8", "model=./my model"]
    assert len(read_rungs("all", is_packed=False)) == 16
    with pytest.raises(ConfigError, match="can't read the rungs"):
        read_rungs("'kv=int8", is_packed=False)


def test_what_includes_what() -> None:
    kv, weights, both = parse_rung("kv=int8"), parse_rung("weights=awq"), parse_rung("weights=awq+kv=int8")
    assert both.includes(kv)
    assert both.includes(weights)
    assert both.includes(both)
    assert not kv.includes(both)
    assert not both.includes(Rung())
    assert not parse_rung("weights=awq+kv=int4").includes(kv)


def test_layers_in_16_bits_make_a_rung_milder() -> None:
    whole, some, found = parse_rung("kv=int4"), parse_rung("kv=int4+skip=0"), parse_rung("kv=int4+skip=auto")
    assert not some.includes(whole)
    assert not found.includes(whole)
    assert not found.includes(some)
    assert whole.includes(some)
    assert parse_rung("weights=awq+kv=int4+skip=0").includes(some)
    assert parse_rung("weights=awq+kv=int4+skip=0").includes(parse_rung("weights=awq"))
    assert found.title == "KV int4 but for some layers"
