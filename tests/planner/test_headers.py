"""Headers over HTTP ranges: few bytes are read, what is read opens as the file would, what is wrong is said."""

from __future__ import annotations

import contextlib
import functools
import http.server
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest

from turbolm import hub
from turbolm.errors import CheckpointError, DownloadError
from turbolm.hub import RemoteModel
from turbolm.models.checkpoint import open_checkpoint
from turbolm.planner.gpus import parse_machine
from turbolm.planner.headers import copy_headers
from turbolm.planner.model import open_model
from turbolm.planner.plan import Demand, plan


@dataclass
class FileServer:
    """Files of a folder, in ranges; `num_bytes` counts what was sent of each."""

    folder: Path
    url: str = ""
    status: int = 206
    cut: int = 0  # bytes that are missing at the end of an answer
    num_bytes: dict[str, int] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)

    @property
    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}

    @property
    def urls(self) -> dict[str, str]:
        return {name: f"{self.url}/{name}" for name in self.sizes}

    def copy(self, folder: Path) -> None:
        copy_headers(self.sizes, self.urls, {"Authorization": "Bearer secret"}, folder)


class Handler(http.server.BaseHTTPRequestHandler):
    files: FileServer

    def do_GET(self) -> None:
        name = self.path[1:]
        content = (self.files.folder / name).read_bytes()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if self.files.status == 206:
            content = content[int(match[1]) : int(match[2]) + 1]
        content = content[: len(content) - self.files.cut]
        self.files.num_bytes[name] = self.files.num_bytes.get(name, 0) + len(content)
        self.files.tokens.add(self.headers["Authorization"])
        self.send_response(self.files.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have seen enough
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(folder: Path) -> FileServer:
        files = FileServer(folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Files", (Handler,), {"files": files}))
        files.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True).start()
        servers.append(server)
        return files

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write_gguf(path: Path, num_tokens: int = 40000) -> None:
    """A model whose header, with its vocabulary, is longer than the first request."""
    hidden, width = 64, 96
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 128, "embedding_length": hidden}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.feed_forward_length", width)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"token number {i}" for i in range(num_tokens)])
    shapes = {
        "token_embd": (num_tokens, hidden), "blk.0.attn_norm": (hidden,), "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (32, hidden), "blk.0.attn_v": (32, hidden), "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_norm": (hidden,), "blk.0.ffn_gate": (width, hidden), "blk.0.ffn_up": (width, hidden),
        "blk.0.ffn_down": (hidden, width), "output_norm": (hidden,),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_safetensors_are_known_by_their_headers(serve, small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.json").write_bytes(b"x" * 100_000)
    files = serve(small)
    files.copy(tmp_path / "copy")
    ours, theirs = open_checkpoint(tmp_path / "copy"), open_checkpoint(small)
    assert ours.source.tensors == theirs.source.tensors
    assert ours.config == theirs.config
    assert "tokenizer.json" not in files.num_bytes
    assert files.tokens == {"Bearer secret"}
    shards = [name for name in files.sizes if name.endswith(".safetensors")]
    assert sum(files.num_bytes[name] for name in shards) < 0.25 * sum(files.sizes[name] for name in shards)


def test_gguf_headers_are_read_until_they_are_whole(serve, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_gguf(folder / "model.gguf")
    files = serve(folder)
    files.copy(tmp_path / "copy")
    ours, theirs = open_checkpoint(tmp_path / "copy"), open_checkpoint(folder)
    assert ours.source.tensors == theirs.source.tensors
    assert 1 << 18 < files.num_bytes["model.gguf"] < 0.25 * files.sizes["model.gguf"]


def test_a_repository_is_planned_without_its_weights(serve, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = serve(small)
    monkeypatch.setattr(hub, "is_cached", lambda name: False)
    monkeypatch.setattr(hub, "locate_huggingface", lambda name: RemoteModel("", files.sizes, files.urls, {}))
    remote, local = open_model("org/small"), open_model(str(small))
    assert remote.name == "small"
    demand, cards = Demand(512), parse_machine("24GB")
    assert plan(remote, cards, demand).fits == plan(local, cards, demand).fits


@pytest.mark.parametrize(
    ("status", "cut", "words"),
    [(200, 0, "whole files only"), (403, 0, "answered 403"), (206, 1, "bytes of")],
)
def test_servers_that_do_not_play_along(serve, small: Path, tmp_path: Path, status: int, cut: int, words: str) -> None:
    files = serve(small)
    files.status, files.cut = status, cut
    weights = next(name for name in files.sizes if name.endswith(".safetensors"))
    with pytest.raises(DownloadError, match=words):
        copy_headers({weights: files.sizes[weights]}, files.urls, {}, tmp_path / "copy")


def test_no_server_at_all(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DownloadError, match=r"can't read config.json.*check the network"):
        copy_headers({"config.json": 10}, {"config.json": "http://127.0.0.1:9/config.json"}, {}, tmp_path / "copy")


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf"])
def test_files_that_are_something_else(serve, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(b"<html>not found</html>" * 50_000)
    with pytest.raises(CheckpointError, match=f"{name} is no"):
        serve(folder).copy(tmp_path / "copy")


def test_where_a_repository_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name, size=10) for name in ("config.json", "model.safetensors", "README.md")]
    api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(sha="abc", siblings=files))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    found = hub.locate_huggingface(hub.resolve("org/model@main"))
    assert dict(found.sizes) == {"config.json": 10, "model.safetensors": 10}
    assert found.urls["config.json"].endswith("/org/model/resolve/abc/config.json")
    assert found.headers == {"Authorization": "Bearer secret"}
