"""From the engine's thread to those who wait: nothing is lost, cut or doubled, however busy they are."""

from __future__ import annotations

import asyncio
import gc

import pytest

from turbolm.delivery import Answers, Delivery, complete
from turbolm.errors import DeadlineError, EngineError
from turbolm.stream import AnswerStream
from turbolm.text import PartParser, byte_tokenizer
from turbolm.types import Output, Request, SamplingParams, TokenLogprob, Usage


class FakeEngine:
    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.calls: list[list[str]] = []  # ids of the requests of each submission
        self.cancelled: list[tuple[str, int]] = []
        self.error: EngineError | None = None

    def submit(self, requests, deltas=True):
        if self.error:
            raise self.error
        self.submitted += requests
        self.calls.append([f"{request.id}{request.index}" for request in requests])

    def cancel(self, request_id, index=0):
        self.cancelled.append((request_id, index))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def delivery() -> Delivery:
    return Delivery()


@pytest.fixture
def make(engine, delivery):
    tokenizer = byte_tokenizer()
    kept: list[Answers] = []

    def answers(name: str = "r", count: int = 1, prompt_parser=PartParser, keep: bool = True, timeout=None) -> Answers:
        params = SamplingParams(timeout=timeout)
        requests = [Request(name, (1,), params, index=index) for index in range(count)]
        streams = [AnswerStream(request, tokenizer, prompt_parser, is_continuation=True) for request in requests]
        found = Answers(engine, delivery, requests, streams, True)
        if keep:
            kept.append(found)
        return found

    return answers


def delta(text: str, index: int = 0, name: str = "r") -> Output:
    return Output(name, index, tuple(text.encode()), logprobs=tuple(TokenLogprob(ord(c), -1.0, 1) for c in text))


def last(text: str = "", index: int = 0, name: str = "r") -> Output:
    return Output(name, index, tuple(text.encode()), finish_reason="length", usage=Usage(1, 2))


async def let_run() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_what_piles_up_comes_as_one(make, delivery):
    async def scene():
        found: list[Output] = []
        make(count=2).begin(found.append)
        for step in ([delta("a"), delta("x", 1)], [delta("b")], [delta("cé"), delta("y", 1)]):
            delivery.deliver(step)
        await let_run()
        assert [(output.index, output.text) for output in found] == [(0, "abcé"), (1, "xy")]
        assert [entry.token_id for entry in found[1].logprobs] == [ord("x"), ord("y")]
        delivery.deliver([delta("d")])
        await let_run()
        delivery.deliver([delta("e")])
        delivery.deliver([last("f"), last(index=1)])
        await let_run()
        assert [(output.index, output.text, output.is_final) for output in found[2:]] == [
            (0, "d", False), (0, "ef", True), (1, "", True),
        ]  # fmt: skip
        assert found[3].usage == Usage(1, 2)
        delivery.deliver([delta("more")])
        await let_run()
        assert len(found) == 5

    asyncio.run(scene())


def test_iterating_ends_with_the_last_answer(make, delivery, engine):
    async def scene():
        answers = make()

        async def speak():
            await asyncio.sleep(0.01)
            delivery.deliver([delta("a")])
            await asyncio.sleep(0.01)
            delivery.deliver([last("b")])

        task = asyncio.create_task(speak())
        assert not engine.submitted, "nothing runs before it is asked for"
        assert [output.text async for output in answers] == ["a", "b"]
        assert [output async for output in answers] == []
        await task
        assert engine.cancelled == []

    asyncio.run(scene())


def test_leaving_cancels_what_still_runs(make, delivery, engine):
    def start(answers: Answers) -> Answers:
        asyncio.get_running_loop().call_later(0.01, delivery.deliver, [delta("x", name="forgotten")])
        return answers

    async def scene():
        answers = make(count=3)
        answers.begin(lambda _: None)
        delivery.deliver([last(index=1)])
        await let_run()
        answers.end()
        answers.end()
        assert engine.cancelled == [("r", 0), ("r", 2)]
        async for _ in start(make("forgotten", keep=False)):
            break
        gc.collect()
        assert ("forgotten", 0) in engine.cancelled
        waiting = make("waiting")
        task = asyncio.create_task(anext(waiting))
        await let_run()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ("waiting", 0) in engine.cancelled
        with pytest.raises(StopAsyncIteration):
            await anext(waiting)

    asyncio.run(scene())


def test_an_engine_that_takes_nothing(make, engine, delivery):
    async def scene():
        engine.error = EngineError("closed")
        with pytest.raises(EngineError, match="closed"):
            await anext(make())
        with pytest.raises(EngineError, match="closed"):
            make().begin(lambda _: None)
        with pytest.raises(EngineError, match="closed"):
            await complete([make("a"), make("b")], lambda _: None)
        engine.error = None
        make().begin(lambda _: None)  # the id is free again

    asyncio.run(scene())


def test_what_tasks_ask_for_at_once_reaches_the_engine_at_once(make, engine):
    async def scene():
        asked = [make(name) for name in "abc"]
        tasks = [asyncio.create_task(anext(answers)) for answers in asked]
        asyncio.get_running_loop().call_soon(asked[1].end)
        await let_run()
        assert engine.calls == [["a0", "c0"]]  # in order, without the one that was cancelled meanwhile
        tasks.append(asyncio.create_task(anext(make("later"))))
        await let_run()
        assert engine.calls[1:] == [["later0"]]
        for task in tasks:
            task.cancel()

    asyncio.run(scene())


def test_many_requests_are_completed_together(make, delivery, engine):
    async def scene():
        ended: list[int] = []
        job = asyncio.create_task(complete([make("a"), make("b", count=2), make("c")], ended.append))
        await let_run()
        assert engine.calls == [["a0", "b0", "b1", "c0"]]
        delivery.deliver([last("x", 1, "b"), delta("y", 0, "b"), last("z", 0, "c")])
        await let_run()
        assert ended == [1]
        error = EngineError("lost")
        delivery.deliver([last("w", 0, "b"), Output("a", 0, finish_reason="error", error=error)])
        first, second, third = await job
        assert ended == [1, 1, 1]
        assert first.outputs[0].error is error
        assert [(output.index, output.text) for output in second.outputs] == [(0, "yw"), (1, "x")]
        assert third.text == "z"
        assert third.prompt_token_ids == (1,)
        assert await complete([], ended.append) == []
        assert engine.cancelled == []

    asyncio.run(scene())


def test_cancelling_many_cancels_those_that_still_run(make, delivery, engine):
    async def scene():
        job = asyncio.create_task(complete([make("a"), make("b"), make("c")], lambda _: None))
        await let_run()
        delivery.deliver([last("x", 0, "b")])
        await let_run()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert engine.cancelled == [("a", 0), ("c", 0)]

    asyncio.run(scene())


def test_a_bug_in_reading_one_answer_ends_that_one_alone(make, delivery, engine, caplog):
    class Broken(PartParser):
        def push(self, text):
            raise ZeroDivisionError

    async def scene():
        broken: list[Output] = []
        sound: list[Output] = []
        make("broken", prompt_parser=Broken).begin(broken.append)
        make("sound").begin(sound.append)
        delivery.deliver([delta("a", name="broken"), delta("b", name="sound")])
        await let_run()
        delivery.deliver([delta("a", name="broken"), last("c", name="sound")])
        await let_run()
        assert [(output.finish_reason, output.error is None) for output in broken] == [("error", False)]
        assert engine.cancelled == [("broken", 0)]
        assert "".join(output.text for output in sound) == "bc"

    asyncio.run(scene())
    assert "ZeroDivisionError" in caplog.text


def test_each_event_loop_gets_its_own(make, delivery):
    loops = [asyncio.new_event_loop() for _ in range(2)]
    found: dict[str, list[Output]] = {"a": [], "b": []}

    async def begin(name: str) -> None:
        make(name).begin(found[name].append)

    for name, loop in zip(found, loops, strict=True):
        loop.run_until_complete(begin(name))
    delivery.deliver([delta("x", name="a"), delta("y", name="b")])
    for loop in loops:
        loop.run_until_complete(let_run())
    assert {name: [output.text for output in outputs] for name, outputs in found.items()} == {"a": ["x"], "b": ["y"]}
    loops[0].close()
    delivery.deliver([last(name="a"), last(name="b")])
    loops[1].run_until_complete(let_run())
    assert found["b"][-1].is_final
    loops[1].close()


def test_a_deadline_ends_what_is_left_at_once(make, delivery, engine):
    """Each answer that isn't over ends with an error that names the limit; what comes later goes nowhere."""

    async def scene():
        answers = make(count=3, timeout=0.05)
        found: list[Output] = []
        answers.begin(found.append)
        delivery.deliver([delta("a"), last("b", 1)])
        await asyncio.sleep(0.15)
        ends = {output.index: output for output in found if output.is_final}
        assert [ends[index].finish_reason for index in (0, 1, 2)] == ["error", "length", "error"]
        assert all(isinstance(ends[index].error, DeadlineError) for index in (0, 2))
        assert "timeout of 0.05 s" in str(ends[0].error)
        assert engine.cancelled == [("r", 0), ("r", 2)]
        delivery.deliver([delta("more"), last(), last("", 2)])
        await let_run()
        assert sum(output.is_final for output in found) == 3

    asyncio.run(scene())


def test_a_deadline_kept_is_forgotten(make, delivery, engine):
    async def scene():
        found: list[Output] = []
        make(timeout=0.05).begin(found.append)
        delivery.deliver([last("b")])
        await asyncio.sleep(0.15)
        assert [output.finish_reason for output in found] == ["length"] and engine.cancelled == []

    asyncio.run(scene())
