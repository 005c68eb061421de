"""From a model's name to everything that serving it takes."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from turbolm.config import EngineConfig, ResolvedConfig, resolve, with_room
from turbolm.engine.adapters import Adapters
from turbolm.engine.build import Draft, build, build_null, model_needs, null_needs
from turbolm.engine.engine import StepRunner
from turbolm.engine.scheduler import Scheduler
from turbolm.errors import CheckpointError, ConfigError
from turbolm.fallbacks import collected
from turbolm.grammar import GrammarCompiler
from turbolm.hub import fetch, generation_config_of
from turbolm.hub.adapters import fetch_adapter
from turbolm.lora import adapter_sources
from turbolm.memory import ModelNeeds
from turbolm.models import loader
from turbolm.models.checkpoint import Checkpoint, open_checkpoint
from turbolm.models.peft import read_adapter
from turbolm.models.pooling import PoolingChoice, choose_pooling
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
    pooling: PoolingChoice

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
    adapters: Adapters | None = None  # where there is room for some

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
        if config.draft_model:
            raise ConfigError(f"'{NULL_MODEL}' needs no drafts: leave draft_model out")
        if config.adapters or config.max_adapters:
            raise ConfigError(f"'{NULL_MODEL}' has no weights for an adapter to add to: leave adapters out")
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
    adapters = {
        name: read_adapter(fetch_adapter(path), spec) for name, path in adapter_sources(config.adapters).items()
    }
    config = with_room(config, [adapter.rank for adapter in adapters.values()])
    draft, draft_needs = _draft(config.draft_model, text, progress) if config.draft_model else (None, None)
    needs = model_needs(local.name, checkpoint, spec, config.tensor_parallel)
    resolved = resolve(config, needs, hardware, draft_needs)
    with _loading_bar(local.name, progress) as advance, collected() as fallbacks:
        parts = build(checkpoint, spec, resolved, text.vocab_size, advance, draft)
    if parts.adapters is not None:
        for own_name, adapter in adapters.items():
            parts.adapters.add(own_name, adapter)
    resolved = replace(resolved, reasons=(*resolved.reasons, _stored(checkpoint), *fallbacks))
    path = local.path
    del checkpoint, local, adapters  # a GGUF file's vocabulary and merges are in there
    _return_memory()
    return LoadedModel(path, text, resolved, parts.scheduler, parts.runner, _grammars(text), parts.adapters)


def _stored(checkpoint: Checkpoint) -> str:
    """In which formats the matrices lie in the files, the commonest first."""
    matrices = (info for info in checkpoint.source.tensors.values() if len(info.shape) > 1)
    kinds = collections.Counter(info.dtype.lower() for info in matrices)
    names = ", ".join(name for name, _ in kinds.most_common()) or "none"
    packing = "" if checkpoint.packing is None else f", packed as {', '.join(checkpoint.packing.formats)}"
    return f"weights in the files: {names}{packing}"


def _return_memory() -> None:
    """Gives what loading took and freed back to the system, where the C library has a call for that (glibc)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _draft(name: str, text: ModelText, progress: bool) -> tuple[Draft, ModelNeeds]:
    """A draft model's files, and what it takes. Raises ConfigError where its tokens are not the model's."""
    local = fetch(name, progress=progress)
    checkpoint = open_checkpoint(local.path)
    spec = decoder_spec(checkpoint.config)
    own, tokenizer = _tokenizer(checkpoint), text.tokenizer
    problem = ""
    if own.vocab_size != tokenizer.vocab_size:
        problem = f"has {own.vocab_size} tokens, '{text.name}' {tokenizer.vocab_size}"
    for token in range(tokenizer.vocab_size if not problem else 0):
        if own.token_text(token) != tokenizer.token_text(token):
            texts = own.token_text(token), tokenizer.token_text(token)
            problem = f"has {texts[0]!r} as token {token}, '{text.name}' {texts[1]!r}"
            break
    if problem or spec.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"draft_model '{name}' {problem or 'has fewer logits than tokens'}: it must have the same vocabulary; take "
            "a smaller model of the same family"
        )
    return Draft(checkpoint, spec), model_needs(local.name, checkpoint, spec)


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
        default_params=_default_params({**generation_config_of(name), **checkpoint.generation_config}),
        pooling=choose_pooling(checkpoint),
    )


def _null_text() -> ModelText:
    tokenizer = byte_tokenizer()
    return ModelText(NULL_MODEL, tokenizer, ChatTemplate.of(tokenizer), (), SamplingParams(), PoolingChoice())


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
