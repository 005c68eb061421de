"""`turbolm chat`: a conversation in the terminal, or one answer for a pipe."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.answer import Answer, ChatEngine
from turbolm.cli.conversation import CHAT_DEFAULTS, OMITTED, Conversation
from turbolm.cli.options import given, takes_options
from turbolm.cli.plain_view import PlainView, stream_answer
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.errors import ConfigError, RequestError
from turbolm.form import Grammar
from turbolm.types import SamplingParams

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]


@takes_options("Sampling (what isn't given is as the model recommends)", SamplingParams, OMITTED, show_defaults=False)
@takes_options("Engine", EngineConfig)
def chat(
    model: _ModelName = None,
    /,
    *,
    url: str | None = None,
    api_key: str | None = None,
    prompt: str | None = None,
    system: str | None = None,
    json_schema: str | None = None,
    **options: object,
) -> None:
    """Talk to a model in the terminal. With --prompt, or with text piped in, print one answer and end:
    the answer on standard output, all else on standard error.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name, pypi:package; or the server's.
    url
        Chat with this OpenAI-compatible server instead of loading a model.
    api_key
        Key for the server; @FILE reads it from a file.
    prompt
        Answer this and end.
    system
        System prompt.
    json_schema
        The answer is JSON of this schema: a file, or the schema itself.
    """
    question = _question(prompt)
    sampling, engine_options = given(options, SamplingParams), given(options, EngineConfig)
    grammar = None if json_schema is None else _read_schema(json_schema)
    SamplingParams.of(None, **sampling, grammar=grammar)  # refuses bad values before a model is loaded
    config = EngineConfig.of(None, **engine_options)
    engine: ChatEngine
    if url is not None:
        if engine_options:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in engine_options)
            raise ConfigError(f"{flags} can't be used with --url: the server has loaded its model already")
        from turbolm.remote import RemoteLLM

        engine = remote = RemoteLLM(url, model, read_key(api_key))
        conversation = Conversation(replace(remote.default_params, grammar=grammar), sampling, system)
        remote.explicit = conversation.given
    else:
        # Loading torch takes seconds, which a remote chat need not wait for. What it makes stays: to look for
        # garbage in it is a tenth of that time, and later a stall in the middle of an answer.
        gc.disable()
        from turbolm.llm import AsyncLLM

        gc.freeze()
        gc.enable()
        engine = AsyncLLM(model or DEFAULT_MODEL, config)
        recommended = engine.default_params
        base = CHAT_DEFAULTS if recommended == SamplingParams() else recommended
        conversation = Conversation(replace(base, grammar=grammar), sampling, system)
    asyncio.run(_run(engine, conversation, question))


def _question(prompt: str | None) -> str | None:
    """What to answer before ending; None for a conversation."""
    if prompt is None and sys.stdin.isatty():
        return None
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise RequestError("the prompt is empty: give a text with --prompt or on standard input", "prompt")
    return text.strip("\n")


def _read_schema(value: str) -> Grammar:
    """A schema, or the file that has it."""
    if value.lstrip()[:1] != "{":
        try:
            value = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"json_schema: can't read '{value[:200]}' ({error}); give a file, or a schema") from None
    try:
        return Grammar("json_schema", value)
    except RequestError as error:
        raise ConfigError(f"json_schema: {error}") from None


def read_key(value: str | None) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"can't read the key from {value[1:]}: {error.strerror}") from None


async def _run(engine: ChatEngine, conversation: Conversation, question: str | None) -> None:
    try:
        if question is not None:
            await _answer_once(engine, conversation, question)
            return
        from turbolm.cli.terminal import Terminal  # the line editor and markdown, which one answer doesn't need

        sys.stdout.write(f"{engine.model_name}: Enter sends, /help lists commands, ctrl-D leaves\n")
        plain = not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown")
        await Terminal(engine, conversation, plain=plain).run()
    finally:
        await engine.close()


async def _answer_once(engine: ChatEngine, conversation: Conversation, question: str) -> None:
    answer, view = Answer(), PlainView()
    conversation.ask(question)
    try:
        await stream_answer(engine, conversation, answer, view)
    finally:
        view.finish(answer)
    if answer.error:
        raise answer.error
    limit = engine.config.max_context
    ending = answer.ending(limit)
    sys.stderr.write("".join(f"{line}\n" for line in (ending, answer.statistics(limit)) if line))
