"""`turbolm quantize`: a smaller model, calibrated on data, in a folder."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from turbolm.cli.options import given, takes_options
from turbolm.compress.recipe import Recipe
from turbolm.config import format_size
from turbolm.errors import ConfigError

if TYPE_CHECKING:
    from turbolm.compress.report import Report


@takes_options("Quantization", Recipe, omit=("method",))
def quantize(
    method: str,
    model: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    **options: object,
) -> None:
    """Quantize a model's weights to 4 or 8 bits, into a folder that turbolm and other engines load. A command that
    was cut off goes on where it was when it is given again.

    Parameters
    ----------
    method
        awq or gptq: 4 bits, calibrated on data; rtn: 4 bits, without data, in seconds; int8 (SmoothQuant, calibrated)
        or fp8: 8 bits, for activations of 8 bits; kv: static scales of an int8 KV cache, calibrated.
    model
        A short name, folder, .gguf file, hf:org/name, ms:org/name or pypi:package.
    output
        The new folder. Of kv: a folder, or a .json file; by default beside the model, where loading finds it.
    """
    if method == "kv":
        _quantize_kv(model, output, given(options, Recipe))
        return
    from turbolm.compress.job import quantize as run  # torch, which --help can do without

    if output is None:
        raise ConfigError("say where to write the model: -o FOLDER")
    with _progress_bar(f"{method} {model}") as advance:
        report = run(model, output, method, progress=advance, **given(options, Recipe))
    _print(report, output)


def _quantize_kv(model: str, output: Path | None, options: dict[str, object]) -> None:
    from turbolm.compress.kv import OPTIONS, calibrate_kv  # torch

    wrong = [name for name in options if name not in OPTIONS]
    if wrong:
        raise ConfigError(f"{wrong[0]} says nothing of a KV cache; kv takes {', '.join(OPTIONS)}")
    with _progress_bar(f"kv {model}") as advance:
        path, warnings = calibrate_kv(model, output, progress=advance, **options)  # type: ignore[arg-type]
    for warning in warnings:
        sys.stdout.write(f"warning: {warning}\n")
    sys.stdout.write(f"{path}: static scales; --kv int8 takes them if they lie beside the model, or --kv-scales PATH\n")


@contextlib.contextmanager
def _progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Layers done, on a terminal with a bar and the time left, else a line for each tenth."""
    if not sys.stderr.isatty():
        yield _say
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers,"), TimeElapsedColumn(),
        TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(done: int, total: int) -> None:
    if done * 10 // total != (done - 1) * 10 // total:
        sys.stderr.write(f"{done} of {total} layers\n")
        sys.stderr.flush()


def _print(report: Report, output: Path) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=120)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("LAYER", "ERROR, ROUNDED PLAINLY", f"ERROR, {report.recipe['method'].upper()}", "WORST MATRIX"):
        table.add_column(column, justify="left" if column in ("LAYER", "WORST MATRIX") else "right")
    for name, matrices in report.by_layer().items():
        plain, error = (statistics.mean(getattr(m, field) for m in matrices) for field in ("plain_error", "error"))
        worst = max(matrices, key=lambda matrix: matrix.error)
        short = worst.name.removeprefix(f"{name}.")
        table.add_row(name, f"{plain:.3%}", f"{error:.3%}", f"{short} {worst.error:.3%}")
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    sizes = f"{format_size(report.num_bytes)} of weights, {format_size(report.num_bytes_before)} before"
    console.print(f"{output}: {sizes}, in {report.seconds:.0f} s", markup=False, highlight=False)
