"""What some requests need before they can wait for their turn: a grammar compiled, in a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from turbolm.errors import EngineError, RequestError, TurbolmError
from turbolm.grammar import GrammarCompiler
from turbolm.types import Request

logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A request that may run, or the reason why not."""

    request: Request
    deltas: bool  # as for `Engine.submit`
    error: TurbolmError | None = None


class Preparation:
    """Compiles one grammar after the other: a slow one holds up those that have one, and nobody else."""

    def __init__(self, grammars: GrammarCompiler | None, done: Callable[[Prepared], None]) -> None:
        """`done` is called in the thread."""
        self._grammars = grammars
        self._done = done
        self._executor = ThreadPoolExecutor(1, "turbolm-grammar")  # starts no thread before it is used

    def begin(self, request: Request, deltas: bool) -> None:
        self._executor.submit(self._run, request, deltas)

    def close(self) -> None:
        """What has not begun never will."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, request: Request, deltas: bool) -> None:
        try:
            prepared = Prepared(self._prepare(request), deltas)
        except TurbolmError as error:
            prepared = Prepared(request, deltas, error)
        except Exception as error:
            logger.exception("the grammar of request %s could not be compiled", request.id)
            prepared = Prepared(request, deltas, EngineError(f"the grammar could not be compiled: {error!r}"))
        self._done(prepared)

    def _prepare(self, request: Request) -> Request:
        grammar = request.params.grammar
        assert grammar is not None
        if self._grammars is None:
            raise RequestError("this engine has no tokenizer, which grammars need", "grammar")
        return replace(request, compiled_grammar=self._grammars.compile(grammar))
