"""Adapters of an engine in another process: they outlive it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from turbolm.config import EngineConfig
from turbolm.errors import EngineError, ModelNotFoundError, RequestError
from turbolm.types import Output, Request, SamplingParams
from turbolm.worker.supervisor import SupervisedEngine, Supervision

TOY = (sys.executable, str(Path(__file__).parent / "toy_worker.py"))


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "adapter").mkdir()
    return str(tmp_path / "adapter")


def last_output(engine: SupervisedEngine, ended: dict[str, Output], name: str, adapter: str) -> Output:
    engine.submit([Request(name, (50, 51), SamplingParams(max_tokens=3), adapter=adapter)], deltas=False)
    for _ in range(2000):
        if name in ended:
            return ended[name]
        threading.Event().wait(0.01)
    raise AssertionError("the request has no end")


def test_processes_that_come_later_have_the_adapters_of_those_before(source: str) -> None:
    ended: dict[str, Output] = {}

    def deliver(outputs) -> None:
        ended.update({output.request_id: output for output in outputs if output.is_final})

    config = EngineConfig(adapters={"first": source}, max_adapters=3)
    engine = SupervisedEngine("toy", config, False, deliver, Supervision(), TOY)
    try:
        engine.wait_until_loaded()
        engine.add_adapter("second", source)
        with pytest.raises(ModelNotFoundError, match="no adapter '/nowhere'"):
            engine.add_adapter("third", "/nowhere")
        engine.remove_adapter("first")
        with pytest.raises(RequestError, match="'first'"):
            engine.remove_adapter("first")
        assert last_output(engine, ended, "a", "second").finish_reason == "length"

        os.kill(engine.worker_pid, signal.SIGKILL)
        assert last_output(engine, ended, "b", "second").finish_reason == "length"
        assert isinstance(last_output(engine, ended, "c", "first").error, RequestError)
        assert isinstance(last_output(engine, ended, "d", "third").error, RequestError)
        assert engine.stats.num_restarts == 1
    finally:
        engine.close()
    with pytest.raises(EngineError):
        engine.add_adapter("fourth", source)
