"""Plans agree with what the engine would allot, and say what fits, what doesn't, and what would."""

from __future__ import annotations

import json
import math

import pytest

from turbolm.config import EngineConfig, Gpu, Hardware, resolve
from turbolm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from turbolm.planner import report
from turbolm.planner.gpus import CARDS, found_cpu, found_gpus, parse_machine
from turbolm.planner.model import open_model
from turbolm.planner.plan import RUNGS, Demand, plan
from turbolm.planner.speed import CPU, Rates

GIB = 1 << 30
LAPTOP = Hardware("CPU", "x86_64", 4, ("avx2",), 16 * GIB, 8 * GIB, native="avx2")


@pytest.mark.parametrize("machine", ["h200", "24GB", "4090x4"])
def test_every_row_is_what_the_engine_would_allot(shape, machine: str) -> None:
    model, cards = open_model(shape("llama-3-8b")), parse_machine(machine)
    found = plan(model, cards, Demand(4096))
    assert {fit.rung for fit in found.fits} == set(RUNGS)
    for fit in found.fits:
        options = {"weights": fit.rung.weights, "kv": fit.rung.kv, "tensor_parallel": fit.tensor_parallel}
        if fit.concurrency:
            config = resolve(EngineConfig(**options), model.needs(fit.tensor_parallel), cards.hardware)
            assert (config.weight_bytes, config.kv_bytes_per_token) == (fit.weight_bytes, fit.kv_bytes_per_token)
            assert abs(config.pool_tokens - fit.kv_tokens) <= config.block_size
            assert config.max_context == fit.max_context


def test_the_command_of_an_answer_has_room_for_what_it_promises(shape) -> None:
    model = open_model(shape("internlm2-20b"))
    for name in ("24GB", "4090x2", "h100"):
        cards = parse_machine(name)
        best = plan(model, cards, Demand(4096)).best
        options = {"weights": best.rung.weights, "kv": best.rung.kv, "tensor_parallel": best.tensor_parallel}
        config = EngineConfig(**options, max_context=4096, max_batch_size=best.concurrency)
        assert resolve(config, model.needs(best.tensor_parallel), cards.hardware).pool_tokens >= 4096 * best.concurrency


def test_twenty_billion_parameters_on_one_card_of_24_gigabytes(shape) -> None:
    model = open_model(shape("internlm2-20b"))
    found = plan(model, parse_machine("24GB"), Demand(4096))
    assert model.num_parameters == pytest.approx(19.86e9, rel=0.01)
    assert (found.best.rung.weights, found.best.tensor_parallel) == ("int4", 1)
    assert found.best.concurrency >= 8
    text = report.answer(model, found)
    assert f"internlm2-20b in int4 fits one 24 GB card: 4096-token contexts x {found.best.concurrency}" in text
    words = report.command(model, found).split()
    assert words[:2] == ["turbolm", "serve"]
    assert words[words.index("--weights") + 1] == "int4"


def test_what_does_not_fit_is_said_with_what_would(shape) -> None:
    model = open_model(shape("internlm2-20b"))
    found = plan(model, parse_machine("16GB"), Demand(32768, 4))
    assert found.best is None
    assert report.command(model, found) is None
    text = report.answer(model, found)
    assert "does not fit one 16 GB card with 32768-token contexts x 4" in text
    advised = int(text.partition("--context ")[2].partition(",")[0])
    assert plan(model, parse_machine("16GB"), Demand(advised, 4)).best is not None
    assert "--gpu 16gbx2" in text
    tiny = report.answer(model, plan(model, parse_machine("4GB"), Demand(4096)))
    assert "--context" not in tiny


def test_demanding_more_sequences_takes_a_smaller_rung(shape) -> None:
    model, cards = open_model(shape("llama-3-8b")), parse_machine("4090")
    few, many = (plan(model, cards, Demand(8192, count)).best for count in (1, 16))
    assert (few.rung.weights, few.rung.kv) == ("auto", "auto")
    assert RUNGS.index(many.rung) > RUNGS.index(few.rung)
    assert many.concurrency == 16


def test_speed_grows_with_bandwidth_and_falls_with_bytes(shape) -> None:
    model = open_model(shape("llama-3-8b"))

    def alone(name: str) -> list[float]:
        return [fit.tokens_per_second for fit in plan(model, parse_machine(name), Demand(2048)).fits]

    assert all(a > b for a, b in zip(alone("h200"), alone("a100"), strict=True))
    plain, _, int8, _, int4, *_ = alone("h200")
    assert int4 > int8 > plain
    assert all(fit.tokens_per_second is None for fit in plan(model, parse_machine("80GB"), Demand(2048)).fits)


def test_a_cpu_keeps_its_own_limits(shape) -> None:
    model = open_model(shape("llama-3-8b"))
    machine = found_cpu(LAPTOP, Rates(2e10, 1e12, CPU))
    found = plan(model, machine, Demand(2048))
    assert found.best.rung.weights == "int4"  # 8 GiB
    assert f"--kv-memory {math.ceil(found.best.concurrency * 2048 * found.best.kv_bytes_per_token / 2**20)}M" in (
        report.command(model, found)
    )
    assert 1 < found.best.tokens_per_second < 5  # 4.5 GB at 20 GB/s


def test_a_quantized_shape_has_no_other_weights(shape) -> None:
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    model = open_model(shape("llama-3-8b", quantization_config=quantization))
    fits = plan(model, parse_machine("h200"), Demand(4096)).fits
    assert {fit.rung.weights for fit in fits} == {"auto"}
    plain = plan(open_model(shape("llama-3-8b", quantization_config=None)), parse_machine("h200"), Demand(4096)).fits
    rounded = next(fit for fit in plain if fit.rung.weights == "int4")
    assert fits[0].weight_bytes == pytest.approx(rounded.weight_bytes, rel=0.01)


def test_json_holds_every_row(shape) -> None:
    model = open_model(shape("llama-3-8b"))
    plans = [plan(model, parse_machine(name), Demand(4096)) for name in ("h200x2", "4GB")]
    value = json.loads(json.dumps(report.as_json(model, plans)))
    fits, misses = value["machines"]
    assert (fits["fits"], misses["fits"]) == (True, False)
    assert fits["rows"][fits["best"]]["concurrency"] >= 8
    assert len(fits["rows"]) == 2 * len(RUNGS)
    assert misses["command"] is None


def test_counts_that_do_not_divide_the_model_are_left_out(shape) -> None:
    model = open_model(shape("small", num_attention_heads=4, num_key_value_heads=2))
    sizes = {fit.tensor_parallel for fit in plan(model, parse_machine("24GBx3"), Demand(512)).fits}
    assert sizes == {1, 2}


@pytest.mark.parametrize("text", ["h300", "0GB", "24GBx0", "4090x", "", "24 parsecs", "h200x999"])
def test_unknown_cards_are_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError, match="h200, h100"):
        parse_machine(text)


def test_cards_by_name_and_size() -> None:
    assert all(parse_machine(name).num_gpus == 1 for name in CARDS)
    assert parse_machine("H200X8").num_gpus == 8
    assert parse_machine("80GiB").hardware.gpus[0].total_memory == int(80 * GIB * 0.98)


@pytest.mark.parametrize(("context", "concurrency", "words"), [(0, 0, "from 1 on"), (9000, 0, "8192"), (1, -1, "1 on")])
def test_demands_that_make_no_sense_are_refused(shape, context: int, concurrency: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(open_model(shape("llama-3-8b")), parse_machine("h200"), Demand(context, concurrency))


def test_models_that_can_not_be_planned_say_why(shape, tmp_path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(CheckpointError, match="give a model"):
        open_model(str(tmp_path / "broken.json"))
    with pytest.raises(UnsupportedModelError, match="Supported: InternLM2"):
        open_model(shape("small", architectures=["BertModel"]))
    with pytest.raises(ModelNotFoundError, match="models pull ms:org/model"):
        open_model("ms:org/model")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA Something", None),
    ],
)
def test_the_speed_of_gpus_that_are_here(name: str, key: str | None) -> None:
    machine = found_gpus((Gpu(name, 24 * GIB, 20 * GIB, (8, 9)),) * 2)
    assert (machine.rates == parse_machine(key).rates) if key else machine.rates is None
    assert (machine.title, machine.num_gpus) == (f"2 x {name}", 2)
