"""The exception tree.

    TurbolmError
    ├── UserError               something given can't be used: says what was given, what is
    │   │                       allowed, and what to do
    │   ├── ConfigError         an engine option or command-line flag
    │   ├── RequestError        one request: its parameters, prompt, messages
    │   │   └── ContextOverflowError    prompt + answer don't fit the context
    │   ├── TemplateError       a chat template, or messages that it refuses
    │   ├── ModelNotFoundError  a model name or path that leads nowhere
    │   ├── UnsupportedModelError       an architecture, dtype or format that turbolm doesn't serve
    │   ├── CheckpointError     broken, truncated or mismatched model files
    │   └── DownloadError       no network, no disk space, wrong checksum
    ├── CapacityError           the machine is too small or too busy: what is needed, what there is
    ├── DeadlineError           a request was not done within the time that it gave itself
    └── EngineError             turbolm's own failure: a bug, or a dead engine

Everything a user can cause is a `UserError` or a `CapacityError`; front ends print its message
without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TurbolmError(Exception):
    """Base of every error that turbolm raises on purpose."""


class UserError(TurbolmError):
    """Something given can't be used."""


class ConfigError(UserError):
    """An engine option or command-line flag that can't be used."""


class RequestError(UserError):
    """A request that can't be served as given; `parameter` names the field at fault."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class ContextOverflowError(RequestError):
    """Prompt plus requested answer exceed the context."""


class TemplateError(UserError):
    """A chat template that can't be compiled or run, or messages that it refuses."""


class ModelNotFoundError(UserError):
    """A model name or path that leads nowhere."""


class UnsupportedModelError(UserError):
    """An architecture, dtype or weight format that turbolm doesn't serve."""


class CheckpointError(UserError):
    """Broken, truncated or mismatched model files."""


class DownloadError(UserError):
    """A download that failed: no network, no disk space, wrong checksum."""


class CapacityError(TurbolmError):
    """The machine is too small, or too busy, for what was asked."""


class DeadlineError(TurbolmError):
    """A request that was not done within its own time limit."""


class EngineError(TurbolmError):
    """turbolm's own failure."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name closest to `given`, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
