"""ShadowConfig: what answers are compared with while the server runs. Command-line flags are generated from it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from turbolm.config import parse_part
from turbolm.errors import ConfigError

_DEFAULT_LEAST = "95%"


@dataclass(frozen=True, slots=True)
class ShadowConfig:
    """What a user may set."""

    shadow: str = ""
    """Part of the answers that are compared with the model at a higher precision, such as 1%: while the server is
    idle, by a second engine (it has to fit into memory, too) or by --shadow-url."""
    shadow_model: str = ""
    """What to compare with; by default the model that is served, with an unquantized KV cache and weights as they are
    in its files. With --ladder the base of its report."""
    shadow_url: str = ""
    """OpenAI-compatible server of the model to compare with, in place of a second engine here."""
    shadow_key_env: str = ""
    """Name of the environment variable with the key for it."""
    shadow_least: str = ""
    """Part of the tokens of greedy answers that the reference has to find likeliest; less is a warning in the log. By
    default what the ladder's report found, or 95%."""

    def __post_init__(self) -> None:
        for name in ("shadow", "shadow_least"):
            if getattr(self, name):
                parse_part(getattr(self, name), name)
        if not self.shadow and (self.shadow_model or self.shadow_url or self.shadow_least):
            raise ConfigError("shadow_model, shadow_url and shadow_least go with shadow, such as --shadow 1%")
        if self.shadow_url and not self.shadow_url.startswith(("http://", "https://")):
            raise ConfigError(f"shadow_url is '{self.shadow_url}'; give an address such as http://10.0.0.2:8000")
        if self.shadow_key_env and not os.environ.get(self.shadow_key_env):
            raise ConfigError(f"shadow_key_env: the environment variable {self.shadow_key_env} holds no key")

    @property
    def rate(self) -> float:
        return parse_part(self.shadow, "shadow") if self.shadow else 0.0

    @property
    def least(self) -> float:
        return parse_part(self.shadow_least or _DEFAULT_LEAST, "shadow_least")
