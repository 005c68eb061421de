"""The model that the ladder is about, and the checkpoints that its rungs need."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbolm import env
from turbolm.compress import quantize
from turbolm.engine.build import model_needs
from turbolm.eval.data import Item
from turbolm.hub import fetch
from turbolm.ladder.fingerprint import content_hash, model_fingerprint
from turbolm.ladder.rungs import Rung
from turbolm.loading import NULL_MODEL
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec

Say = Callable[[str], None]
_MIN_ITEMS = 512  # from which a part of them calibrates and isn't asked; fewer say too little about activations
_HELD_OUT_PART = 8
_MAX_HELD_OUT = 128


@dataclass(frozen=True, slots=True)
class Subject:
    name: str  # as given
    fingerprint: str
    is_packed: bool
    """Its weights are quantized already."""


def open_subject(name: str) -> Subject:
    """Fetches the model and reads its headers. The errors of loading a model."""
    if name == NULL_MODEL:
        return Subject(name, NULL_MODEL, is_packed=True)
    local = fetch(name)
    checkpoint = open_checkpoint(local.path)
    needs = model_needs(local.name, checkpoint, decoder_spec(checkpoint.config))
    return Subject(name, model_fingerprint(local.path), bool(needs.packed))


def split(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(asked, held out for calibration): of 512 items and more every eighth is held out, chosen by its content. Of
    fewer none is; then the text that comes with turbolm calibrates."""
    if len(items) < _MIN_ITEMS:
        return list(items), []
    ordered = sorted(items, key=lambda item: item.key)
    held_out = {item.key for item in ordered[::_HELD_OUT_PART][:_MAX_HELD_OUT]}
    return [item for item in items if item.key not in held_out], [item for item in items if item.key in held_out]


def checkpoint_of(subject: Subject, rung: Rung, held_out: Sequence[Item], say: Say) -> str:
    """The model that a rung loads: made by calibration where it asks for that, once for the same content. The errors
    of quantizing."""
    if not rung.method:
        return rung.model or subject.name
    data = calibration_file(held_out)
    key = content_hash([subject.fingerprint, rung.weights, data.stem if data else ""])[:16]
    folder = env.cache_folder() / "ladder" / f"{rung.weights.replace(':', '-')}-{key}"
    if (folder / "config.json").is_file():
        return str(folder)
    say(f"making {rung.title}: calibrating with {f'{len(held_out)} of your items' if held_out else 'a shipped text'}")

    def progress(done: int, total: int) -> None:
        if done and done % max(1, total // 4) == 0:
            say(f"making {rung.title}: {done} of {total} layers")

    quantize(subject.name, folder, rung.method, data=str(data or ""), group_size=rung.group_size, progress=progress)
    return str(folder)


def calibration_file(held_out: Sequence[Item]) -> Path | None:
    """The items as a file that calibrates, named by its content; None: there are none."""
    if not held_out:
        return None
    names = ("messages", "prompt", "text")
    rows = [{name: item.fields[name] for name in names if name in item.fields} for item in held_out]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = env.cache_folder() / "ladder" / f"data-{content_hash([text])[:16]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
