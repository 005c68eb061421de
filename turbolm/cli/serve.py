"""`turbolm serve`: an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turbolm.cli.options import given, takes_options
from turbolm.config import DEFAULT_MODEL, EngineConfig
from turbolm.errors import ConfigError
from turbolm.ladder.recommendation import read_recommendation
from turbolm.server.config import ServerConfig
from turbolm.server.shadow_config import ShadowConfig

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]


@takes_options("Server", ServerConfig)
@takes_options("Shadow", ShadowConfig)
@takes_options("Engine", EngineConfig)
def serve(model: _ModelName = None, /, *, ladder: Path | None = None, **options: object) -> None:
    """Serve a model over HTTP: OpenAI's chat and completions APIs, Prometheus metrics, a page at /docs.
    SIGTERM or ctrl-C finishes what is running, and ends; a second one ends at once.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], ms:org/name or pypi:package.
    ladder
        Serve what this report.json of turbolm ladder recommends: its model and engine options, but for those given.
    """
    config = ServerConfig.of(None, **given(options, ServerConfig))
    recommended: dict[str, object] = {}
    shadowed = given(options, ShadowConfig)
    if ladder is not None:
        if model is not None:
            raise ConfigError(f"the report {ladder} names the model: leave '{model}' out, or --ladder")
        found = read_recommendation(ladder)
        model, recommended = found.model, found.options
        if "shadow" in shadowed and found.agreement is not None:
            shadowed = {"shadow_model": found.base, "shadow_least": f"{found.agreement:.2%}", **shadowed}
    shadow = ShadowConfig(**shadowed)  # type: ignore[arg-type]
    engine = EngineConfig.of(None, **{**recommended, **given(options, EngineConfig)})
    try:
        from turbolm.server.run import serve as run  # torch and uvicorn, which --help can do without
    except ImportError as error:
        raise ConfigError(
            f"the server needs packages that are missing ({error}): pip install 'turbolm[server]'"
        ) from None
    run(model or DEFAULT_MODEL, config, engine, shadow)
