"""Adapters over HTTP: listed, chosen by `model`, added and removed; several in one batch."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from adapter_files import save_random_adapter

from turbolm import AsyncLLM
from turbolm.server.config import ServerConfig

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def folders(smollm2_path, tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    ranks = {"first": 8, "second": 20}
    return {
        name: save_random_adapter(smollm2_path, base / name, seed, rank)
        for seed, (name, rank) in enumerate(ranks.items())
    }


@pytest.fixture(scope="module")
def llm(smollm2_path, folders):
    llm = AsyncLLM(
        str(smollm2_path), progress=False, max_context=512,
        adapters={"first": str(folders["first"])}, max_adapters=2, max_adapter_rank=24,
    )  # fmt: skip
    yield llm
    asyncio.run(llm.close())


@pytest.fixture(scope="module")
def served(llm, serving):
    with serving(llm, ServerConfig(served_name="smollm"), keys=(b"secret",)) as found:
        yield found


def answer(served, model: str, prompt: str = "Once upon a time") -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    found = served.post("/v1/completions", body, headers=KEY).json()
    assert found["model"] == model, found
    return found["choices"][0]["text"]


def test_adapters_come_and_go(served, folders):
    first = {"id": "first", "object": "adapter", "parent": "smollm"}
    assert served.get("/v1/adapters", headers=KEY).json()["data"] == [first]
    added = served.post("/v1/adapters", {"name": "second", "path": str(folders["second"])}, headers=KEY)
    assert (added.status_code, added.json()["id"]) == (200, "second")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["smollm", "first", "second"]
    assert client.models.retrieve("second").parent == "smollm"

    with ThreadPoolExecutor(6) as pool:  # in one batch
        together = list(pool.map(lambda model: answer(served, model), ["smollm", "first", "second"] * 2))
    assert together[:3] == together[3:]
    assert len(set(together)) == 3
    assert together[:3] == [answer(served, model) for model in ("smollm", "first", "second")]
    chat = client.chat.completions.create(
        model="second", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, temperature=0
    )
    assert chat.model == "second"

    assert served.get("/v1/models/first", headers=KEY).json()["config"]["max_adapters"] == 2
    deleted = served_delete(served, "second")
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, True)
    refused = served.post("/v1/completions", {"model": "second", "prompt": "x"}, headers=KEY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "'smollm', 'first'" in refused.json()["error"]["message"]
    assert served_delete(served, "second").status_code == 404


def served_delete(served, name: str):
    return httpx.delete(f"{served.url}/v1/adapters/{name}", headers=KEY, timeout=60)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"name": "first", "path": "FIRST"}, 409, "'first'"),
        ({"name": "smollm", "path": "FIRST"}, 409, "'smollm'"),
        ({"name": "x", "path": "/nowhere"}, 400, "no folder"),
        ({"name": "x", "path": "hf:org/name"}, 400, "no folder"),
        ({"name": "x", "path": "/"}, 400, "adapter_config.json"),
        ({"name": "a b", "path": "FIRST"}, 400, "'a b'"),
        ({"name": "x"}, 400, "path"),
    ],
)
def test_what_can_not_be_added_is_refused(served, folders, body, status, text):
    body = {key: str(folders["first"]) if value == "FIRST" else value for key, value in body.items()}
    found = served.post("/v1/adapters", body, headers=KEY)
    assert found.status_code == status
    assert text in found.json()["error"]["message"]


def test_a_server_without_room_says_so(served, folders):
    for name in ("one", "two"):
        found = served.post("/v1/adapters", {"name": name, "path": str(folders["first"])}, headers=KEY)
    assert (found.status_code, found.json()["error"]["code"]) == (409, "no_room")
    assert served_delete(served, "one").status_code == 200


def test_without_a_key_requests_change_nothing_unless_it_is_allowed(llm, serving, folders):
    body = {"name": "more", "path": str(folders["second"])}
    with serving(llm) as open_to_all:
        assert open_to_all.get("/v1/adapters").status_code == 200
        found = open_to_all.post("/v1/adapters", body)
        assert (found.status_code, found.json()["error"]["code"]) == (403, "forbidden")
        assert served_delete(open_to_all, "first").status_code == 403
    with serving(llm, ServerConfig(adapter_changes=True)) as allowed:
        assert allowed.post("/v1/adapters", body).status_code == 200
        assert served_delete(allowed, "more").status_code == 200


def test_a_model_without_room_for_adapters_says_so(null_llm, serving, folders):
    with serving(null_llm, ServerConfig(adapter_changes=True)) as null:
        found = null.post("/v1/adapters", {"name": "x", "path": str(folders["first"])})
    assert found.status_code == 400
    assert "max_adapters" in found.json()["error"]["message"]
