"""Every GPU check and benchmark, one after the other, each within a time of its own.

python benchmarks/gpu_all.py --out DIR [--models DIR] [--gguf FILE] [--seconds 1500] [--only NAME ...]
python benchmarks/gpu_all.py --out DIR --quick --device cpu      # tiny and short: tries the scripts themselves

Writes DIR/NAME.json and DIR/NAME.log per part. A part that fails or runs too long doesn't end the others.
Exits with 1 if one did.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_record import Clock, table, write

FOLDER = Path(__file__).parent
SUMMARY_LINES = 78
START_SECONDS = 45  # of a benchmark's own limit: imports, loading, first compilation


@dataclass(frozen=True)
class Part:
    """One script's run: its arguments, the seconds it may take, and how many last lines the summary shows."""

    name: str
    script: str
    arguments: tuple[str, ...]
    seconds: float
    num_lines: int
    has_json: bool = True


@dataclass(frozen=True)
class Outcome:
    name: str
    state: str  # "ok", or why not
    seconds: float
    lines: tuple[str, ...]


def parts(options: argparse.Namespace) -> list[Part]:
    """In order: what is cheap and tells most goes first."""
    if options.quick:
        return _quick_parts(options)
    found = [Part(name, f"gpu_{name}.py", (), 120, 6) for name in ("linear", "rows", "attention")]
    found.append(Part("parity-tiny", "gpu_parity.py", ("tiny",), 120, 4))
    if options.gguf is not None:
        found.append(Part("parity", "gpu_parity.py", (str(options.gguf),), 240, 3))
    for shape, groups, seconds, streams in (
        ("llama-3-8b", "w1,w3,w2,w5", 300, "64"),
        ("qwen3-0.6b", "w6", 90, "256"),
    ):
        folder = str(options.models / shape)
        found.append(Part(f"make-{shape}", "gpu_models.py", (shape, "--out", folder), 90, 1, has_json=False))
        found.append(_throughput(shape, (folder, "--workloads", groups), seconds, 14))
        found.append(Part(f"profile-{shape}", "gpu_profile.py", (folder, "--streams", streams, "--top", "5"), 90, 14))
    return found


def _throughput(shape: str, arguments: tuple[str, ...], seconds: float, num_lines: int) -> Part:
    arguments = (*arguments, "--seconds", str(seconds))
    return Part(f"throughput-{shape}", "gpu_throughput.py", arguments, seconds + START_SECONDS, num_lines)


def _quick_parts(options: argparse.Namespace) -> list[Part]:
    folder, device = str(options.models / "tiny"), ("--device", options.device)
    parity = ("tiny", "--prompts", "8", "--tokens", "8", "--text", "3000", *device)
    rows = (folder, "--workloads", "w1,w3", "--only", "batch 8", "--only", "token 8", *device)
    steps = (folder, "--streams", "4", "--context", "32", "--steps", "5", *device)
    return [
        Part("make-tiny", "gpu_models.py", ("tiny", "--out", folder), 60, 1, has_json=False),
        Part("parity-tiny", "gpu_parity.py", parity, 120, 4),
        _throughput("tiny", rows, 20, 4),
        Part("profile-tiny", "gpu_profile.py", steps, 60, 8),
    ]


def run(part: Part, out: Path, clock: Clock) -> Outcome:
    script = FOLDER / part.script
    if not script.is_file():
        return Outcome(part.name, f"there is no {part.script}", 0.0, ())
    seconds = min(part.seconds, clock.left)
    if seconds < min(part.seconds, 10):
        return Outcome(part.name, "skipped: no time left", 0.0, ())
    command = [sys.executable, str(script), *part.arguments]
    if part.has_json:
        command += ["--json", str(out / f"{part.name}.json")]
    paths = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    log, start = out / f"{part.name}.log", time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, check=False, timeout=seconds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            state = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            state = f"stopped after {seconds:.0f} s"
    lines = log.read_text(errors="replace").splitlines()
    return Outcome(part.name, state, time.perf_counter() - start, tuple(lines[-part.num_lines :]))


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line for each part, then the last lines of each, at most SUMMARY_LINES together."""
    lines = table(("part", "seconds", "state"), [(o.name, f"{o.seconds:.1f}", o.state) for o in outcomes]).split("\n")
    for outcome in outcomes:
        if outcome.lines:
            lines += [f"--- {outcome.name}", *(line[:150] for line in outcome.lines)]
    if len(lines) > SUMMARY_LINES:
        lines = [*lines[: SUMMARY_LINES - 1], "(more in the .log files)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, default=Path("/dev/shm/turbolm-models"), metavar="DIR")
    parser.add_argument("--gguf", type=Path, help="a real small model, for parity")
    parser.add_argument("--seconds", type=float, default=1500, help="for everything together")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts whose name begins so")
    parser.add_argument("--quick", action="store_true", help="tiny and short")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="with --quick")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clock, outcomes = Clock(options.seconds), []
    for part in parts(options):
        if options.only and not part.name.startswith(tuple(options.only)):
            continue
        outcomes.append(run(part, options.out, clock))
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.1f} s", file=sys.stderr, flush=True)
        states = {outcome.name: {"state": outcome.state, "seconds": outcome.seconds} for outcome in outcomes}
        write(options.out / "summary.json", {"parts": states})
    print(summary(outcomes))
    sys.exit(0 if all(outcome.state == "ok" for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
