"""What a report recommends, read back to serve it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError

FORMAT = "turbolm ladder 1"  # of report.json


@dataclass(frozen=True, slots=True)
class Recommendation:
    model: str
    options: dict[str, Any]  # fields of EngineConfig
    base: str  # the model that it was compared with
    agreement: float | None  # part of the base's tokens that it finds likeliest; None: it is the base


def read_recommendation(path: Path) -> Recommendation:
    """What a report.json recommends. ConfigError where it is none, or recommends nothing."""
    try:
        report = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read the report {path} ({error}); give the report.json of turbolm ladder") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ConfigError(f"{path} is no report of this version's turbolm ladder; give its report.json")
    serve = report.get("serve")
    if serve is None:
        raise ConfigError(f"{path} recommends nothing, since the base isn't good enough: choose a larger model")
    if (
        not isinstance(serve, dict)
        or not isinstance(serve.get("model"), str)
        or not isinstance(serve.get("options"), dict)
    ):
        raise ConfigError(f"{path} is damaged: its 'serve' has no model and options; run turbolm ladder again")
    return Recommendation(serve["model"], serve["options"], *_beside_the_base(report))


def _beside_the_base(report: Mapping[str, Any]) -> tuple[str, float | None]:
    try:
        chosen = next(rung for rung in report["rungs"] if rung["name"] == report["recommended"])
        agreement = chosen["agreement"] and chosen["agreement"]["top1"]
        return str(report["model"]["name"]), None if agreement is None else float(agreement)
    except (LookupError, StopIteration, TypeError, ValueError):
        raise ConfigError("the report is damaged: its rungs can't be read; run turbolm ladder again") from None
