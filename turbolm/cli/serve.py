"""`turbolm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.errors import ConfigError
from turbolm.server.config import ServerConfig

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]


@takes_options("Server", ServerConfig)
@takes_options("Engine", EngineConfig)
def serve(model: _ModelName = None, /, **options: object) -> None:
    """Serve a model over HTTP: OpenAI's chat and completions APIs, Prometheus metrics, a page at /docs.
    SIGTERM or ctrl-C finishes what is running, and ends; a second one ends at once.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package.
    """
    config = ServerConfig.of(None, **given(options, ServerConfig))
    engine = EngineConfig.of(None, **given(options, EngineConfig))
    try:
        from turbolm.server.run import serve as run  # torch and uvicorn, which --help can do without
    except ImportError as error:
        raise ConfigError(
            f"the server needs packages that are missing ({error}): pip install 'turbolm[server]'"
        ) from None
    run(model or DEFAULT_MODEL, config, engine)
