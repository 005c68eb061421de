"""ExamConfig: what is asked, and how answers are checked. Command-line flags are generated from it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from turbolm.errors import ConfigError
from turbolm.eval.judge import Judge


@dataclass(frozen=True, slots=True)
class ExamConfig:
    """What a user may set."""

    probes: int = 0
    """Generated questions of each kind that short benchmarks miss."""
    probe_words: int = 1000
    """Length of the texts in which probes hide a fact, in words."""
    seed: int = 0
    """Of the probes, and of the order in which a ladder asks."""
    max_tokens: int = 256
    """Longest answer, where the item says nothing."""
    keep_going: bool = False
    """Leave out items that can't be used, instead of ending."""
    allow_code: bool = False
    """Allow checks that run Python expressions from the data."""
    judge_url: str = ""
    """OpenAI-compatible server of the model that grades answers to items with the check "judge"."""
    judge_model: str = ""
    """That model's name."""
    judge_key_env: str = ""
    """Name of the environment variable with the key for it."""

    def __post_init__(self) -> None:
        for name in ("probes", "seed"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 1 << 31:
                raise ConfigError(f"{name} must be a whole number, 0 or more, got {getattr(self, name)!r}")
        for name in ("probe_words", "max_tokens"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, got {getattr(self, name)!r}")
        if bool(self.judge_url) != bool(self.judge_model):
            raise ConfigError("judge_url and judge_model belong together: give both or neither")

    def judge(self) -> Judge | None:
        """None: none is named. ConfigError where its key is missing."""
        if not self.judge_url:
            return None
        key = os.environ.get(self.judge_key_env) if self.judge_key_env else None
        if self.judge_key_env and not key:
            raise ConfigError(f"judge_key_env: the environment variable {self.judge_key_env} holds no key")
        return Judge(self.judge_url, self.judge_model, key)
