"""ServerConfig: what a user may set of the server. Command-line flags are generated from it."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass, fields, replace
from pathlib import Path

from turbolm.config import parse_size
from turbolm.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What a user may set. Times are in seconds; 0 switches a time limit off."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine."""
    port: int = 23333
    """Port to listen on; 0: any free one."""
    served_name: str | None = None
    """The model's name in requests; by default the name that it was loaded by."""
    api_key_file: str | None = None
    """File with API keys, one a line ('#' begins a comment). Requests must bring one of them."""
    api_key_env: str | None = None
    """Name of an environment variable that holds API keys, separated by commas."""
    tls_certificate: str | None = None
    """PEM file with the certificate chain: the server then speaks HTTPS."""
    tls_key: str | None = None
    """PEM file with the certificate's private key."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server, such as https://example.org; '*': all of them."""
    max_requests: int = 1024
    """Most requests at work or waiting; further ones are refused with 429."""
    max_body: str = "8M"
    """Largest request body, such as 500K or 8M."""
    max_messages: int = 4096
    """Most messages of a conversation."""
    max_answers: int = 128
    """Most answers to one request: prompts times n."""
    request_timeout: float = 3600.0
    """Longest time for one request; then it ends with an error."""
    drain_timeout: float = 30.0
    """How long running requests may go on after SIGTERM or ctrl-C, before they end with an error."""
    ping_interval: float = 15.0
    """A stream that is silent for so long gets a comment, so that proxies keep it open."""
    isolated: bool = True
    """Run the engine in a process of its own: when that dies, it is started again, and requests that had sent
    nothing yet are tried again."""
    step_timeout: float = 120.0
    """An engine in a process of its own that makes no step for so long, while requests wait, is started again."""
    store: str | None = None
    """SQLite file that keeps the answers of /v1/responses, unless a request says store = false. Made where there is
    none; without it nothing is kept."""
    otlp_endpoint: str | None = None
    """Address of an OpenTelemetry collector (OTLP over HTTP), such as http://localhost:4318: it gets a span for each
    request, without texts. By default that of OTEL_EXPORTER_OTLP_ENDPOINT, if it is set."""
    adapter_changes: bool = False
    """Let requests add and remove LoRA adapters although no API key is asked for: whoever reaches the server can then
    make it read folders of its machine."""
    log_prompts: bool = False
    """Write the bodies of requests to the log."""

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, got {self.port!r}")
        for name in ("max_requests", "max_messages", "max_answers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, got {value!r}")
        for name in ("request_timeout", "drain_timeout", "ping_interval", "step_timeout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1e9:
                raise ConfigError(f"{name} must be seconds, 0 or more, got {value!r}")
        if parse_size(self.max_body, "max_body") < 1024:
            raise ConfigError(f"max_body is {self.max_body!r}; give at least 1K")
        if self.otlp_endpoint is not None and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", self.otlp_endpoint):
            raise ConfigError(f"otlp_endpoint is '{self.otlp_endpoint}'; give an address such as http://localhost:4318")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key belong together: give both or neither")
        for name in ("tls_certificate", "tls_key"):
            value = getattr(self, name)
            if value and not Path(value).expanduser().is_file():
                raise ConfigError(f"{name}: no file '{value}'")
        if self.tls_certificate and self.tls_key:
            self._check_tls(Path(self.tls_certificate).expanduser(), Path(self.tls_key).expanduser())

    @staticmethod
    def _check_tls(certificate: Path, key: Path) -> None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"can't use tls_certificate '{certificate}' with tls_key '{key}' ({error}): give PEM files that belong "
                "together, the key without a password"
            ) from None

    @classmethod
    def of(cls, base: ServerConfig | None = None, **options: object) -> ServerConfig:
        """`base` (default: the defaults) with `options` changed; unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown server option '{name}'.{nearest(name, known)} Known: {', '.join(known)}")
        return replace(base or cls(), **options)  # type: ignore[arg-type]

    @property
    def max_body_bytes(self) -> int:
        return parse_size(self.max_body, "max_body")

    @property
    def limits(self) -> dict[str, int | float]:
        """What a request may ask for, as /v1/models/{id} shows it: counts, bytes, seconds."""
        return {
            "max_requests": self.max_requests,
            "max_body": self.max_body_bytes,
            "max_messages": self.max_messages,
            "max_answers": self.max_answers,
            "request_timeout": self.request_timeout,
        }

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_keys(config: ServerConfig) -> tuple[bytes, ...]:
    """The API keys; empty where none are asked for. ConfigError where a source is missing or holds none."""
    texts: list[str] = []
    if config.api_key_file:
        try:
            lines = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_key_file: can't read '{config.api_key_file}' ({error})") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise ConfigError(f"api_key_file: '{config.api_key_file}' holds no key; write one a line")
        texts += found
    if config.api_key_env:
        found = [key.strip() for key in os.environ.get(config.api_key_env, "").split(",") if key.strip()]
        if not found:
            raise ConfigError(f"api_key_env: the environment variable {config.api_key_env} holds no key")
        texts += found
    return tuple(text.encode() for text in texts)
