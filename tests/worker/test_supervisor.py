"""An engine process that dies, hangs or fails, and what becomes of its requests."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from turbolm.config import EngineConfig
from turbolm.errors import CapacityError, ConfigError, EngineError, ModelNotFoundError, RequestError
from turbolm.types import Output, Request, SamplingParams
from turbolm.worker.supervisor import SupervisedEngine, Supervision

TOY = (sys.executable, str(Path(__file__).parent / "toy_worker.py"))
KILL, HANG, BREAK = 1, 2, 3


class Answers:
    """Collects outputs; the last one of each request is checked to be the only one."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Output]] = collections.defaultdict(list)
        self.changed = threading.Condition()

    def __call__(self, outputs) -> None:
        with self.changed:
            for output in outputs:
                key = f"{output.request_id}/{output.index}"
                assert not self.is_over(key), "an output after the last"
                self.outputs[key].append(output)
            self.changed.notify_all()

    def is_over(self, key: str) -> bool:
        return bool(self.outputs[key]) and self.outputs[key][-1].is_final

    def await_end(self, *names: str, seconds: float = 20) -> list[Output]:
        with self.changed:
            keys = [f"{name}/0" for name in names]
            assert self.changed.wait_for(lambda: all(map(self.is_over, keys)), seconds), dict(self.outputs)
            return [Output.collect(self.outputs[key]) for key in keys]

    def await_first(self, name: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.outputs[f"{name}/0"], 20)


@contextlib.contextmanager
def engine(model: str = "toy", **options: float):
    answers = Answers()
    supervised = SupervisedEngine(
        model, EngineConfig(), False, answers, Supervision(**{"step_timeout": 20.0, **options}), TOY
    )
    try:
        supervised.wait_until_loaded()
        yield supervised, answers
    finally:
        supervised.close()


def request(name: str, *prompt: int, tokens: int = 5, **options) -> Request:
    return Request(name, prompt or (50, 51), SamplingParams(max_tokens=tokens, **options))


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared():
    with engine() as found:
        yield found


def test_answers_are_those_of_an_engine(shared):
    supervised, answers = shared
    assert (supervised.name, supervised.path, supervised.config.max_context) == ("toy/toy", None, 4096)
    supervised.submit([request("a"), request("b", 60, logprobs=None)])
    supervised.submit([request("whole")], deltas=False)
    a, b, whole = answers.await_end("a", "b", "whole")
    assert (len(a.token_ids), a.finish_reason, a.usage.prompt_tokens) == (5, "length", 2)
    assert b.token_ids != a.token_ids
    assert whole.token_ids == a.token_ids
    assert (len(answers.outputs["a/0"]), len(answers.outputs["whole/0"])) == (5, 1)
    assert supervised.wait_until_warm(20)
    stats = supervised.stats
    assert (stats.num_used_blocks, stats.num_blocks, stats.num_restarts) == (0, 256, 0)
    assert stats.num_steps >= 5


def test_cancelling_ends_a_request_here_and_there(shared):
    supervised, answers = shared
    supervised.submit([request("long", tokens=1900)])
    answers.await_first("long")
    supervised.cancel("long")
    supervised.cancel("unknown")
    (output,) = answers.await_end("long")
    assert output.finish_reason == "cancelled"
    assert len(output.token_ids) < 1900
    wait_until(lambda: supervised.stats.num_used_blocks == 0)


def test_a_request_that_the_engine_refuses_ends_with_its_error(shared):
    supervised, answers = shared
    supervised.submit([request("huge", *[5] * 2000, tokens=100)])
    supervised.submit([request("endless", *[5] * 2100, tokens=1)])
    (output,) = answers.await_end("endless")
    assert "context" in str(output.error)
    with pytest.raises(RequestError, match="another id"):
        supervised.submit([request("twice"), request("twice")])
    answers.await_end("huge")


def test_a_killed_process_is_replaced_and_its_requests_tried_again(caplog):
    with engine() as (supervised, answers):
        supervised.submit([request(f"sent{i}", tokens=1500) for i in range(4)])
        supervised.submit([request(f"unsent{i}", tokens=300) for i in range(4)], deltas=False)
        supervised.submit([request(f"waiting{i}") for i in range(20)])
        answers.await_first("sent3")
        first = supervised.worker_pid
        os.kill(first, signal.SIGKILL)
        for output in answers.await_end("sent0", "sent1", "sent2", "sent3"):
            assert "killed by SIGKILL in the middle" in str(output.error)
            assert output.usage.completion_tokens == len(output.token_ids) > 0
        whole = answers.await_end(*(f"unsent{i}" for i in range(4)))
        assert {(len(output.token_ids), output.finish_reason) for output in whole} == {(300, "length")}
        waited = answers.await_end(*(f"waiting{i}" for i in range(20)))
        assert {output.finish_reason for output in waited} == {"length"}
        assert supervised.worker_pid != first
        assert supervised.stats.num_restarts == 1
        assert supervised.trouble is None
        wait_until(lambda: supervised.stats.num_used_blocks == 0)
    assert f"process {first} was killed by SIGKILL" in caplog.text
    assert "of its 28 requests 4 end with it" in caplog.text


def test_requests_wait_while_there_is_no_process(monkeypatch):
    with engine() as (supervised, answers):
        monkeypatch.setattr(supervised, "_command", (sys.executable, "-c", "raise SystemExit(9)"))
        os.kill(supervised.worker_pid, signal.SIGKILL)
        wait_until(lambda: supervised.trouble is not None)
        assert "SIGKILL" in supervised.trouble or "status 9" in supervised.trouble
        supervised.submit([request("patient"), request("impatient")])
        supervised.cancel("impatient")
        assert answers.await_end("impatient")[0].finish_reason == "cancelled"
        monkeypatch.setattr(supervised, "_command", TOY)
        assert answers.await_end("patient")[0].finish_reason == "length"


def test_a_request_that_kills_twice_is_not_tried_again_and_the_others_are():
    with engine() as (supervised, answers):
        supervised.submit([request("innocent"), request("killer", KILL, 7), request("bystander")], deltas=False)
        (killer,) = answers.await_end("killer")
        assert isinstance(killer.error, EngineError)
        assert all(word in str(killer.error) for word in ("2 times", "'killer'", "SIGKILL"))
        supervised.submit([request("later")])
        ended = answers.await_end("innocent", "bystander", "later")
        assert [output.finish_reason for output in ended] == ["length"] * 3
        assert supervised.stats.num_restarts == 2


def test_a_process_that_hangs_is_killed():
    with engine(step_timeout=0.5) as (supervised, answers):
        supervised.submit([request("hang", HANG)])
        (output,) = answers.await_end("hang")
        assert "no step for 0.5 s" in str(output.error)
        supervised.submit([request("after")])
        answers.await_end("after")


def test_a_stopped_process_counts_as_hanging():
    with engine(step_timeout=0.5) as (supervised, answers):
        time.sleep(0.8)
        assert supervised.stats.num_restarts == 0, "an idle engine makes no steps, and is well"
        os.kill(supervised.worker_pid, signal.SIGSTOP)
        supervised.submit([request("patient")])
        assert answers.await_end("patient")[0].finish_reason == "length"
        assert supervised.stats.num_restarts == 1


def test_failing_steps_end_their_requests_and_in_a_row_the_process(caplog):
    with engine() as (supervised, answers):
        for number in range(2):
            supervised.submit([request(f"broken{number}", BREAK)])
            assert "a device error" in str(answers.await_end(f"broken{number}")[0].error)
        assert supervised.stats.num_restarts == 0
        supervised.submit([request("third", BREAK)])
        (output,) = answers.await_end("third")  # as the first of a fresh process
        assert "a device error" in str(output.error)
        assert supervised.stats.num_restarts == 1
    assert "ended with status 4" in caplog.text
    assert "RuntimeError: a device error" in caplog.text


@pytest.mark.parametrize(
    ("model", "kind", "text"),
    [
        ("missing", ModelNotFoundError, "no model 'missing'"),
        ("too-large", CapacityError, "too large"),
        ("crash", EngineError, r"killed by SIGSEGV before 'crash' was loaded"),
        ("bug", EngineError, r"(?s)status 4 before 'bug' was loaded.*ZeroDivisionError: a bug in loading"),
    ],
)
def test_what_prevents_loading_is_raised_as_it_would_be_here(model, kind, text):
    with pytest.raises(kind, match=text), engine(model):
        pass


def test_a_missing_interpreter_is_an_error():
    supervised = SupervisedEngine("toy", EngineConfig(), False, Answers(), command=("/nothing/python",))
    with pytest.raises(EngineError, match="can't be started"):
        supervised.wait_until_loaded()


def test_restarts_have_a_limit(tmp_path, caplog):
    with engine(f"once:{tmp_path / 'marker'}", max_restarts=1) as (supervised, answers):
        supervised.submit([request("a", tokens=1900)])
        answers.await_first("a")
        supervised.submit([request(f"unsent{i}", tokens=1900) for i in range(10)], deltas=False)
        os.kill(supervised.worker_pid, signal.SIGKILL)
        answers.await_end("a", *(f"unsent{i}" for i in range(10)))
        assert "no memory left" in str(answers.await_end("unsent0")[0].error)
        wait_until(lambda: supervised.is_given_up)
        with pytest.raises(EngineError, match="given up"):
            supervised.submit([request("late")])
    assert "failed 2 times in a row" in caplog.text


def test_closing_ends_requests_and_the_process():
    with engine() as (supervised, answers):
        supervised.submit([request("a", tokens=1900), request("hang", HANG)])
        process = psutil.Process(supervised.worker_pid)
        started = time.monotonic()
        supervised.close()
        assert time.monotonic() - started < 10
        assert not process.is_running()
        assert "closed" in str(answers.await_end("a")[0].error)
        assert "closed" in str(answers.await_end("hang")[0].error)
        with pytest.raises(EngineError, match="closed"):
            supervised.submit([request("late")])
        supervised.close()


def test_the_process_ends_with_its_parent():
    """Even where it is busy for ever, and the parent had no time for a word."""
    script = f"""
import sys, time
from turbolm.config import EngineConfig
from turbolm.types import Request
from turbolm.worker.supervisor import SupervisedEngine
engine = SupervisedEngine("toy", EngineConfig(), False, lambda outputs: None, command={TOY!r})
engine.wait_until_loaded()
engine.submit([Request("hang", ({HANG},))])
print(engine.worker_pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.kill()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 10)


def test_the_log_of_the_process_is_written_here(caplog):
    with caplog.at_level(logging.INFO), engine() as (supervised, answers):
        supervised.submit([request("broken", BREAK)])
        answers.await_end("broken")
        wait_until(lambda: "a step failed" in caplog.text)
    assert [record.name for record in caplog.records if "a step failed" in record.getMessage()] == [
        "turbolm.engine.engine"
    ]


@pytest.mark.parametrize("options", [{"step_timeout": -1}, {"step_timeout": "x"}, {"max_restarts": 1.5}])
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Supervision(**options)
