"""The command: machines, plans, and what is printed of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from turbolm.bench.limits import measure_limits
from turbolm.config import format_size
from turbolm.ops.hardware import probe
from turbolm.planner import report
from turbolm.planner.gpus import Machine, found_cpu, found_gpus, parse_machine
from turbolm.planner.model import PlannedModel, open_model
from turbolm.planner.plan import DEFAULT_CONTEXT, Demand, Fit, Plan, plan
from turbolm.planner.speed import CPU, Rates

_COLUMNS = ("GPUS", "WEIGHTS", "KV", "WEIGHTS TAKE", "KV PER TOKEN", "WORKING", "LONGEST", "AT ONCE", "TOK/S", "ALL")


def run(name: str, gpus: Sequence[str], *, use_cpu: bool, context: int | None, concurrency: int, as_json: bool) -> None:
    """Prints the plans. Raises UserError."""
    machines = [parse_machine(text) for text in gpus]
    model = open_model(name)
    demand = Demand(min(DEFAULT_CONTEXT, model.spec.max_context) if context is None else context, concurrency)
    if use_cpu or not machines:
        machines.append(_here(use_cpu))
    plans = [plan(model, machine, demand) for machine in machines]
    if as_json:
        sys.stdout.write(json.dumps(report.as_json(model, plans), indent=2) + "\n")
        return
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=140, highlight=False)
    parameters = model.num_parameters / 1e9
    console.print(
        f"{model.name}: {parameters:.3g} billion parameters, contexts up to {model.spec.max_context}", markup=False
    )
    for found in plans:
        _print(console, model, found)


def _here(use_cpu: bool) -> Machine:
    """The GPUs of this machine, or its CPU with limits that are measured now, in two seconds."""
    hardware = probe()
    if hardware.gpus and not use_cpu:
        return found_gpus(hardware.gpus)
    limits = measure_limits(hardware.physical_cores)
    return found_cpu(hardware, Rates(max(limits.read.values()), limits.int8, CPU))


def _print(console: Console, model: PlannedModel, found: Plan) -> None:
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("WEIGHTS", "KV") else "right", overflow="fold")
    best = found.best
    for fit in found.fits:
        table.add_row(*_cells(fit, found), style="bold" if fit is best else "" if fit.is_enough else "dim")
    console.print(table)
    for line in (report.answer(model, found), report.command(model, found)):
        if line is not None:
            console.print(line, markup=False, soft_wrap=True)


def _cells(fit: Fit, found: Plan) -> tuple[str, ...]:
    speeds = (fit.tokens_per_second, fit.tokens_per_second_full)
    return (
        str(fit.tensor_parallel) if found.machine.num_gpus else "CPU",
        "as it is" if fit.rung.weights == "auto" else fit.rung.weights,
        "16 bits" if fit.rung.kv == "auto" else fit.rung.kv,
        format_size(fit.weight_bytes),
        format_size(fit.kv_bytes_per_token),
        format_size(fit.working.total),
        f"{fit.max_context:,}" if fit.max_context else "-",
        f"{fit.concurrency:,}" if fit.concurrency else "-",
        *(f"{report.rounded(speed):,}" if speed else "" for speed in speeds),
    )
