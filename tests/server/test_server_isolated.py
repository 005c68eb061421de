"""The server over an engine in a process of its own, which is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator

import httpx
import pytest

from turbolm import AsyncLLM, SamplingParams
from turbolm.types import Output

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def isolated() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("null", isolated=True, progress=False, max_context=2048)
    yield llm
    asyncio.run(llm.close())


@pytest.fixture(scope="module")
def served(isolated, serving):
    with serving(isolated) as found:
        yield found


def test_answers_and_configuration_are_those_of_an_engine_here(isolated, null_llm):
    async def outputs(llm: AsyncLLM, params: SamplingParams) -> Output:
        return Output.collect([output async for output in llm.generate("hello", params)])

    for options in ({}, {"logprobs": 2, "prompt_logprobs": 1}, {"stop": ("q", "zz")}, {"stop_token_ids": (110,)}):
        params = SamplingParams.of(GREEDY, **options)
        there, here = asyncio.run(outputs(isolated, params)), asyncio.run(outputs(null_llm, params))
        assert there.text == here.text
        assert there[2:8] == here[2:8]
    assert isolated.config.max_context == 2048
    assert isolated.config.num_blocks == null_llm.config.num_blocks
    assert isolated.stats.num_used_blocks == 0


def test_kv_use_is_none_a_moment_after_the_last_request_and_leaves_out_what_is_cached(served, isolated, wait_until):
    body = {"prompt": "x" * 500, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: without it the connection is closed
        next(lines)
        wait_until(lambda: isolated.stats.num_used_blocks > 0)
    wait_until(lambda: 'vllm:kv_cache_usage_perc{model_name="null"} 0.0' in served.get("/metrics").text)
    assert isolated.stats.num_idle_blocks > 0  # the prefix cache's
    assert isolated.stats.num_running == 0


def test_a_killed_engine_is_replaced_under_the_server(served, isolated, wait_until):
    body = {"prompt": "hello", "max_tokens": 1900, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(isolated._engine.worker_pid, signal.SIGKILL)
        *_, error, done = (line for line in lines if line)
    assert "SIGKILL in the middle of this answer" in json.loads(error[6:])["error"]["message"]
    assert done == "data: [DONE]"
    assert served.get("/ready").status_code == 503
    assert "being started again" in served.get("/ready").json()["status"]
    assert served.get("/health").status_code == 200
    answer = served.client.completions.create(model="null", prompt="hello", max_tokens=5)  # waits for the new one
    assert answer.usage.completion_tokens == 5
    assert served.get("/ready").status_code == 200
    assert 'turbolm:engine_restarts_total{model_name="null"} 1.0' in served.get("/metrics").text
    wait_until(lambda: isolated.stats.num_used_blocks == 0)
