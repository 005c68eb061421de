from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn

from turbolm.ui.app import create_app, listen
from turbolm.ui.chat import Chat


@contextlib.contextmanager
def serving(chat: Chat, **options: object) -> Iterator[str]:
    """The page over HTTP; its address."""
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(chat, **options), log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the page doesn't start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


@pytest.fixture
def serve_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """`serve_page(chat, **options)` → address; ends with the test, and closes the chat's engine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with contextlib.ExitStack() as stack:
        yield lambda chat, **options: stack.enter_context(serving(chat, **options))
