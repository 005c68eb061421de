"""The cache folder of downloaded models: locks, half-finished downloads, records, listing, removal.

models/<key>/          a finished model; `record.json` inside names it
models/<key>.partial/  a download at work; whoever holds the lock may delete it
models/.locks/<key>    locked with flock while `<key>` is fetched or removed
models/<key>.json      record of a model whose files live in a hub library's own cache
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from turbolm.config import format_size
from turbolm.env import cache_folder
from turbolm.errors import DownloadError

RECORD = "record.json"
_MARGIN = 16 << 20  # bytes that a download leaves free


@dataclass(frozen=True, slots=True)
class Record:
    """What a finished model is: the name that fetched it, and where it is."""

    name: str
    path: str  # of the folder or of the first .gguf file
    revision: str = ""  # hub's commit, where there is one
    folder: str = ""  # snapshot folder, of a hub library's cache


@dataclass(frozen=True, slots=True)
class CachedModel:
    name: str
    path: Path
    num_bytes: int


def models_folder() -> Path:
    return cache_folder() / "models"


def key_of(text: str) -> str:
    """A file name for any model name; long ones are cut and hashed."""
    key = re.sub(r"[^A-Za-z0-9.=+@_-]+", "--", text)
    return key if len(key) <= 120 else f"{key[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def lock(key: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds `key` against other processes and threads; calls `waiting` once if somebody else has it."""
    with _lock_file(key) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _lock_file(key: str) -> Iterator[int]:
    folder = models_folder() / ".locks"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / key, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def partial(key: str) -> Iterator[Path]:
    """An empty folder to download into; gone afterwards, unless it was renamed away. Needs the lock."""
    folder = models_folder() / f"{key}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Deletes what killed downloads left behind."""
    for folder in models_folder().glob("*.partial"):
        with _lock_file(folder.name.removesuffix(".partial")) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # at work
            shutil.rmtree(folder, ignore_errors=True)


def check_space(num_bytes: int, folder: Path, what: str) -> None:
    """DownloadError unless `folder`'s disk has room for `num_bytes`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes + _MARGIN > free:
        raise DownloadError(
            f"{what} needs {format_size(num_bytes)} of disk space, {existing} has {format_size(free)} free. "
            "Make room, remove models (turbolm models remove NAME), or set TURBOLM_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk of {folder} is full. Make room, remove models (turbolm models remove NAME), "
                "or set TURBOLM_CACHE to a folder on another disk."
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise DownloadError(
                f"can't write to {folder} ({error.strerror}). Set TURBOLM_CACHE to a folder that you may write to."
            ) from None
        raise


def note(text: str) -> None:
    """A line about a download, for the person who waits."""
    sys.stderr.write(text + "\n")


def write_record(path: Path, record: Record) -> None:
    """Writes a record in one step, so that no reader sees half of it."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
        draft.replace(path)


def read_record(path: Path) -> Record | None:
    """The record at `path`; None where there is none or it is broken."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def records() -> dict[Path, Record]:
    """Record file → record, of every finished model."""
    root = models_folder()
    paths = [path for path in (*root.glob(f"*/{RECORD}"), *root.glob("*.json")) if ".partial" not in path.parent.name]
    found = {path: read_record(path) for path in sorted(paths)}
    return {path: record for path, record in found.items() if record and Path(record.path).exists()}


def cached_models() -> list[CachedModel]:
    """Every model that turbolm has downloaded, by name."""
    models = [CachedModel(record.name, Path(record.path), size(path, record)) for path, record in records().items()]
    return sorted(models, key=lambda model: model.name)


def size(path: Path, record: Record) -> int:
    """Bytes on disk of the model whose record is at `path`."""
    folder, first = Path(record.folder or path.parent), Path(record.path)
    files = [file for file in folder.rglob("*") if file.is_file()]
    if record.folder and first.is_file():  # one .gguf file, perhaps in parts, of a repository with many
        stem = re.sub(r"-00001-of-\d{5}\.gguf$", "", first.name)
        files = [file for file in files if file.parent == first.parent and file.name.startswith(stem)]
    return sum(file.stat().st_size for file in files)
