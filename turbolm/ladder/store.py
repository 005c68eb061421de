"""Where a run keeps what it has found: SQLite, one transaction per answer. After a kill at any point the run goes on
with the next item; nothing is asked twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.errors import ConfigError
from turbolm.eval.answer import Answer, Distributions

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    rung TEXT NOT NULL, item TEXT NOT NULL, answer TEXT NOT NULL, distributions BLOB, PRIMARY KEY (rung, item)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS facts (
    rung TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (rung, name)
) WITHOUT ROWID;
"""


class Store:
    """Answers by rung and item; both are hashes of all that the answer depends on, so a changed model, option or item
    finds nothing, and an unchanged one finds its answer."""

    def __init__(self, path: Path) -> None:
        """ConfigError where the file can't be used, or another run is at work on it."""
        try:
            self._database = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            # Exclusive: two runs would ask every item twice. FULL: an answer outlives a power cut, too.
            self._database.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;"
            )
        except sqlite3.OperationalError as error:
            busy = "another run is at work on it" if "locked" in str(error) else str(error)
            raise ConfigError(f"can't use {path}: {busy}; wait for it, or give another folder with --out") from None
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path} is no store of answers ({error}); delete it, or give another --out") from None

    def close(self) -> None:
        self._database.close()

    def add(self, rung: str, item: str, answer: Answer, distributions: Distributions | None) -> None:
        blob = None if distributions is None else distributions.to_bytes()
        self._database.execute(
            "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (rung, item, answer.to_json(), blob)
        )

    def answers(self, rung: str) -> dict[str, Answer]:
        """By item."""
        rows = self._database.execute("SELECT item, answer FROM answers WHERE rung = ?", (rung,))
        return {item: Answer.from_json(text) for item, text in rows}

    def distributions(self, rung: str, item: str) -> Distributions | None:
        row = self._database.execute(
            "SELECT distributions FROM answers WHERE rung = ? AND item = ?", (rung, item)
        ).fetchone()
        return None if row is None or row[0] is None else Distributions.from_bytes(row[0])

    def set_fact(self, rung: str, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(value)
        self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (rung, name, text))

    def fact(self, rung: str, name: str) -> dict[str, Any] | None:
        row = self._database.execute("SELECT value FROM facts WHERE rung = ? AND name = ?", (rung, name)).fetchone()
        return None if row is None else dict(json.loads(row[0]))
