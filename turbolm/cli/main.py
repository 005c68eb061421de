"""`turbolm`: the command line. Commands live in files of their own and are loaded when they are used."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from cyclopts.exceptions import UnknownCommandError, UnusedCliTokensError

from turbolm import __version__, env
from turbolm.errors import TurbolmError, UserError, nearest

INTERRUPTED = 130  # what shells report for ctrl-C
BROKEN_PIPE = 141  # and for a reader that went away
_LEVELS = ("debug", "info", "warning", "error")

app = App(
    name="turbolm",
    help="Compress, deploy and serve large language models.",
    version=f"turbolm {__version__}",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
app.command("turbolm.cli.chat:chat", name="chat", help="Talk to a model in the terminal, or answer one prompt.")
app.command("turbolm.cli.ui:ui", name="ui", help="Chat with a model, or a server's, in the browser.")
app.command("turbolm.cli.serve:serve", name="serve", help="Serve a model over HTTP, with OpenAI's API.")
app.command("turbolm.cli.quantize:quantize", name="quantize", help="Make a model smaller: 4- or 8-bit weights.")
app.command(
    "turbolm.cli.convert:convert", name="convert", help="Pack and divide a model's weights once, for fast starts."
)
app.command(
    "turbolm.cli.ladder:ladder", name="ladder", help="Which quantization of a model is good enough, on your questions."
)
app.command("turbolm.cli.plan:plan", name="plan", help="What a model takes on a machine, and how fast it would be.")
app.command("turbolm.cli.eval:evaluate", name="eval", help="Score a model on your questions.")
app.command("turbolm.cli.models:app", name="models", help="List, fetch and delete models.")
app.command(
    "turbolm.bench.commands:app",
    name="bench",
    help="Time this machine (a model's tokens per second, the kernels), or a server under load.",
)
app.command(
    "turbolm.bench.chaos:chaos",
    name="chaos",
    help="Put a server under load, kill its engine, and check that nothing is lost.",
)
app.command(
    "turbolm.cli.doctor:doctor", name="doctor", help="Show what this machine has, and what turbolm makes of it."
)


@app.command
def version() -> None:
    """Print the version."""
    sys.stdout.write(f"turbolm {__version__}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 (failure), 2 (can't be used as given), 130 (ctrl-C)."""
    try:
        _start_logging()
        app(list(sys.argv[1:] if arguments is None else arguments), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as error:
        return _fail(_usage_error(error), 2)
    except TurbolmError as error:
        return _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _usage_error(error: CycloptsError) -> str:
    """One line: what can't be used, the nearest name, where the help is."""
    chain = error.command_chain or ()
    see = f"See {' '.join(('turbolm', *chain))} --help"
    if isinstance(error, (UnknownCommandError, UnusedCliTokensError)):
        # Named here, since the library would load every command to list them.
        token = (error.unused_tokens or ("",))[0]
        commands = [name for name in (error.app or app) if not name.startswith("-")]
        kind = "option" if token.startswith("-") else "command" if commands else "argument"
        return f"unknown {kind} '{token}'.{nearest(token, commands)} {see}"
    text = " ".join(str(error).split())
    return f"{text[:1].lower()}{text[1:].rstrip('.')}{'' if text.endswith('?') else '.'} {see}"


def _fail(message: str, status: int) -> int:
    sys.stderr.write(f"turbolm: {message}\n")
    return status


def _start_logging() -> None:
    level = (env.get("TURBOLM_LOG") or "warning").lower()
    known = level in _LEVELS
    logging.basicConfig(
        stream=sys.stderr, level=level.upper() if known else "WARNING", format="%(levelname)s %(name)s: %(message)s"
    )
    if not known:
        logging.getLogger("turbolm").warning("TURBOLM_LOG is %r; allowed: %s", level, ", ".join(_LEVELS))
