"""What a report recommends, read back to serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError

FORMAT = "turbolm ladder 1"  # of report.json


def read_recommendation(path: Path) -> tuple[str, dict[str, Any]]:
    """The model and the engine options that a report.json recommends. ConfigError where it is none, or recommends
    nothing."""
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
    return serve["model"], serve["options"]
