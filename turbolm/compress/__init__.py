"""Compression: a model's weights in 4 or 8 bits, calibrated on data, written in formats that other engines load too.

from turbolm.compress import quantize, unpack
quantize("org/model", "model-awq", "awq", data="chats.jsonl")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbolm.compress.conversion import convert
    from turbolm.compress.job import quantize, unpack
    from turbolm.compress.kv import calibrate_kv
    from turbolm.compress.recipe import METHODS, Recipe
    from turbolm.compress.report import MatrixReport, Report

# Imported when first used, so that the command line answers without loading torch.
_HOMES = {
    "METHODS": "turbolm.compress.recipe",
    "MatrixReport": "turbolm.compress.report",
    "Recipe": "turbolm.compress.recipe",
    "Report": "turbolm.compress.report",
    "convert": "turbolm.compress.conversion",
    "calibrate_kv": "turbolm.compress.kv",
    "quantize": "turbolm.compress.job",
    "unpack": "turbolm.compress.job",
}

__all__ = ["METHODS", "MatrixReport", "Recipe", "Report", "calibrate_kv", "convert", "quantize", "unpack"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'turbolm.compress' has no attribute '{name}'")
