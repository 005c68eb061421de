"""The served OpenAPI document as a source of requests, allowed ones and others: no 5xx, and nothing left behind.
With --hypothesis-profile=thorough it takes thousands of them."""

from __future__ import annotations

import asyncio

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from turbolm import AsyncLLM
from turbolm.server.pages import describe

SCHEMA = schemathesis.openapi.from_dict(describe())
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
CASES = st.one_of(
    *(operation.as_strategy(generation_mode=GenerationMode.POSITIVE) for operation in OPERATIONS),
    *(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.body),
)


@pytest.fixture(scope="module")
def small(serving):
    """A server with a short context: an answer without a limit fills it."""
    llm = AsyncLLM("null", progress=False, max_context=256)
    with serving(llm) as served:
        yield served
    asyncio.run(llm.close())


@settings(deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_no_case_of_the_document_breaks_the_server(small, case):
    response = case.call(base_url=small.url, timeout=120)
    gave_itself_no_time = isinstance(case.body, dict) and "timeout" in case.body and response.status_code == 504
    assert response.status_code < 500 or gave_itself_no_time, response.text


def test_nothing_is_left_behind(small, wait_until):
    wait_until(lambda: small.service.num_admitted == 0 and small.service.llm.stats.num_used_blocks == 0)
