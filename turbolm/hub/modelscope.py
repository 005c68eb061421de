"""Models from ModelScope, through its own library (the optional package `modelscope`)."""

from __future__ import annotations

import glob
from pathlib import Path

from turbolm.errors import CheckpointError, DownloadError, ModelNotFoundError
from turbolm.hub import cache
from turbolm.hub.files import choose, local_model
from turbolm.hub.names import RepositoryName


def fetch_modelscope(name: RepositoryName, *, offline: bool, refresh: bool = False) -> Path:
    """The snapshot folder, or the first .gguf file, of a repository; kept in the library's own cache.

    Raises DownloadError, ModelNotFoundError, UnsupportedModelError, CheckpointError.
    """
    record_path = cache.models_folder() / f"{cache.key_of(str(name))}.json"
    record = cache.read_record(record_path)
    if record and not refresh and Path(record.path).exists():
        try:
            return local_model(Path(record.path))
        except CheckpointError:
            pass  # a file is gone: fetch again
    if offline:
        raise DownloadError(f"'{name}' isn't in the cache, and downloading is switched off: pull it while online.")
    try:
        from modelscope import snapshot_download
        from modelscope.hub import errors
        from modelscope.hub.api import HubApi
    except ImportError:
        raise DownloadError(f"'{name}' needs the package modelscope: pip install 'turbolm[modelscope]'.") from None
    failures = (OSError, ValueError, RuntimeError, getattr(errors, "HubError", errors.RequestError))
    try:
        files = HubApi().get_model_files(name.repository, revision=name.revision, recursive=True)
        sizes = {file["Path"]: int(file.get("Size") or 0) for file in files if file.get("Type") != "tree"}
        selection = choose(list(sizes), name.file, f"'{name}'")
        cache.check_space(sum(sizes[file] for file in selection.files), cache.models_folder(), str(name))
        patterns = [glob.escape(file) for file in selection.files]
        snapshot = Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns))
    except errors.NotExistError:
        raise ModelNotFoundError(f"ModelScope has no model {name.repository}, or no such revision of it.") from None
    except failures as error:
        raise DownloadError(f"ModelScope didn't give '{name}': {str(error).strip() or type(error).__name__}") from None
    main = local_model(snapshot / selection.main)
    cache.write_record(record_path, cache.Record(str(name), str(main), folder=str(snapshot)))
    return main
