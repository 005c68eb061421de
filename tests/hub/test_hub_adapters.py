"""Where an adapter's files come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbolm.errors import ModelNotFoundError
from turbolm.hub import huggingface
from turbolm.hub.adapters import fetch_adapter


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no adapter"):
        fetch_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert fetch_adapter(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize(
    "name", ["/nowhere/at/all", "ms:org/name", "pypi:package", "hf:org/name:Q4_K_M", "smollm2-135m"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        fetch_adapter(name)


def test_of_a_repository_two_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface.library, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=r"adapter_config\.json"):
        fetch_adapter("hf:org/name@v2")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert fetch_adapter("org/name") == tmp_path
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert asked == [("org/name", "v2", files), ("org/name", None, files)]
