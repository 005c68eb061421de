"""Answers compared while the server runs: what is compared, what is said of it, and that nobody has to wait for it."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import httpx
import pytest

from turbolm import AsyncLLM
from turbolm.config import EngineConfig
from turbolm.errors import CapacityError, ConfigError, EngineError
from turbolm.server import reference as reference_module
from turbolm.server.config import ServerConfig
from turbolm.server.reference import EngineReference, Finding, Sample, UrlReference, compare, open_engine
from turbolm.server.shadow import Shadow, is_plain_greedy, open_shadow
from turbolm.server.shadow_config import ShadowConfig
from turbolm.types import Output, Request, SamplingParams

ALL = ShadowConfig(shadow="100%")
SAMPLE = Sample((1, 2), (3, 4, 5, 6), is_greedy=True, log_likelihood=-1.0)


class ToldReference:
    """Finds what it is told."""

    title = "a test"

    def __init__(self, *findings: Finding | Exception | None, is_here: bool = True, seconds: float = 0.0) -> None:
        self.findings = list(findings)
        self.is_here = is_here
        self.seconds = seconds
        self.judged: list[Sample] = []
        self.is_closed = False

    async def judge(self, sample: Sample) -> Finding | None:
        await asyncio.sleep(self.seconds)
        self.judged.append(sample)
        found = self.findings.pop(0) if len(self.findings) > 1 else self.findings[0]
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None:
        self.is_closed = True


def shadow_of(*findings, config=ALL, is_idle=lambda: True, **options) -> Shadow:
    return Shadow(ToldReference(*findings, **options), config, is_idle)


async def run_until(shadow: Shadow, condition) -> None:
    task = asyncio.create_task(shadow.run())
    for _ in range(500):
        if condition():
            break
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert condition(), "nothing happened"
    assert shadow.reference.is_closed


def shown(shadow: Shadow) -> dict[str, float]:
    """Metrics by name and outcome."""
    samples = [sample for family in shadow.collect("m") for sample in family.samples]
    return {f"{s.name}{s.labels.get('outcome', '')}": s.value for s in samples if "le" not in s.labels}


def test_where_two_answers_part() -> None:
    found = compare([-0.5, -0.5, -2.0, -0.5], [True, True, False, True])
    assert (found.num_tokens, found.num_common, found.num_agreed, found.log_likelihood) == (4, 2, 3, -3.5)
    assert compare([-1.0], [True]).num_common == 1


def test_what_is_compared_is_counted() -> None:
    shadow = shadow_of(Finding(4, 2, 3, -3.0))
    shadow._add(SAMPLE)
    shadow._add(replace(SAMPLE, is_greedy=False))
    asyncio.run(run_until(shadow, lambda: shadow.outcomes["compared"] == 2))
    values = shown(shadow)
    assert values["turbolm:shadow_tokens_total"] == 4  # of the greedy one alone
    assert values["turbolm:shadow_agreed_tokens_total"] == 3
    assert values["turbolm:shadow_diverged_total"] == 1
    assert values["turbolm:shadow_agreement"] == 0.75
    assert values["turbolm:shadow_common_tokens_sum"] == 2
    assert values["turbolm:shadow_surprise_nats_sum"] == 1.5  # 3/4 nats per token, twice
    assert values["turbolm:shadow_gap_nats_sum"] == 1.0


def test_the_queue_is_bounded_and_failures_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    shadow = shadow_of(EngineError("gone away"), None, Finding(4, 4, 4, None))
    for _ in range(20):
        shadow._add(SAMPLE)
    shadow._add(replace(SAMPLE, prompt_token_ids=(1,) * 9000))
    assert shadow.outcomes["dropped"] == 5
    asyncio.run(run_until(shadow, lambda: shadow.outcomes["compared"] > 1))
    assert (shadow.outcomes["failed"], shadow.outcomes["skipped"]) == (1, 1)
    assert [record.message for record in caplog.records] == ["shadow: an answer could not be compared: gone away"]


def test_a_request_cuts_a_comparison_off_which_comes_again() -> None:
    busy = [False]
    shadow = shadow_of(Finding(4, 4, 4, None), is_idle=lambda: not busy[0], seconds=0.3)

    async def scenario() -> None:
        task = asyncio.create_task(shadow.run())
        shadow._add(SAMPLE)
        while shadow._work is None:
            await asyncio.sleep(0.01)
        busy[0] = True
        shadow.interrupt()
        await asyncio.sleep(0.6)
        assert shadow.outcomes["interrupted"] == 1
        assert shadow.reference.judged == []  # nothing begins while a request is at work
        busy[0] = False
        while not shadow.outcomes["compared"]:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert shadow.reference.judged == [SAMPLE]


def test_a_reference_elsewhere_does_not_wait() -> None:
    shadow = shadow_of(Finding(4, 4, 4, None), is_idle=lambda: False, is_here=False)
    shadow._add(SAMPLE)
    shadow.interrupt()
    asyncio.run(run_until(shadow, lambda: shadow.outcomes["compared"] == 1))


def test_drift_is_told_when_it_comes_and_when_it_goes(caplog: pytest.LogCaptureFixture) -> None:
    shadow = shadow_of(Finding(100, 50, 99, None), config=ShadowConfig(shadow="1", shadow_least="95%"))
    for number in range(440):
        bad = 20 <= number < 120
        shadow._note(SAMPLE, Finding(100, 10 if bad else 100, 60 if bad else 100, None))
    told = [record.message.split(":")[1].split()[0:3] for record in caplog.records]
    assert told == [["drift"], ["no", "more", "drift"]]


def test_a_few_tokens_below_the_least_are_chance(caplog: pytest.LogCaptureFixture) -> None:
    shadow = shadow_of(None, config=ShadowConfig(shadow="1", shadow_least="95%"))
    for _ in range(40):
        shadow._note(SAMPLE, Finding(25, 10, 24 - (len(shadow._recent) % 2), None))  # 94% of a thousand
    assert not caplog.records


@pytest.mark.parametrize(
    ("params", "is_greedy"),
    [
        (SamplingParams(temperature=0.0), True),
        (SamplingParams(top_k=1), True),
        (SamplingParams(temperature=0.5), False),
        (SamplingParams(temperature=0.0, frequency_penalty=0.5), False),
        (SamplingParams(temperature=0.0, logit_bias={3: 1.0}), False),
        (SamplingParams(temperature=0.0, min_tokens=3), False),
    ],
)
def test_what_counts_as_greedy(params: SamplingParams, is_greedy: bool) -> None:
    assert is_plain_greedy(params) == is_greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow": "200%"}, "give a part from 0% to 100%"),
        ({"shadow_url": "http://x"}, "go with shadow"),
        ({"shadow": "1%", "shadow_url": "x:1"}, "give an address"),
        ({"shadow": "1%", "shadow_key_env": "NO_SUCH_KEY"}, "holds no key"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShadowConfig(**options)


def test_the_same_precision_is_no_reference(null_llm: AsyncLLM) -> None:
    with pytest.raises(ConfigError, match="served as it is in its files"):
        open_shadow(ALL, "null", EngineConfig(), null_llm, lambda: True, isolated=False)


def test_a_second_model_has_to_fit(null_llm: AsyncLLM, smollm2_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reference_module.load_text("null", None)
    monkeypatch.setattr(reference_module, "load_text", lambda *_: text)
    hardware = reference_module.probe()
    monkeypatch.setattr(reference_module, "probe", lambda: replace(hardware, free_memory=300_000_000))
    with pytest.raises(CapacityError, match=r"no room for a second model.*--shadow-url"):
        open_engine(str(smollm2_path), EngineConfig(), null_llm, isolated=False)


def test_another_tokenizer_is_refused(null_llm: AsyncLLM, smollm2_path) -> None:
    with pytest.raises(ConfigError, match="name one with the same tokenizer"):
        open_engine(str(smollm2_path), EngineConfig(), null_llm, isolated=False)


class DamagedLLM(AsyncLLM):
    """Reads other tokens than it is given."""

    def generate(self, prompt, params=None, **options):
        return super().generate([token ^ 1 for token in prompt], params, **options)


@pytest.mark.parametrize(("kind", "agreement"), [(AsyncLLM, 1.0), (DamagedLLM, 0.0)])
def test_a_server_with_a_second_engine(serving, wait_until, kind, agreement, caplog) -> None:
    llm, second = (one("null", progress=False, max_context=512) for one in (AsyncLLM, kind))
    caplog.set_level(logging.DEBUG)
    shadow = Shadow(EngineReference(second), ALL, lambda: True)
    with serving(llm, ServerConfig(), shadow=shadow) as served:
        body = {"messages": [{"role": "user", "content": "a secret question"}], "temperature": 0, "max_tokens": 12}
        for stream in (False, True):
            assert served.post("/v1/chat/completions", {**body, "stream": stream}).status_code == 200
        served.post("/v1/chat/completions", {**body, "temperature": 1, "logprobs": True})
        served.post("/v1/completions", {"prompt": "abc", "temperature": 0, "max_tokens": 5, "n": 2})
        wait_until(lambda: shadow.outcomes["compared"] == 4)
        text = served.get("/metrics").text
        assert 'turbolm:shadow_answers_total{model_name="null",outcome="compared"} 4.0' in text
        assert f'turbolm:shadow_agreement{{model_name="null"}} {agreement}' in text
        assert 'turbolm:shadow_gap_nats_count{model_name="null"} 1.0' in text
        assert 'turbolm:shadow_tokens_total{model_name="null"} 29.0' in text
    assert "secret" not in caplog.text
    asyncio.run(llm.close())


def test_answers_of_a_request_that_failed_are_not_compared(null_llm: AsyncLLM) -> None:
    shadow = shadow_of(None)

    class Failing:
        request = Request("x", (1,))

        def begin(self, sink) -> None:
            sink(Output("x", 0, token_ids=(1,)))
            sink(Output("x", 0, finish_reason="error", error=EngineError("no")))

        def end(self) -> None:
            pass

    seen: list[Output] = []
    (source,) = shadow.watch([Failing()])
    source.begin(seen.append)
    assert len(seen) == 2
    assert not shadow._queue


def answer_of(llm: AsyncLLM, prompt: str) -> Sample:
    async def ask() -> Output:
        return Output.collect([d async for d in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=9))])

    return Sample(tuple(llm.tokenizer.encode(prompt)), asyncio.run(ask()).token_ids, is_greedy=True)


def test_a_server_at_a_url_scores_and_agrees(null, null_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sample = answer_of(null_llm, "question 7")
    wrong = replace(sample, token_ids=(*sample.token_ids[:4], 98 ^ sample.token_ids[4] & 1, *sample.token_ids[5:]))

    async def judge():
        remote = UrlReference(null.url, "null", None, null_llm)
        local = EngineReference(null_llm)
        found = [(await remote.judge(one), await local.judge(one)) for one in (sample, wrong)]
        await remote.close()
        return found

    (same, local_same), (other, local_other) = asyncio.run(judge())
    assert (same.num_common, same.num_agreed) == (9, 9)
    assert other.num_common == 4
    for remote, local in ((same, local_same), (other, local_other)):
        assert replace(remote, log_likelihood=None) == replace(local, log_likelihood=None)
        assert remote.log_likelihood == pytest.approx(local.log_likelihood, abs=1e-3)


def test_a_server_that_cannot_score_is_asked_for_its_own_answer(null_llm: AsyncLLM) -> None:
    sample = answer_of(null_llm, "question 8")
    text = null_llm.tokenizer.decode(sample.token_ids)
    asked: list[bytes] = []

    def reply(request: httpx.Request) -> httpx.Response:
        asked.append(request.content)
        if b'"echo"' in request.content:
            return httpx.Response(400, json={"error": {"message": "echo is not supported"}})
        return httpx.Response(200, json={"choices": [{"text": text[:5] + "?" + text[6:]}]})

    async def judge():
        remote = UrlReference("http://somewhere", "m", None, null_llm)
        remote._client = httpx.AsyncClient(transport=httpx.MockTransport(reply))
        found = [await remote.judge(sample), await remote.judge(sample)]
        return found, await remote.judge(replace(sample, is_greedy=False))

    (first, second), sampled = asyncio.run(judge())
    assert first == second == Finding(9, 5, 5, None)
    assert sampled is None  # nothing can be said
    assert len(asked) == 3  # whether it can score is asked once


@pytest.mark.parametrize(
    ("response", "message"),
    [(httpx.Response(500), "answered 500"), (httpx.Response(200, json={"x": 1}), "isn't an OpenAI-compatible server")],
)
def test_a_server_that_fails(null_llm: AsyncLLM, response: httpx.Response, message: str) -> None:
    async def judge() -> None:
        remote = UrlReference("http://somewhere/v1", "m", "key", null_llm)
        remote._client = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: response))
        await remote.judge(SAMPLE)

    with pytest.raises(EngineError, match=message):
        asyncio.run(judge())
