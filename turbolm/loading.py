"""From a model's name to everything that serving it takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from turbolm.config import EngineConfig, ResolvedConfig, resolve
from turbolm.engine.build import build, build_null, model_needs, null_needs
from turbolm.engine.engine import StepRunner
from turbolm.engine.scheduler import Scheduler
from turbolm.errors import CheckpointError, ConfigError
from turbolm.grammar import GrammarCompiler
from turbolm.hub import fetch
from turbolm.models import loader
from turbolm.models.checkpoint import Checkpoint, open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.ops.hardware import probe
from turbolm.text import ChatTemplate, Tokenizer, byte_tokenizer, load_tokenizer, tokenizer_from_gguf
from turbolm.types import SamplingParams

NULL_MODEL = "null"  # the deterministic model without weights

# Fields of generation_config.json that are also SamplingParams.
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ModelText:
    """What lies between a model's tokens and the text that people see."""

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


@dataclass(frozen=True, slots=True)
class LoadedModel:
    path: Path | None  # of the files; None for the null model
    text: ModelText
    config: ResolvedConfig
    scheduler: Scheduler
    runner: StepRunner
    grammars: GrammarCompiler

    @property
    def name(self) -> str:
        return self.text.name


def load_text(name: str, path: Path | None) -> ModelText:
    """The part of a model that needs no weights; `path` as in LoadedModel. Raises UserError."""
    return _null_text() if path is None else _text(name, open_checkpoint(path))


def load_model(name: str, config: EngineConfig, progress: bool) -> LoadedModel:
    """Fetch, check and load a model. Raises UserError or CapacityError, with what to do."""
    hardware = probe()
    if name == NULL_MODEL:
        if config.tensor_parallel > 1:
            raise ConfigError(
                f"tensor_parallel is {config.tensor_parallel}, and '{NULL_MODEL}' has no weights to divide; use 1"
            )
        return _null(resolve(config, null_needs(), hardware))
    local = fetch(name, progress=progress)
    checkpoint = open_checkpoint(local.path)
    spec = decoder_spec(checkpoint.config)
    text = _text(local.name, checkpoint)
    if text.vocab_size > spec.vocab_size:
        raise CheckpointError(
            f"'{name}': the tokenizer has {text.vocab_size} tokens, the model {spec.vocab_size}; the files "
            "don't belong together"
        )
    resolved = resolve(config, model_needs(local.name, checkpoint, spec, config.tensor_parallel), hardware)
    with _loading_bar(local.name, progress) as advance:
        parts = build(checkpoint, spec, resolved, text.vocab_size, advance)
    return LoadedModel(local.path, text, resolved, parts.scheduler, parts.runner, _grammars(text))


def _null(config: ResolvedConfig) -> LoadedModel:
    parts, text = build_null(config), _null_text()
    return LoadedModel(None, text, config, parts.scheduler, parts.runner, _grammars(text))


def _grammars(text: ModelText) -> GrammarCompiler:
    return GrammarCompiler(text.tokenizer, text.eos_token_ids)


def _text(name: str, checkpoint: Checkpoint) -> ModelText:
    tokenizer = _tokenizer(checkpoint)
    eos = (_token_ids(values.get("eos_token_id")) for values in (checkpoint.generation_config, checkpoint.config))
    return ModelText(
        name=name,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.of(tokenizer) if tokenizer.chat_template else None,
        eos_token_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *(token for ids in eos for token in ids)])),
        default_params=_default_params(checkpoint.generation_config),
    )


def _null_text() -> ModelText:
    tokenizer = byte_tokenizer()
    return ModelText(NULL_MODEL, tokenizer, ChatTemplate.of(tokenizer), (), SamplingParams())


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.gguf is not None:
        return tokenizer_from_gguf(checkpoint.gguf.metadata)
    return load_tokenizer(checkpoint.path)


def _token_ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(token for token in values if type(token) is int)


def _default_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What the checkpoint recommends, as far as it says so."""
    given = {name: generation_config[name] for name in _RECOMMENDED if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        given["temperature"] = 0.0
    return SamplingParams.of(None, **given)


@contextlib.contextmanager
def _loading_bar(name: str, show: bool) -> Iterator[loader.Progress | None]:
    if not show or not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name)
        yield lambda done, total: bar.update(task, completed=done, total=total)
