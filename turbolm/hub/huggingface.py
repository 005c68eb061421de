"""Models from the Hugging Face Hub, through its own library: its cache, its resuming, its progress bars,
its variables (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE)."""

from __future__ import annotations

import contextlib
import errno
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub as library  # loads its parts when they are used: all of it takes half a second
from huggingface_hub import constants

from turbolm.errors import CheckpointError, DownloadError, ModelNotFoundError
from turbolm.hub import cache
from turbolm.hub.files import Selection, choose, local_model
from turbolm.hub.names import RepositoryName


def fetch_huggingface(name: RepositoryName, *, progress: bool, offline: bool, refresh: bool = False) -> Path:
    """The snapshot folder, or the first .gguf file, of a repository. What was fetched before is used without
    the network, unless `refresh` asks whether the repository has changed.

    Raises DownloadError, ModelNotFoundError, UnsupportedModelError, CheckpointError.
    """
    record_path = cache.models_folder() / f"{cache.key_of(f'hf:{_spelled(name)}')}.json"
    record = cache.read_record(record_path)
    if record and not refresh and Path(record.path).exists():
        with contextlib.suppress(CheckpointError):  # a file is gone: fetch again
            return local_model(Path(record.path))
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(name)
    try:
        return _download(name, record_path, progress)
    except _UnreachableError:
        return _cached(name)  # another program may have fetched it


def fetch_files(name: RepositoryName, files: Sequence[str]) -> Path:
    """The folder with those of these files that a repository has; what is here already without the network, if there
    is none. Raises DownloadError, ModelNotFoundError."""
    with _errors(name):
        return Path(library.snapshot_download(name.repository, revision=name.revision, allow_patterns=list(files)))


class _UnreachableError(DownloadError):
    """The hub doesn't answer."""


def _cached(name: RepositoryName) -> Path:
    """The model in the library's cache; whole, as far as its weights tell."""
    with _errors(name):
        snapshot = Path(library.snapshot_download(name.repository, revision=name.revision, local_files_only=True))
        try:
            return local_model(snapshot, name.file)
        except (ModelNotFoundError, CheckpointError):
            raise _unreachable(name) from None


def _download(name: RepositoryName, record_path: Path, progress: bool) -> Path:
    with _errors(name), _progress_bars(progress):
        selection, commit = _select(name)
        patterns = [glob.escape(file) for file in selection.files]
        snapshot = Path(library.snapshot_download(name.repository, revision=commit, allow_patterns=patterns))
    main = local_model(snapshot / selection.main)
    cache.write_record(record_path, cache.Record(str(name), str(main), commit, str(snapshot)))
    return main


def remove_huggingface(record: cache.Record) -> None:
    """Deletes a recorded snapshot from the Hub library's cache."""
    from huggingface_hub.errors import CacheNotFound

    try:
        info = library.scan_cache_dir()
    except CacheNotFound:
        return
    commits = {revision.commit_hash for repository in info.repos for revision in repository.revisions}
    if record.revision in commits:
        info.delete_revisions(record.revision).execute()


def _spelled(name: RepositoryName) -> str:
    return f"{name.repository}@{name.revision or 'main'}" + (f":{name.file}" if name.file else "")


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model of the hub that stays there."""

    main: str  # as `Selection.main`
    sizes: Mapping[str, int]  # bytes of each of its files
    urls: Mapping[str, str]
    headers: Mapping[str, str]  # to send with requests


def locate_huggingface(name: RepositoryName) -> RemoteModel:
    """Where a repository's model lies. Raises DownloadError, ModelNotFoundError, UnsupportedModelError."""
    with _errors(name):
        selection, sizes, commit = _list(name)
        urls = {file: library.hf_hub_url(name.repository, file, revision=commit) for file in selection.files}
        token = library.get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return RemoteModel(selection.main, {file: sizes[file] for file in selection.files}, urls, headers)


def _list(name: RepositoryName) -> tuple[Selection, Mapping[str, int], str]:
    """The model's files, the bytes of all files, and the commit."""
    info = library.HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    return choose(list(sizes), name.file, f"'{name}'"), sizes, info.sha or name.revision or "main"


def _select(name: RepositoryName) -> tuple[Selection, str]:
    """What to download, and of which commit; checks that it fits on the disk."""
    selection, sizes, commit = _list(name)
    missing = [
        file
        for file in selection.files
        if not isinstance(library.try_to_load_from_cache(name.repository, file, revision=commit), str)
    ]
    cache.check_space(sum(sizes[file] for file in missing), Path(constants.HF_HUB_CACHE), str(name))
    return selection, commit


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _errors(name: RepositoryName) -> Iterator[None]:
    """The library's errors as turbolm's, each with a way out."""
    from huggingface_hub import errors

    # The library moved from requests to httpx and on; its own error derives from the base class of whichever it
    # uses, and that base covers failed connections too.
    transport_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(
            f"{name.repository} asks for its terms to be accepted: do that on its page while signed in, then make "
            "a token known with `hf auth login` or in HF_TOKEN."
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"the hub has no model {name.repository}, or it is private. Check the spelling; for a private one "
            "make a token known with `hf auth login` or in HF_TOKEN."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelNotFoundError(
            f"{name.repository} has no revision '{name.revision}': name a branch, tag or commit."
        ) from None
    except errors.HFValidationError as error:
        raise ModelNotFoundError(f"'{name}' isn't a repository name: {error}") from None
    except errors.LocalEntryNotFoundError:
        raise _unreachable(name) from None
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(f"a file of '{name}' is missing from the hub: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"the hub refused '{name}': {_first_line(error)}. Try again later.") from None
    except OSError as error:
        with cache.disk_errors(Path(constants.HF_HUB_CACHE)):
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
        raise _unreachable(name) from None
    except transport_error:
        raise _unreachable(name) from None
    except RuntimeError as error:  # the native transfer library's
        raise DownloadError(
            f"the download of '{name}' broke off: {_first_line(error)}. Run it again: it resumes."
        ) from None


def _unreachable(name: RepositoryName) -> _UnreachableError:
    return _UnreachableError(
        f"can't reach the model hub, and '{name}' isn't (fully) in the cache. Check the network, set HF_ENDPOINT to "
        "a mirror, give a local folder or .gguf file, or use smollm2-135m, which comes from the package index."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
