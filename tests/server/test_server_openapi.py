"""The served OpenAPI document as a source of requests, allowed ones and others: no 5xx, and nothing left behind."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from turbolm.server.pages import describe

SCHEMA = schemathesis.openapi.from_dict(describe())
OPERATIONS = [found.ok() for found in SCHEMA.get_all_operations()]
CASES = st.one_of(
    *(operation.as_strategy(generation_mode=GenerationMode.POSITIVE) for operation in OPERATIONS),
    *(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.body),
)


@settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=CASES)
def test_no_case_of_the_document_breaks_the_server(null, case):
    response = case.call(base_url=null.url, timeout=60)
    assert response.status_code < 500, response.text


def test_nothing_is_left_behind(null, null_llm, wait_until):
    wait_until(lambda: null.service.num_admitted == 0 and null_llm.stats.num_used_blocks == 0)
