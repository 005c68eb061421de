from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from turbolm import hub
from turbolm.errors import DownloadError, ModelNotFoundError


class NotExistError(Exception):
    pass


class HubError(Exception):
    pass


@pytest.fixture
def library(cache, tmp_path, monkeypatch):
    """A stand-in for the optional package, with one repository."""
    state = SimpleNamespace(failure=None, calls=0)
    files = [{"Path": "sub", "Type": "tree"}, {"Path": "config.json", "Size": 2}, {"Path": "m.safetensors", "Size": 5}]

    class HubApi:
        def get_model_files(self, repository, revision=None, recursive=False):
            state.calls += 1
            if state.failure:
                raise state.failure
            return files

    def snapshot_download(repository, *, revision=None, allow_patterns=None):
        folder = tmp_path / "ms"
        folder.mkdir(exist_ok=True)
        for name in allow_patterns:
            (folder / name).touch()
        return str(folder)

    errors = SimpleNamespace(NotExistError=NotExistError, HubError=HubError, RequestError=HubError)
    for name, attributes in {
        "modelscope": {"snapshot_download": snapshot_download},
        "modelscope.hub": {"errors": errors},
        "modelscope.hub.api": {"HubApi": HubApi},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return state


def test_fetch_then_from_the_cache(library):
    model = hub.fetch("ms:org/name", progress=False)
    assert (model.name, model.source) == ("ms:org/name", "ms")
    assert sorted(path.name for path in Path(model.path).iterdir()) == ["config.json", "m.safetensors"]
    assert hub.fetch("ms:org/name", offline=True).path == model.path
    assert library.calls == 1
    hub.remove("ms:org/name")
    with pytest.raises(DownloadError, match="isn't in the cache"):
        hub.fetch("ms:org/name", offline=True)


def test_errors(library):
    library.failure = NotExistError()
    with pytest.raises(ModelNotFoundError, match="no model org/name"):
        hub.fetch("ms:org/name", progress=False)
    library.failure = HubError("quota")
    with pytest.raises(DownloadError, match="quota"):
        hub.fetch("ms:org/name", progress=False)


def test_missing_package_says_how_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(DownloadError, match=r"pip install 'turbolm\[modelscope\]'"):
        hub.fetch("ms:org/name")
