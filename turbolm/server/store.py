"""Responses that are kept, in an SQLite file, so that later requests go on after them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from turbolm.errors import ConfigError

logger = logging.getLogger(__name__)

Found = TypeVar("Found")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS responses (id TEXT PRIMARY KEY, created REAL NOT NULL DEFAULT (unixepoch()), "
    "response TEXT NOT NULL, input TEXT NOT NULL, messages TEXT NOT NULL)"
)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    response: dict[str, Any]
    input: list[dict[str, Any]]  # items
    messages: list[dict[str, Any]]  # the conversation up to its end, as the chat API has it


class ResponseStore:
    """One thread reads and writes, in order: what was kept is found at once."""

    def __init__(self, path: str | Path) -> None:
        """Makes the file where there is none, for this user alone. Raises ConfigError."""
        self._path = Path(path).expanduser()
        self._thread = ThreadPoolExecutor(1, "turbolm-store")
        try:
            self._database = self._thread.submit(self._open).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise ConfigError(f"store: can't use '{path}' ({error}): give a file of this server's own") from None

    def keep(self, identity: str, stored: StoredResponse) -> None:
        """Writes, some time soon; what fails goes to the log."""
        row = (identity, *map(json.dumps, (stored.response, stored.input, stored.messages)))
        self._thread.submit(self._write, row).add_done_callback(_report)

    async def find(self, identity: str) -> StoredResponse | None:
        row = await self._run(lambda: self._read(identity))
        return None if row is None else StoredResponse(*map(json.loads, row))

    async def delete(self, identity: str) -> bool:
        """Whether there was one."""
        return await self._run(lambda: self._delete(identity))

    def close(self) -> None:
        """After what is being written."""
        self._thread.submit(self._database.close)
        self._thread.shutdown()

    async def _run(self, call: Callable[[], Found]) -> Found:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(self._path)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        with database:
            database.execute(_TABLE)
        return database

    def _write(self, row: tuple[str, ...]) -> None:
        with self._database:
            self._database.execute("INSERT INTO responses (id, response, input, messages) VALUES (?, ?, ?, ?)", row)

    def _read(self, identity: str) -> tuple[str, str, str] | None:
        query = "SELECT response, input, messages FROM responses WHERE id = ?"
        row: tuple[str, str, str] | None = self._database.execute(query, (identity,)).fetchone()
        return row

    def _delete(self, identity: str) -> bool:
        with self._database:
            return self._database.execute("DELETE FROM responses WHERE id = ?", (identity,)).rowcount > 0


def _report(written: Future[None]) -> None:
    if error := written.exception():
        logger.error("a response can't be stored: %s", error)
