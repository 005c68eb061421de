"""The hub library is replaced at its public functions: what turbolm asks of it, and what it makes of its errors."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from turbolm import hub
from turbolm.errors import DownloadError, ModelNotFoundError, UnsupportedModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories in memory; `calls` counts what went over the network."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[str, dict[str, int]] = {}
        self.calls: list[str] = []
        self.failure: Exception | None = None

    def model_info(self, repository, revision=None, files_metadata=False):
        self.calls.append("info")
        if self.failure:
            raise self.failure
        files = self.repositories[repository]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files.items()])

    def snapshot_download(self, repository, *, revision=None, allow_patterns=None, local_files_only=False):
        folder = self.root / repository.replace("/", "--")
        if local_files_only:
            if folder.exists():
                return str(folder)
            raise errors.LocalEntryNotFoundError("nothing here")
        self.calls.append("download")
        assert revision == COMMIT
        for name in allow_patterns:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * self.repositories[repository][name])
        return str(folder)


@pytest.fixture
def fake(cache, tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "snapshots")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "snapshots"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    fake.repositories["org/st"] = {
        "config.json": 2,
        "model.safetensors": 30,
        "tokenizer.json": 3,
        "pytorch_model.bin": 9,
    }
    fake.repositories["org/gguf"] = {"m-Q4_K_M.gguf": 10, "m-Q8_0.gguf": 20, "README.md": 1}
    fake.repositories["org/pickles"] = {"config.json": 2, "pytorch_model.bin": 9}
    return fake


def http_error(kind: type[Exception], status: int) -> Exception:
    return kind("refused", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


def test_safetensors_repository(fake):
    model = hub.fetch("org/st", progress=False)
    assert (model.name, model.source) == ("hf:org/st", "hf")
    assert sorted(path.name for path in model.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    [cached] = hub.cached_models()
    assert (cached.name, cached.num_bytes) == ("hf:org/st", 35)


def test_second_fetch_needs_no_network_unless_refreshed(fake):
    path = hub.fetch("org/st", progress=False).path
    fake.calls.clear()
    assert hub.fetch("hf:org/st", progress=False).path == path
    assert hub.fetch("hf:org/st", offline=True).path == path
    assert fake.calls == []
    hub.fetch("hf:org/st", progress=False, refresh=True)
    assert fake.calls == ["info", "download"]


def test_one_file_of_a_gguf_repository(fake):
    model = hub.fetch("org/gguf:Q4_K_M", progress=False)
    assert model.path.name == "m-Q4_K_M.gguf"
    assert [path.name for path in model.path.parent.iterdir()] == ["m-Q4_K_M.gguf"]
    with pytest.raises(ModelNotFoundError, match=r"m-Q4_K_M\.gguf, m-Q8_0\.gguf"):
        hub.fetch("org/gguf", progress=False)


def test_pickles_only(fake):
    with pytest.raises(UnsupportedModelError, match="safetensors and GGUF"):
        hub.fetch("org/pickles", progress=False)
    assert "download" not in fake.calls


def test_no_room(fake, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DownloadError, match="needs 35 B"):
        hub.fetch("org/st", progress=False)
    assert "download" not in fake.calls


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (http_error(errors.RepositoryNotFoundError, 404), ModelNotFoundError, "no model org/st, or it is private"),
        (http_error(errors.GatedRepoError, 401), DownloadError, "HF_TOKEN"),
        (http_error(errors.RevisionNotFoundError, 404), ModelNotFoundError, "no revision 'v9'"),
        (http_error(errors.HfHubHTTPError, 503), DownloadError, "refused"),
        (httpx2.ConnectError("no route"), DownloadError, "HF_ENDPOINT.*smollm2-135m"),
        (OSError(errno.ENETUNREACH, "unreachable"), DownloadError, "HF_ENDPOINT"),
        (OSError(errno.ENOSPC, "full"), DownloadError, "disk .* is full"),
        (PermissionError(errno.EACCES, "denied"), DownloadError, "can't write"),
        (RuntimeError("CAS service error"), DownloadError, "broke off.*it resumes"),
    ],
)
def test_library_errors_become_turbolm_errors(fake, failure, error, message):
    fake.failure = failure
    with pytest.raises(error, match=message) as raised:
        hub.fetch("hf:org/st@v9", progress=False)
    assert raised.value.__suppress_context__


def test_offline_without_a_copy(fake, monkeypatch):
    with pytest.raises(DownloadError, match=r"isn't .fully. in the cache"):
        hub.fetch("org/st", offline=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError):
        hub.fetch("org/st")
    assert fake.calls == []


def test_network_down_uses_what_another_program_fetched(fake):
    folder = fake.root / "org--st"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    fake.failure = httpx2.ConnectError("no route")
    with pytest.raises(DownloadError, match="can't reach"):
        hub.fetch("org/st", progress=False)  # config.json alone is no model
    (folder / "model.safetensors").touch()
    assert hub.fetch("org/st", progress=False).path == folder


def test_remove_deletes_the_snapshot_and_the_record(fake, monkeypatch):
    path = hub.fetch("org/st", progress=False).path
    deleted = []
    info = SimpleNamespace(
        repos=[SimpleNamespace(revisions=[SimpleNamespace(commit_hash=COMMIT)])],
        delete_revisions=lambda commit: SimpleNamespace(execute=lambda: deleted.append(commit)),
    )
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: info)
    assert hub.remove("org/st") == 35
    assert deleted == [COMMIT]
    assert hub.cached_models() == []
    with pytest.raises(ModelNotFoundError, match="isn't in the cache"):
        hub.remove("org/st")
    with pytest.raises(ModelNotFoundError, match="your own"):
        hub.remove(str(path))
