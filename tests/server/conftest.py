from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import httpx
import openai
import pytest
import uvicorn
from hypothesis import settings

from turbolm import AsyncLLM, loading
from turbolm.engine.step import StepResult
from turbolm.server.app import make_app
from turbolm.server.config import ServerConfig
from turbolm.server.protocol import BoundedProtocol
from turbolm.server.service import Service
from turbolm.server.shadow import Shadow
from turbolm.text import ChatTemplate

settings.register_profile("thorough", max_examples=3000)  # --hypothesis-profile=thorough

HERMES = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> "
    'answer with <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@dataclass
class Served:
    url: str
    service: Service

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: object, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **options)  # type: ignore[arg-type]

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(
    llm: AsyncLLM, config: ServerConfig | None = None, keys: tuple[bytes, ...] = (), *, shadow: Shadow | None = None
) -> Iterator[Served]:
    """A server in a thread of the test."""
    service = Service(llm, config or ServerConfig(), keys)
    if shadow is not None:
        service.start_shadow(shadow)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(make_app(service), http=BoundedProtocol, ws="none", log_config=None, access_log=False)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()


def wait_until_true(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


@pytest.fixture(name="serving", scope="session")
def serving_fixture():
    return serving


@pytest.fixture(scope="session")
def wait_until():
    return wait_until_true


@pytest.fixture(scope="session")
def hermes() -> str:
    """A chat template with a place for tools."""
    return HERMES


@pytest.fixture(scope="session")
def null_llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("null", progress=False, max_context=2048)
    yield llm
    asyncio.run(llm.close())


@pytest.fixture(scope="session")
def null(null_llm) -> Iterator[Served]:
    with serving(null_llm, ServerConfig(adapter_changes=True)) as served:
        yield served


@pytest.fixture(scope="session")
def smollm(smollm2_path) -> Iterator[Served]:
    llm = AsyncLLM(str(smollm2_path), progress=False)
    with serving(llm, ServerConfig(served_name="smollm")) as served:
        yield served
    asyncio.run(llm.close())


class ScriptRunner:
    """A runner whose answers are a given text, token by token."""

    depth = 1
    num_replays = 0

    def __init__(self) -> None:
        self.script: list[int] = []

    def submit(self, step):
        self.step = step
        return self

    def results(self):
        return [StepResult((self._next(item),) if item.samples else ()) for item in self.step.items]

    def warm_up(self):
        return False

    def close(self):
        pass

    def _next(self, item) -> int:
        position = item.start + item.num_new_tokens - item.sequence.num_prompt
        return self.script[position] if position < len(self.script) else 257


@pytest.fixture
def scripted(monkeypatch):
    """A server with tools and reasoning whose model says what it's told: `scripted.say(text)`."""
    runner = ScriptRunner()
    build = loading.build_null
    monkeypatch.setattr(loading, "build_null", lambda config: replace(build(config), runner=runner))
    llm = AsyncLLM("null", progress=False, max_context=2048, speculation="off")
    llm._model = replace(llm._model, eos_token_ids=(257,))
    llm.chat_template = ChatTemplate(HERMES)
    with serving(llm) as served:
        served.say = lambda text: setattr(runner, "script", llm.tokenizer.encode(text, add_special=False))
        yield served
    asyncio.run(llm.close())
