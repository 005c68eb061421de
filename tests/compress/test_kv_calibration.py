from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from turbolm import LLM
from turbolm.compress import calibrate_kv, quantize
from turbolm.errors import CheckpointError, ConfigError
from turbolm.kv import KvShape
from turbolm.kv_scales import read_scales, scales_path

SHAPES = (KvShape(2, 16, 16),) * 2


def test_the_ranges_are_those_of_what_the_cache_would_hold(tiny_model, data_file):
    """With v doubled in the first layer, its range is, and that of k is what it was."""
    name, found, plain = "model.layers.0.self_attn.v_proj.weight", [], tiny_model()
    doubled = tiny_model({name: 2 * load_file(plain / "model.safetensors")[name]}, "doubled")
    for folder in (plain, doubled):
        path, warnings = calibrate_kv(str(folder), data=str(data_file), context=64)
        assert path == scales_path(folder) and any("tokens only" in warning for warning in warnings)
        found.append(read_scales(path, SHAPES)[0])
    assert found[0].k == found[1].k
    torch.testing.assert_close(torch.tensor(found[1].v), 2 * torch.tensor(found[0].v))
    assert all(low < 0 < high for low, high in (*found[0].k, *found[0].v))


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_quantized_models_have_scales_too(tiny_model, data_file, tmp_path, method):
    folder = tiny_model()
    quantize(
        str(folder),
        tmp_path / "out",
        method,
        group_size=32,
        **({"data": str(data_file), "context": 64} if method == "awq" else {}),
    )
    path, _ = calibrate_kv(str(tmp_path / "out"), data=str(data_file), context=64)
    plain, _ = calibrate_kv(str(folder), data=str(data_file), context=64)
    for own, other in zip(read_scales(path, SHAPES), read_scales(plain, SHAPES), strict=True):
        torch.testing.assert_close(torch.tensor(own.k), torch.tensor(other.k), rtol=0.5, atol=1.0)


def test_loading_takes_them_and_says_so(tiny_model, data_file, caplog):
    folder = tiny_model()
    scores = {}
    path, _ = calibrate_kv(str(folder), data=str(data_file), context=64)
    for name, options in {
        "plain": {"kv": "float32"},
        "static": {"kv": "int8"},
        "dynamic": {"kv": "int8", "kv_scales": "off"},
        "reference": {"kv": "int8", "kv_scales": str(path), "kernels": "reference"},
    }.items():
        with caplog.at_level("INFO"), LLM(str(folder), progress=False, max_context=128, threads=1, **options) as llm:
            assert (str(path) in " ".join(llm.config.reasons)) == (name in ("static", "reference"))
            scores[name] = llm.score("def f(x):\n    return x + 1")[0].log_likelihood
    assert sum(str(path) in record.getMessage() for record in caplog.records) == 2
    assert len(set(scores.values())) == 4
    assert scores["static"] == pytest.approx(scores["plain"], rel=0.02)
    assert scores["static"] == pytest.approx(scores["reference"], rel=2e-3)
    with pytest.raises(ConfigError, match="static scales are for int8"):
        LLM(str(folder), progress=False, kv="int4", kv_scales=str(path))
    path.write_text("{}")
    with pytest.raises(CheckpointError, match="Make it again"):
        LLM(str(folder), progress=False, kv="int8")


def test_keys_that_are_not_finite_are_refused(tiny_model, data_file):
    big = torch.full((64,), 3e38)
    folder = tiny_model({"model.layers.0.input_layernorm.weight": big})
    with pytest.raises(CheckpointError, match=r"layer 0 of .* NaN or infinite"):
        calibrate_kv(str(folder), data=str(data_file), context=64)
