"""The page over HTTP, used through Gradio's own client."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AuthenticationError

from turbolm.llm import AsyncLLM
from turbolm.remote import RemoteLLM
from turbolm.types import Output, SamplingParams
from turbolm.ui.chat import Chat
from turbolm.ui.controls import NAMES

GREEDY = SamplingParams(temperature=0)


def row(text):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def values(**given):
    return [given.get(name, "") for name in NAMES]


def said(rows):
    return ["".join(piece["text"] for piece in row["content"]) for row in rows]


def null():
    return Chat(AsyncLLM("null", progress=False, max_context=20_000), GREEDY)


def connect(address, **options):
    return Client(address, verbose=False, analytics_enabled=False, **options)


def wait_until(condition):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, "it doesn't happen"
        time.sleep(0.02)


def test_users_have_conversations_of_their_own_at_once(serve_page):
    address = serve_page(null())
    users = [connect(address) for _ in range(3)]
    jobs = [
        user.submit([row(f"I am user {i}")], "", *values(max_tokens=str(40 + i)), api_name="/answer")
        for i, user in enumerate(users)
    ]
    for i, job in enumerate(jobs):
        rows, status = job.result(timeout=30)
        assert said(rows)[0] == f"I am user {i}"
        assert len(said(rows)[1]) == 40 + i
        assert status.startswith(f"{40 + i} tokens")


def test_stop_frees_the_request(serve_page):
    chat = null()
    stats = chat.engine
    client = connect(serve_page(chat))
    job = client.submit([row("go on")], "", *values(), api_name="/answer")
    wait_until(lambda: stats.stats.num_used_blocks > 0 and job.outputs())
    job.cancel()
    wait_until(lambda: stats.stats.num_used_blocks == 0)
    assert len(said(client.predict([row("again")], "", *values(max_tokens="5"), api_name="/answer")[0])[1]) == 5


def test_a_real_model_reads_the_whole_conversation(serve_page, smollm2_path):
    engine = AsyncLLM(str(smollm2_path), progress=False, max_context=1024)
    client = connect(serve_page(Chat(engine, GREEDY)))
    rows, _ = client.predict([row("Hi! My name is Ada.")], "", *values(max_tokens="20"), api_name="/answer")
    rows, _ = client.predict([*rows, row("What is my name?")], "", *values(max_tokens="20"), api_name="/answer")
    first, answer, second, last = said(rows)
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, (first, answer, second), strict=True)]
    params = SamplingParams(temperature=0, max_tokens=20)

    async def directly():
        return Output.collect([output async for output in engine.chat(messages, params)]).text

    assert last == asyncio.run(directly())


def test_white_space_is_kept(serve_page, toy):
    engine = RemoteLLM(toy.url)
    client = connect(serve_page(Chat(engine, engine.default_params)))
    code = "def f():\n    if x:\n        return 1\n"
    rows, _ = client.predict([row(code)], "", *values(), api_name="/answer")
    client.predict([*rows, row("again")], "", *values(), api_name="/answer")
    first, second = (body["messages"] for body in toy.bodies)
    assert first[0]["content"] == second[0]["content"] == code
    assert second[1]["content"].startswith(f"You said: {code}")


def test_a_server_behind_the_page(serve_page, toy):
    engine = RemoteLLM(toy.url)
    client = connect(serve_page(Chat(engine, engine.default_params)))
    rows, status = client.predict([row("think")], "Be brief.", *values(), api_name="/answer")
    assert said(rows) == ["think", "First I consider. Then I decide. ", "Decided."]
    assert "context 17 of 1000" in status
    assert toy.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    rows, _ = client.predict([row("refuse")], "", *values(), api_name="/answer")
    assert "this prompt is refused" in said(rows)[1]


def test_only_users_with_their_password_come_in(serve_page):
    address = serve_page(null(), users={"ada": "kept:secret", "bo": "ß"})
    for auth in (None, ("ada", "wrong"), ("eve", "kept:secret"), ("eve", "")):
        with pytest.raises((AuthenticationError, ValueError)):
            connect(address, auth=auth)
    assert httpx.get(f"{address}config").status_code == 401
    assert connect(address, auth=("ada", "kept:secret"))
    assert connect(address, auth=("bo", "ß"))


def test_nothing_comes_from_elsewhere_and_no_files_come_in(serve_page):
    address = serve_page(null(), system="Be kind.")
    page = httpx.get(address)
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "Be kind." in page.text
    refused = httpx.post(f"{address}gradio_api/upload", files={"files": b"x"})
    assert (refused.status_code, refused.text) == (403, "this page takes no files")
    assert httpx.post(f"{address}gradio_api/queue/join", content=b"x" * (17 << 20)).status_code == 413
    assert httpx.post(f"{address}gradio_api/queue/join", content=iter([b"x"])).status_code == 411
    for path in ("/etc/passwd", "pyproject.toml"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)
