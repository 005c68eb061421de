"""`turbolm ladder`, once its options are read."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

from turbolm.config import EngineConfig, parse_size
from turbolm.errors import ConfigError
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import Item, Problem, data_path, read_items, report_problems
from turbolm.eval.probes import PROBES, make_probes
from turbolm.ladder.climb import Climb, Climber
from turbolm.ladder.config import LadderConfig
from turbolm.ladder.page import write_page
from turbolm.ladder.report import Run, make_report, write_json
from turbolm.ladder.rungs import read_rungs
from turbolm.ladder.store import Store
from turbolm.ladder.subject import open_subject, split
from turbolm.ladder.table import TerminalWatch, print_report
from turbolm.ops.hardware import probe


def run(model: str, data: str | None, config: LadderConfig, exam: ExamConfig, engine: EngineConfig) -> None:
    """Climbs, writes the reports, prints the table. UserError or CapacityError for what can't be used."""
    items, held_out, problems = _items(data, exam)
    subject = open_subject(model)
    rungs = read_rungs(config.rungs, is_packed=subject.is_packed)
    folder = Path(config.out or f"ladder-{Path(subject.name).name.replace(':', '-')}").expanduser()
    store = _open_store(folder)
    try:
        with TerminalWatch(len(rungs)) as watch:
            if subject.is_packed and not config.rungs:
                watch.say(f"{subject.name} is quantized already: only its KV cache can be; give the unquantized model")
            climb = Climber(subject, items, held_out, config, exam, engine, store, watch).run(rungs)
            climb = replace(climb, problems=(*problems, *climb.problems))
    finally:
        store.close()
    asked = Run(
        subject=subject,
        data=str(data or "generated questions"),
        data_hash=hashlib.sha256(data_path(data).read_bytes()).hexdigest() if data else "",
        num_held_out=len(held_out),
        config=config,
        exam=exam,
        engine=engine,
        memory=parse_size(config.memory, "memory") if config.memory else _machine_memory(engine),
        command=["turbolm", *sys.argv[1:]],
    )
    _finish(asked, climb, folder)


def _items(data: str | None, exam: ExamConfig) -> tuple[list[Item], list[Item], list[Problem]]:
    """The items that are asked, those that calibrate, and the lines that are none."""
    asked: list[Item] = []
    held_out: list[Item] = []
    problems: list[Problem] = []
    if data is not None:
        items, problems = read_items(data, allow_code=exam.allow_code)
        report_problems(problems, keep_going=exam.keep_going)
        asked, held_out = split(items)
    probes = make_probes(tuple(PROBES), exam.probes, exam.seed, exam.probe_words)
    if not asked and not probes:
        raise ConfigError("there is nothing to ask: give --data, or --probes above 0")
    return [*asked, *probes], held_out, problems


def _open_store(folder: Path) -> Store:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't make the folder {folder}: {error.strerror}; give another with --out") from None
    return Store(folder / "answers.sqlite")


def _machine_memory(engine: EngineConfig) -> int:
    """Bytes of the device that the model runs on."""
    hardware = probe()
    if hardware.gpus and engine.device != "cpu":
        return hardware.gpus[0].total_memory
    return hardware.total_memory


def _finish(run: Run, climb: Climb, folder: Path) -> None:
    report = make_report(run, climb)
    write_json(report, folder / "report.json")
    write_page(report, folder / "report.html")
    print_report(report)
    sys.stdout.write(f"\n{folder / 'report.html'}\n")
