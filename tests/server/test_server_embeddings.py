"""/v1/embeddings over the null model, whose hidden states are a token's id and its position."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest


def vectors(response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [entry["embedding"] for entry in response.json()["data"]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", [[98.0, 1.0]]),
        (["ab", "c"], [[98.0, 1.0], [99.0, 0.0]]),
        ([97, 98, 99], [[99.0, 2.0]]),
        ([[97], [97, 98]], [[97.0, 0.0], [98.0, 1.0]]),
    ],
)
def test_every_form_of_input(null, given: object, expected: list[list[float]]) -> None:
    assert vectors(null.post("/v1/embeddings", {"input": given, "normalize": False})) == expected


def test_pooling_dimensions_and_length(null) -> None:
    body = {"input": [97, 98, 99], "normalize": False}
    assert vectors(null.post("/v1/embeddings", body | {"pooling": "mean"})) == [[98.0, 1.0]]
    (unit,) = vectors(null.post("/v1/embeddings", body | {"normalize": True}))
    assert np.allclose(unit, np.array([99.0, 2.0]) / math.hypot(99, 2), rtol=1e-6)
    (short,) = vectors(null.post("/v1/embeddings", body | {"normalize": None, "dimensions": 1}))
    assert short == [1.0], "cut, and then scaled to length 1"


def test_base64_is_the_same_numbers(null) -> None:
    plain = vectors(null.post("/v1/embeddings", {"input": "hello"}))[0]
    (packed,) = vectors(null.post("/v1/embeddings", {"input": "hello", "encoding_format": "base64"}))
    assert np.array_equal(np.frombuffer(base64.b64decode(packed), "<f4"), np.array(plain, np.float32))


def test_openai_client(null) -> None:
    """It asks for base64 by itself."""
    result = null.client.embeddings.create(model="null", input=["ab", "abc"], dimensions=2)
    assert [entry.index for entry in result.data] == [0, 1]
    assert (result.usage.prompt_tokens, result.usage.total_tokens) == (5, 5)
    assert math.isclose(sum(x * x for x in result.data[1].embedding), 1.0, rel_tol=1e-5)


def test_long_texts_are_computed_in_chunks_beside_answers(null) -> None:
    """More texts than fit a step; each vector is its own text's."""
    texts = [[65 + (i + j) % 26 for j in range(1 + 37 * i)] for i in range(40)]
    expected = [[float(np.mean(ids)), (len(ids) - 1) / 2] for ids in texts]
    found = vectors(null.post("/v1/embeddings", {"input": texts, "pooling": "mean", "normalize": False}))
    assert np.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "parameter", "code"),
    [
        ({"input": ""}, "input", None),
        ({"input": []}, "input", None),
        ({"input": ["a"] * 2049}, "input", None),
        ({"input": ["a", ""]}, "input", None),
        ({"input": [[97], [999]]}, "input", None),
        ({"input": "a" * 2049}, "input", "context_length_exceeded"),
        ({"input": {"text": "a"}}, "input", None),
        ({"dimensions": 3}, "dimensions", None),
        ({"dimensions": 0}, "dimensions", None),
        ({"pooling": "cls"}, "pooling", None),
        ({"encoding_format": "hex"}, "encoding_format", None),
        ({"timeout": 0}, "timeout", None),
        ({"stream": True}, "stream", "unknown_field"),
    ],
)
def test_refusals_name_the_field(null, fields: dict, parameter: str, code: str | None) -> None:
    response = null.post("/v1/embeddings", {"input": "a"} | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, parameter, code)


def test_the_whole_context_fits(null) -> None:
    assert vectors(null.post("/v1/embeddings", {"input": "a" * 2048, "normalize": False})) == [[97.0, 2047.0]]


def test_other_models_are_not_found(null) -> None:
    assert null.post("/v1/embeddings", {"input": "a", "model": "other"}).status_code == 404


def test_models_that_cannot(null, monkeypatch) -> None:
    choice = null.service.llm.pooling._replace(refusal="1_Pooling/config.json says cls, which turbolm doesn't have")
    monkeypatch.setattr(type(null.service.llm), "pooling", property(lambda _: choice))
    response = null.post("/v1/embeddings", {"input": "a"})
    assert response.status_code == 400 and "says cls" in response.json()["error"]["message"]
    assert null.post("/v1/embeddings", {"input": "a", "pooling": "mean"}).status_code == 200, "asked for by name"


def test_tokens_are_counted(null) -> None:
    before = null.service.metrics.num_prompt_tokens
    null.post("/v1/embeddings", {"input": ["ab", "cde"]})
    assert null.service.metrics.num_prompt_tokens == before + 5
    assert 'path="/v1/embeddings"' in null.get("/metrics").text


# Time limits of single requests

GENERATING = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1900},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1900},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1900},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1900},
}


@pytest.mark.parametrize("path", GENERATING)
def test_a_request_ends_with_its_own_time_limit(null, wait_until, path: str) -> None:
    response = null.post(path, GENERATING[path] | {"timeout": 0.03})
    assert response.status_code == 504 and "timeout of 0.03 s" in response.text
    streamed = null.post(path, GENERATING[path] | {"timeout": 0.2, "stream": True})
    assert "timeout of 0.2 s" in streamed.text
    wait_until(lambda: null.service.llm.stats.num_used_blocks == 0)


def test_a_time_limit_that_suffices_changes_nothing(null) -> None:
    body = {"prompt": "Hi", "max_tokens": 5, "temperature": 0}
    texts = [null.post("/v1/completions", body | extra).json()["choices"][0]["text"] for extra in ({}, {"timeout": 60})]
    assert texts[0] == texts[1]


def test_time_limits_are_numbers_above_0(null) -> None:
    for value in (0, -1, "5", 1e9):
        error = null.post("/v1/completions", {"prompt": "Hi", "timeout": value}).json()["error"]
        assert error["param"] == "timeout"
