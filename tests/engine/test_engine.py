"""The loop: every request ends exactly once, whatever the runner or the callers do."""

from __future__ import annotations

import collections
import threading
import time

import pytest

from turbolm.engine.engine import Engine
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import Step, StepResult
from turbolm.errors import CapacityError, EngineError
from turbolm.types import Output, Request, SamplingParams


class CountingRunner:
    """Answers with the position; fails in the steps where `fails` says so."""

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.delay = 0.0

    def run(self, step: Step) -> list[StepResult]:
        time.sleep(self.delay)
        for item in step.items:
            if item.sequence.request.id in self.fails:
                raise RuntimeError("the device is on fire")
        return [StepResult((len(item.sequence.token_ids),) if item.samples else ()) for item in step.items]


class Sink:
    def __init__(self) -> None:
        self.outputs: dict[str, list[Output]] = collections.defaultdict(list)
        self.final = threading.Semaphore(0)

    def __call__(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.outputs[output.request_id].append(output)
            if output.is_final:
                self.final.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.final.acquire(timeout=20), "a request never ended"


def engine(runner: CountingRunner, sink: Sink, **limits: int) -> tuple[Engine, Scheduler]:
    sizes = {"num_blocks": 64, "block_size": 8, "max_batch_size": 8, "max_batch_tokens": 64, "max_logit_rows": 64}
    scheduler = Scheduler(**(sizes | {"max_context": 128, "max_waiting": 1000} | limits))
    return Engine(scheduler, runner, sink), scheduler


def request(name: str, max_tokens: int = 5) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens))


def test_requests_of_many_threads_each_end_once() -> None:
    sink = Sink()
    subject, scheduler = engine(CountingRunner(), sink)
    names = [f"{t}-{i}" for t in range(4) for i in range(25)]
    threads = [
        threading.Thread(target=lambda t=t: [subject.submit([request(f"{t}-{i}")]) for i in range(25)])
        for t in range(4)
    ]
    for thread in threads:
        thread.start()
    sink.wait(100)
    assert sorted(sink.outputs) == sorted(names)
    for outputs in sink.outputs.values():
        assert Output.collect(outputs).token_ids == (3, 4, 5, 6, 7)
        assert [output.is_final for output in outputs].count(True) == 1
    assert scheduler.stats.num_used_blocks == 0
    subject.close()


def test_a_failed_step_ends_its_requests_and_nothing_else() -> None:
    sink, runner = Sink(), CountingRunner()
    subject, scheduler = engine(runner, sink)
    runner.fails.add("bad")
    subject.submit([request("bad")])
    sink.wait(1)
    error = sink.outputs["bad"][-1].error
    assert isinstance(error, EngineError)
    assert "on fire" in str(error)
    subject.submit([request("good")])
    sink.wait(1)
    assert sink.outputs["good"][-1].finish_reason == "length"
    assert scheduler.stats.num_used_blocks == 0
    subject.close()


def test_refused_requests_get_their_error_as_output() -> None:
    sink, runner = Sink(), CountingRunner()
    runner.delay = 0.05
    subject, _ = engine(runner, sink, max_waiting=2, max_batch_size=1)
    subject.submit([request(f"r{i}") for i in range(4)])
    sink.wait(4)
    errors = [outputs[-1].error for outputs in sink.outputs.values() if outputs[-1].error]
    assert errors
    assert all(isinstance(error, CapacityError) for error in errors)
    subject.close()


def test_cancel_ends_a_request_once_and_unknown_ones_not_at_all() -> None:
    sink, runner = Sink(), CountingRunner()
    runner.delay = 0.01
    subject, _ = engine(runner, sink)
    subject.submit([request("long", 100), request("other", 20)])
    subject.cancel("long")
    subject.cancel("long")
    subject.cancel("unknown")
    sink.wait(2)
    assert [o.finish_reason for o in sink.outputs["long"] if o.is_final] == ["cancelled"]
    assert sink.outputs["other"][-1].finish_reason == "length"
    assert "unknown" not in sink.outputs
    subject.close()


def test_closing_ends_what_is_left() -> None:
    sink, runner = Sink(), CountingRunner()
    runner.delay = 0.01
    subject, scheduler = engine(runner, sink)
    subject.submit([request(f"r{i}", 100) for i in range(20)])
    subject.close()
    subject.close()
    sink.wait(20)
    assert len(sink.outputs) == 20
    assert scheduler.stats.num_used_blocks == 0
    with pytest.raises(EngineError, match="closed"):
        subject.submit([request("late")])


def test_an_idle_engine_uses_no_processor_time() -> None:
    subject, _ = engine(CountingRunner(), Sink())
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    subject.close()
