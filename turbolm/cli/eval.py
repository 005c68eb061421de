"""`turbolm eval`: a model's scores on the user's questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.eval.config import ExamConfig

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]
_Json = Annotated[Path | None, Parameter(name="--json")]


@takes_options("Questions", ExamConfig)
@takes_options("Engine", EngineConfig)
def evaluate(model: _ModelName = None, /, *, data: str | None = None, output: _Json = None, **options: object) -> None:
    """Ask a model your questions, check its answers, and print the scores of each group.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package.
    data
        File of JSON lines, each with "messages" or "prompt", and "reference", "choices" or "check" if there is a right
        answer; "examples": a few that come with turbolm.
    output
        Write all answers and scores to this JSON file.
    """
    config = ExamConfig(**given(options, ExamConfig))  # type: ignore[arg-type]
    engine = EngineConfig.of(None, **given(options, EngineConfig))
    from turbolm.bench.record import check_writable, machine, write_record  # torch, which --help can do without
    from turbolm.eval.run import run

    check_writable(output)
    record = run(model or DEFAULT_MODEL, data, config, engine)
    if output is not None:
        write_record(output, {**record, "machine": machine()})
