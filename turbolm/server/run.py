"""`serve`: a process that serves one model until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
import uvloop

from turbolm.config import EngineConfig
from turbolm.errors import ConfigError, EngineError
from turbolm.llm import AsyncLLM
from turbolm.server.app import make_app
from turbolm.server.config import ServerConfig, read_keys
from turbolm.server.protocol import BoundedProtocol
from turbolm.server.service import Service
from turbolm.server.shadow import open_shadow
from turbolm.server.shadow_config import ShadowConfig
from turbolm.server.tracing import start_tracing
from turbolm.worker.supervisor import Supervision

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def serve(model: str, config: ServerConfig, engine: EngineConfig, shadow: ShadowConfig | None = None) -> None:
    """Loads the model and serves it; `shadow` says what its answers are compared with. Returns after SIGTERM or ctrl-C,
    when running requests are done. Raises UserError or CapacityError where it can't begin, EngineError where the
    engine is lost for good."""
    keys = read_keys(config)
    tracing = start_tracing(config.otlp_endpoint)
    listener = _listen(config)  # before the model is loaded: a port in use shows at once
    with contextlib.closing(listener):
        _start_logging()
        if not keys and not config.is_loopback:
            sys.stderr.write(
                f"turbolm: warning: {config.host} is open to the network, and there is no API key: anyone who reaches "
                "it can use the model (--api-key-file)\n"
            )
        supervision = Supervision(step_timeout=config.step_timeout)
        llm = AsyncLLM(model, engine, isolated=supervision if config.isolated else False)
        loop = uvloop.new_event_loop()
        try:
            service = Service(llm, config, keys)
            service.tracing = tracing
            if shadow is not None and shadow.rate:
                _start_shadow(service, shadow, model, engine)
            gc.collect()
            gc.freeze()  # what loading made stays: to look for garbage in it would stall answers
            gc.set_threshold(20_000, 20, 20)  # a step makes thousands of objects and hardly ever a cycle
            loop.run_until_complete(_run(service, config, listener))
        finally:
            loop.run_until_complete(llm.close())
            loop.close()


def _start_shadow(service: Service, config: ShadowConfig, model: str, engine: EngineConfig) -> None:
    isolated = service.config.isolated
    shadow = open_shadow(config, model, engine, service.llm, lambda: not service.num_admitted, isolated=isolated)
    service.start_shadow(shadow)
    sys.stderr.write(f"turbolm: {config.shadow} of the answers are compared with {shadow.reference.title}\n")


async def _run(service: Service, config: ServerConfig, listener: socket.socket) -> None:
    server = _Server(
        uvicorn.Config(
            make_app(service),
            http=BoundedProtocol,
            ws="none",
            loop="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            ssl_certfile=str(Path(config.tls_certificate).expanduser()) if config.tls_certificate else None,
            ssl_keyfile=str(Path(config.tls_key).expanduser()) if config.tls_key else None,
        )
    )
    stopping = asyncio.Event()
    _on_signals(stopping.set)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not (server.started or running.done()):
        await asyncio.sleep(0.005)
    if server.started:
        _announce(service, config, listener)
    stopped = asyncio.create_task(stopping.wait())
    lost = asyncio.create_task(_engine_lost(service.llm))
    await asyncio.wait({running, stopped, lost}, return_when=asyncio.FIRST_COMPLETED)
    if stopping.is_set():
        logger.warning("finishing %d requests; a second signal ends them at once", service.num_admitted)
        await service.drain()
    server.should_exit = True
    stopped.cancel()
    lost.cancel()
    await running
    if service.llm.is_given_up:  # whoever started this process may do better with a new one
        raise EngineError(service.llm.trouble or "")


async def _engine_lost(llm: AsyncLLM) -> None:
    """Returns when the engine is given up and its requests have had time to say so."""
    while not llm.is_given_up:
        await asyncio.sleep(_LOOK_SECONDS)
    await asyncio.sleep(_LOOK_SECONDS)


class _Server(uvicorn.Server):
    """uvicorn's server, without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _on_signals(stop: Callable[[], None]) -> None:
    """The first signal stops, the second ends the process at once."""
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def handle(number: int) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


def _listen(config: ServerConfig) -> socket.socket:
    """A bound socket. ConfigError where the address can't be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, UnicodeError) as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {config.host} port {config.port} ({error}): choose another --host or --port"
        ) from None
    return listener


def _announce(service: Service, config: ServerConfig, listener: socket.socket) -> None:
    scheme = "https" if config.tls_certificate else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"{scheme}://{host}:{listener.getsockname()[1]}"
    reasons = "".join(f"  {reason}\n" for reason in service.llm.config.reasons)
    sys.stderr.write(f"{reasons}turbolm: '{service.name}' is served at {url}/v1; the API's page is {url}/docs\n")
    sys.stderr.flush()


def _start_logging() -> None:
    """One line per request, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("turbolm.server.access")
    access.handlers[:] = [handler]
    access.setLevel(logging.INFO)
    access.propagate = False
