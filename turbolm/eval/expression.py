"""A Python expression as a check. It is the data's code, and runs with the rights of the user: only where allowed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from types import CodeType
from typing import Any

_MODULES = {"json": json, "math": math, "re": re}


def compile_expression(source: str) -> CodeType:
    """SyntaxError where it is none."""
    return compile(source, "<check>", "eval")


def evaluate(source: str, names: Mapping[str, Any]) -> tuple[float, str]:
    """(score from 0 to 1, why it failed): truth values and numbers are scores."""
    try:
        value = eval(compile_expression(source), {**_MODULES, **names})
    except (ArithmeticError, AttributeError, LookupError, NameError, RecursionError, TypeError, ValueError) as error:
        return 0.0, f"the expression failed: {type(error).__name__}: {error}"
    if isinstance(value, (int, float)) and 0 <= value <= 1:
        return float(value), ""
    if value is None or isinstance(value, re.Match):
        return float(value is not None), ""
    return 0.0, f"the expression gave {value!r}; give a truth value or a number from 0 to 1"
