from __future__ import annotations

import pytest

from turbolm.compress.recipe import METHODS, Recipe
from turbolm.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awk"}, "method is 'awk'.*Did you mean 'awq'"),
        ({"method": "awq", "format": "gguf"}, "format is 'gguf'; allowed: auto, awq"),
        ({"method": "awq", "bits": 3}, "bits is 3; allowed: 4"),
        ({"method": "awq", "group_size": 100}, "group_size is 100; allowed: 32, 64, 128, -1"),
        ({"method": "int8", "group_size": 64}, "int8 has one scale per output row"),
        ({"method": "fp8", "format": "awq"}, "'awq' holds int4 weights; fp8 is written as compressed-tensors"),
        ({"method": "gptq", "order": "group", "format": "awq"}, "order 'group' needs the format 'gptq'"),
        ({"method": "gptq", "damping": 2.0}, "damping must be"),
        ({"method": "awq", "samples": 0}, "samples must be a whole number"),
        ({"method": "awq", "contxt": 5}, "unknown quantization option 'contxt'. Did you mean 'context'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.of(**options)


def test_group_size_fits_the_model():
    widths = [("a", 576), ("b", 1536)]
    assert Recipe("awq").fitted(widths).group_size == 64
    assert Recipe("awq", group_size=-1).fitted(widths).group_size == -1
    assert Recipe("awq").fitted([("a", 100)]).group_size == -1
    assert Recipe("int8").fitted(widths).group_size == 0
    with pytest.raises(
        ConfigError, match="128 doesn't divide the 576 input columns of a; this model allows 64, 32, -1"
    ):
        Recipe("rtn", group_size=128).fitted(widths)


def test_formats():
    assert [Recipe(method).file_format for method in METHODS] == [
        "awq", "gptq", "compressed-tensors", "compressed-tensors", "compressed-tensors",
    ]  # fmt: skip
