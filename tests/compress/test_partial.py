from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from turbolm.compress.partial import Partial
from turbolm.errors import ConfigError


def test_finished_layers_are_remembered(tmp_path):
    partial = Partial(tmp_path, {"method": "awq"}, 2)
    partial.save_weights(0, {"a": torch.ones(2, 3).T})
    assert Partial(tmp_path, {"method": "awq"}, 2).layers == []  # weights alone are not a finished layer
    partial.finish_layer([{"name": "a"}])
    again = Partial(tmp_path, {"method": "awq"}, 2)
    assert again.layers == [[{"name": "a"}]]
    assert load_file(again.file(0))["a"].shape == (3, 2)


def test_another_job_is_refused(tmp_path):
    Partial(tmp_path, {"method": "awq", "samples": 3}, 2).finish_layer([])
    with pytest.raises(ConfigError, match="unfinished work with samples 3, now it is 4"):
        Partial(tmp_path, {"method": "awq", "samples": 4}, 2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 3}', '{"job": {}}', '{"job": {}, "layers": {}}'])
def test_broken_state_is_refused(tmp_path, text):
    partial = Partial(tmp_path, {}, 2)
    (partial.folder / "state.json").write_text(text)
    with pytest.raises(ConfigError, match="is broken: delete the folder"):
        Partial(tmp_path, {}, 2)
