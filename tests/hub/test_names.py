from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.errors import ModelNotFoundError
from turbolm.hub.names import LocalName, RepositoryName, Wheel, WheelName, resolve


def test_repositories():
    assert resolve("org/name") == RepositoryName("hf", "org/name")
    assert resolve("hf:org/na.me@v1.0") == RepositoryName("hf", "org/na.me", "v1.0")
    assert resolve("hf:org/name:Q4_K_M") == RepositoryName("hf", "org/name", None, "Q4_K_M")
    assert resolve("org/name@main:sub/model.gguf") == RepositoryName("hf", "org/name", "main", "sub/model.gguf")
    assert resolve("ms:org/name") == RepositoryName("ms", "org/name")
    assert resolve("org/name-GGUF:x.gguf") == RepositoryName("hf", "org/name-GGUF", None, "x.gguf")


def test_wheels():
    assert resolve("pypi:My_Model") == WheelName((Wheel("my-model"),))
    assert resolve("pypi:a==1.2/m.gguf") == WheelName((Wheel("a", "1.2"),), "m.gguf")
    assert resolve("pypi:a-1+a-2==2/m.gguf") == WheelName((Wheel("a-1"), Wheel("a-2", "2")), "m.gguf")


def test_short_name_in_any_case():
    name = resolve("SmolLM2-135M")
    assert isinstance(name, WheelName)
    assert name.known is not None
    assert str(name) == "smollm2-135m"


def test_existing_path_goes_first(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == LocalName((tmp_path / "org" / "name").resolve())
    assert isinstance(resolve("smollm2-135m"), LocalName)


@pytest.mark.parametrize("name", ["hf:org", "hf:org/name/more", "ms:", "pypi:", "pypi:a==", "pypi:a b", "pypi:a/../b"])
def test_malformed_names_say_how_to_write_them(name):
    with pytest.raises(ModelNotFoundError, match=r"write|name a file"):
        resolve(name)


def test_unknown_short_name_gets_the_nearest():
    with pytest.raises(ModelNotFoundError, match=r"Did you mean 'smollm2-135m'\?.*hf:org/name"):
        resolve("smolm2-135m")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model.gguf", "nowhere.gguf", "~/nowhere-at-all", " "])
def test_missing_paths(name):
    with pytest.raises(ModelNotFoundError, match=r"no file or folder|is empty"):
        resolve(name)


@given(st.text(max_size=40))
def test_any_text_is_resolved_or_refused(text):
    try:
        name = resolve(text)
    except ModelNotFoundError:
        return
    except (OSError, ValueError):  # pragma: no cover
        pytest.fail("a bad name must be refused by turbolm's own error")
    if not isinstance(name, LocalName):
        assert resolve(str(name)) == name


parts = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True)


@given(parts, parts, st.none() | parts, st.none() | parts)
def test_repository_names_round_trip(org, repository, revision, file):
    name = RepositoryName("hf", f"{org}/{repository}", revision, file)
    assert resolve(str(name)) == name
