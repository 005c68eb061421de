"""`turbolm ui`: the chat page in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.answer import ChatEngine
from turbolm.cli.chat import read_key
from turbolm.cli.conversation import CHAT_DEFAULTS, OMITTED
from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.errors import ConfigError
from turbolm.remote import RemoteLLM
from turbolm.types import SamplingParams

_Model = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]
_Auth = Annotated[tuple[str, ...], Parameter(negative_iterable=(), show_default=False)]


@takes_options(
    "Sampling (at first; what isn't given is as the model recommends)", SamplingParams, OMITTED, show_defaults=False
)
@takes_options("Engine", EngineConfig)
def ui(
    model: _Model = None,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 6006,
    auth: _Auth = (),
    served_model: str | None = None,
    api_key: str | None = None,
    system: str | None = None,
    **options: object,
) -> None:
    """Chat with a model in the browser. Needs the extra: pip install 'turbolm[ui]'.

    Parameters
    ----------
    model
        What to load, as for `turbolm chat`, or the address of an OpenAI-compatible server (http://...).
    host
        Address to listen on; 0.0.0.0: all of this machine's.
    port
        Port to listen on; 0: any free one.
    auth
        user:password of somebody who may use the page (can be given several times); @FILE: one per line.
    served_model
        Which of the server's models; the first if not given.
    api_key
        Key for the server; @FILE reads it from a file.
    system
        System prompt at first.
    """
    users = read_users(auth)
    sampling, engine_options = given(options, SamplingParams), given(options, EngineConfig)
    SamplingParams.of(None, **sampling)  # refuses bad values before a model is loaded
    config = EngineConfig.of(None, **engine_options)
    try:
        from turbolm.ui.app import create_app, listen, serve
        from turbolm.ui.chat import Chat
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("turbolm"):
            raise
        raise ConfigError(f"the page needs '{error.name}': pip install 'turbolm[ui]'") from None
    listener = listen(host, port)  # before a model is loaded, which takes a while
    engine: ChatEngine
    if model is not None and model.startswith(("http://", "https://")):
        engine, base = _remote(model, served_model, api_key, engine_options)
    else:
        engine, base = _local(model, served_model, api_key, config)
    app = create_app(Chat(engine, base, sampling), users=users, system=system or "")
    serve(app, listener, model=engine.model_name, is_guarded=bool(users))


def _remote(
    url: str, model: str | None, api_key: str | None, engine_options: dict[str, object]
) -> tuple[ChatEngine, SamplingParams]:
    if engine_options:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in engine_options)
        raise ConfigError(f"{flags} can't be used with a server: it has loaded its model already")
    remote = RemoteLLM(url, model, read_key(api_key))
    return remote, remote.default_params


def _local(
    model: str | None, served_model: str | None, api_key: str | None, config: EngineConfig
) -> tuple[ChatEngine, SamplingParams]:
    for flag, value in (("--served-model", served_model), ("--api-key", api_key)):
        if value is not None:
            raise ConfigError(f"{flag} is for servers; name one: turbolm ui http://127.0.0.1:23333 {flag} ...")
    from turbolm.llm import AsyncLLM

    engine = AsyncLLM(model or DEFAULT_MODEL, config)
    recommended = engine.default_params
    return engine, CHAT_DEFAULTS if recommended == SamplingParams() else recommended


def read_users(entries: Sequence[str]) -> dict[str, str]:
    """Name → password. ConfigError for what isn't user:password, or a file that can't be read."""
    users: dict[str, str] = {}
    for entry in entries:
        for line in _lines(entry[1:]) if entry.startswith("@") else [entry]:
            name, sign, password = line.partition(":")
            if not (name and sign and password):
                raise ConfigError("--auth takes user:password, or @FILE with one user:password per line")
            users[name] = password
    return users


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the users from {path}: {getattr(error, 'strerror', 'not UTF-8')}") from None
    users = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not users:
        raise ConfigError(f"{path} names no users: put one user:password per line there")
    return users
