"""The loop: every request ends exactly once, whatever the runner or the callers do."""

from __future__ import annotations

import collections
import dataclasses
import gc
import threading
import time

import pytest

from turbolm.engine.engine import Engine
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import Step, StepResult
from turbolm.errors import CapacityError, EngineError
from turbolm.types import Output, Request, SamplingParams, Usage


class CountingRunner:
    """Answers with the position; fails in the steps where `fails` says so."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.num_replays = 7
        self.fails: dict[str, str] = {}  # request id → "submit" or "results"
        self.delay = 0.0
        self.events: list[str] = []
        self.steps: list[Step] = []
        self.num_in_flight = 0
        self.num_warm_ups = 0
        self.warm_up_breaks_at = 0

    def warm_up(self) -> bool:
        self.num_warm_ups += 1
        assert not self.num_in_flight
        if self.num_warm_ups == self.warm_up_breaks_at:
            raise RuntimeError("no memory for a graph")
        return self.num_warm_ups < 3

    def close(self) -> None:
        assert not self.num_in_flight

    def submit(self, step: Step) -> Counted:
        self._break("submit", step)
        self.events.append("submit")
        self.steps.append(step)
        self.num_in_flight += 1
        assert self.num_in_flight <= self.depth
        return Counted(self, step)

    def results(self, step: Step) -> list[StepResult]:
        self.events.append("results")
        self.num_in_flight -= 1
        time.sleep(self.delay)
        self._break("results", step)
        return [StepResult((item.start + item.num_new_tokens,) if item.samples else ()) for item in step.items]

    def _break(self, when: str, step: Step) -> None:
        for item in step.items:
            if self.fails.get(item.sequence.request.id) == when:
                raise RuntimeError("the device is on fire")


class Counted:
    def __init__(self, runner: CountingRunner, step: Step) -> None:
        self._runner, self._step = runner, step

    def results(self) -> list[StepResult]:
        return self._runner.results(self._step)


@pytest.fixture(params=[1, 2, 3])
def runner(request: pytest.FixtureRequest) -> CountingRunner:
    """With so many steps in flight."""
    return CountingRunner(request.param)


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


def request(name: str, max_tokens: int = 5, **params: object) -> Request:
    return Request(name, (1, 2, 3), SamplingParams(max_tokens=max_tokens, **params))


def test_requests_of_many_threads_each_end_once(runner: CountingRunner) -> None:
    sink = Sink()
    subject, scheduler = engine(runner, sink)
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
    assert subject.stats == dataclasses.replace(scheduler.stats, num_replays=runner.num_replays)
    subject.close()


@pytest.mark.parametrize("when", ["submit", "results"])
def test_a_failed_step_ends_its_requests_and_nothing_else(runner: CountingRunner, when: str) -> None:
    sink = Sink()
    subject, scheduler = engine(runner, sink)
    runner.fails["bad"] = when
    subject.submit([request("bad")])
    sink.wait(1)
    error = sink.outputs["bad"][-1].error
    assert isinstance(error, EngineError)
    assert "on fire" in str(error)
    subject.submit([request("good")])
    sink.wait(1)
    assert sink.outputs["good"][-1].finish_reason == "length"
    subject.close()
    assert [len(outputs) for outputs in sink.outputs.values()] == [1, 5]
    assert scheduler.stats.num_used_blocks == 0


@pytest.mark.parametrize("when", ["submit", "results"])
def test_a_failure_leaves_those_in_other_steps_alone(when: str) -> None:
    """Of three steps in flight, the middle one fails, or the last isn't taken: the first's results still count."""
    sink, runner = Sink(), CountingRunner(depth=3)
    runner.delay = 0.01
    subject, scheduler = engine(runner, sink, max_batch_tokens=8, max_batch_size=4)
    runner.fails["second"] = when
    subject.submit([Request(name, (1,) * 8, SamplingParams(max_tokens=1)) for name in ("first", "second", "third")])
    sink.wait(3)
    assert sink.outputs["first"][-1].token_ids == sink.outputs["third"][-1].token_ids == (8,)
    assert sink.outputs["second"][-1].finish_reason == "error"
    subject.close()
    assert scheduler.stats.num_used_blocks == 0


def test_the_next_step_is_submitted_before_the_results_of_the_last_are_awaited() -> None:
    sink, runner = Sink(), CountingRunner(depth=2)
    subject, _ = engine(runner, sink)
    subject.submit([request("a")])
    sink.wait(1)
    subject.close()
    assert runner.events == ["submit"] + ["submit", "results"] * 4 + ["results"]
    assert [step.items[0].follows for step in runner.steps] == [False] + [True] * 4
    assert Output.collect(sink.outputs["a"]).token_ids == (3, 4, 5, 6, 7)


def test_at_depth_one_each_step_has_its_results_before_the_next() -> None:
    sink, runner = Sink(), CountingRunner(depth=1)
    subject, _ = engine(runner, sink)
    subject.submit([request("a")])
    sink.wait(1)
    subject.close()
    assert runner.events == ["submit", "results"] * 5
    assert not any(item.follows for step in runner.steps for item in step.items)


def test_a_token_computed_after_the_end_is_never_seen() -> None:
    sink, runner = Sink(), CountingRunner(depth=2)
    subject, scheduler = engine(runner, sink)
    subject.submit([request("a", 100, stop_token_ids=(5,))])
    sink.wait(1)
    subject.close()
    assert len(runner.steps) == 4  # the last computed the stop token, for nothing
    output = Output.collect(sink.outputs["a"])
    assert (output.token_ids, output.stop, output.usage) == ((3, 4), 5, Usage(3, 3))
    assert scheduler.stats.num_used_blocks == 0


def test_without_deltas_there_is_one_output_with_all(runner: CountingRunner) -> None:
    sink = Sink()
    subject, _ = engine(runner, sink)
    subject.submit([request("whole"), request("stopped", stop_token_ids=(6,))], deltas=False)
    subject.submit([request("deltas")])
    sink.wait(3)
    subject.close()
    (whole,), (stopped,) = sink.outputs["whole"], sink.outputs["stopped"]
    assert whole == Output.collect(sink.outputs["deltas"])._replace(request_id="whole")
    assert (stopped.token_ids, stopped.stop) == ((3, 4, 5), 6)
    assert len(sink.outputs["deltas"]) == 5


def test_refused_requests_get_their_error_as_output(runner: CountingRunner) -> None:
    sink = Sink()
    runner.delay = 0.05
    subject, _ = engine(runner, sink, max_waiting=2, max_batch_size=1)
    subject.submit([request(f"r{i}") for i in range(4)])
    sink.wait(4)
    errors = [outputs[-1].error for outputs in sink.outputs.values() if outputs[-1].error]
    assert errors
    assert all(isinstance(error, CapacityError) for error in errors)
    subject.close()


def test_cancel_ends_a_request_once_and_unknown_ones_not_at_all(runner: CountingRunner) -> None:
    sink = Sink()
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


def test_closing_ends_what_is_left(runner: CountingRunner) -> None:
    sink = Sink()
    runner.delay = 0.01
    subject, scheduler = engine(runner, sink)
    subject.submit([request(f"r{i}", 100) for i in range(20)])
    subject.close()
    subject.close()
    sink.wait(20)
    assert len(sink.outputs) == 20
    assert runner.num_in_flight == 0  # the device is at rest
    assert scheduler.stats.num_used_blocks == 0
    with pytest.raises(EngineError, match="closed"):
        subject.submit([request("late")])


@pytest.mark.parametrize("own", [(0, 10, 10), (50_000, 5, 100)])
def test_a_program_may_look_for_garbage_less_often(own: tuple[int, int, int]) -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(*own)
        engine(CountingRunner(1), Sink())[0].close()
        assert gc.get_threshold()[0] == own[0]
        assert gc.get_threshold()[2] == own[2]
    finally:
        gc.set_threshold(*before)


def test_hundreds_of_sequences_at_work_set_off_no_search_of_all_objects() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(700, 10, 10)
        runner, sink = CountingRunner(2), Sink()
        subject = Engine(Scheduler(4000, 4, 400, 4000, 64, 400), runner, sink)
        searches = [generation["collections"] for generation in gc.get_stats()]
        subject.submit([Request(str(number), (1, 2), SamplingParams(max_tokens=40)) for number in range(400)], False)
        for _ in range(400):
            assert sink.final.acquire(timeout=30)
        assert gc.get_stats()[2]["collections"] == searches[2]
        assert gc.get_stats()[0]["collections"] < searches[0] + 10
        subject.close()
    finally:
        gc.set_threshold(*before)


def test_an_idle_engine_uses_no_processor_time() -> None:
    subject, _ = engine(CountingRunner(depth=2), Sink())
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    subject.close()


@pytest.mark.parametrize("breaks_at", [0, 2])
def test_steps_are_prepared_while_there_is_nothing_to_do(breaks_at: int) -> None:
    runner, sink = CountingRunner(2), Sink()
    runner.warm_up_breaks_at = breaks_at
    engine = Engine(Scheduler(8, 4, 4, 16, 32, 8), runner, sink)
    try:
        assert engine.wait_until_warm(10)
        assert runner.num_warm_ups == (breaks_at or 3)
        engine.submit([Request("a", (1, 2), SamplingParams(max_tokens=3))])
        assert sink.final.acquire(timeout=10)
        assert sink.outputs["a"][-1].finish_reason == "length"
        assert runner.num_warm_ups == (breaks_at or 3)  # never again
    finally:
        engine.close()
