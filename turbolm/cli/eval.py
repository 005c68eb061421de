"""`turbolm eval`: a model's scores on the user's questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.errors import ConfigError
from turbolm.eval.config import ExamConfig

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]
_Json = Annotated[Path | None, Parameter(name="--json")]


@takes_options("Questions", ExamConfig)
@takes_options("Engine", EngineConfig)
def evaluate(
    model: _ModelName = None,
    /,
    *,
    data: str | None = None,
    output: _Json = None,
    lm_eval: tuple[str, ...] = (),
    lm_eval_folder: Path | None = None,
    lm_eval_limit: int = 0,
    lm_eval_shots: int | None = None,
    lm_eval_chat: bool = False,
    **options: object,
) -> None:
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
    lm_eval
        Instead of --data: tasks of lm-evaluation-harness, such as arc_easy; may be given several times.
    lm_eval_folder
        Folder with further tasks, as the harness's YAML files.
    lm_eval_limit
        Most items of each of its tasks; 0: all.
    lm_eval_shots
        Solved examples before each of its questions; by default as the task says.
    lm_eval_chat
        Put its questions through the chat template.
    """
    config = ExamConfig(**given(options, ExamConfig))  # type: ignore[arg-type]
    engine = EngineConfig.of(None, **given(options, EngineConfig))
    from turbolm.bench.record import check_writable, machine, write_record  # torch, which --help can do without
    from turbolm.eval.run import run

    check_writable(output)
    if lm_eval:
        if data is not None or config.probes:
            raise ConfigError("--lm-eval brings its own questions: leave --data and --probes out")
        try:
            from turbolm.eval.harness import run as run_harness
        except ImportError as error:
            raise ConfigError(f"--lm-eval needs lm-evaluation-harness ({error}): pip install 'turbolm[eval]'") from None
        record = run_harness(
            model or DEFAULT_MODEL, lm_eval, engine,
            folder=lm_eval_folder, limit=lm_eval_limit, shots=lm_eval_shots, is_chat=lm_eval_chat, seed=config.seed,
        )  # fmt: skip
    else:
        record = run(model or DEFAULT_MODEL, data, config, engine)
    if output is not None:
        write_record(output, {**record, "machine": machine()})
