"""/v1/completions, through the official client."""

from __future__ import annotations

import pytest

GREEDY = {"model": "null", "temperature": 0, "max_tokens": 6}


def test_texts_and_token_ids(null):
    one = null.client.completions.create(**GREEDY, prompt="hello")
    assert (one.object, one.choices[0].finish_reason, one.usage.completion_tokens) == ("text_completion", "length", 6)
    ids = list(b"hello")
    assert null.client.completions.create(**GREEDY, prompt=ids).choices[0].text == one.choices[0].text
    several = null.client.completions.create(**GREEDY, prompt=["hello", "world"], n=1)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == one.choices[0].text
    assert several.usage.prompt_tokens == 10
    lists = null.client.completions.create(**GREEDY, prompt=[ids, list(b"world")])
    assert [choice.text for choice in lists.choices] == [choice.text for choice in several.choices]
    assert len(null.client.completions.create(model="null", prompt="x").choices[0].text) == 16


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"n": 2}, {"echo": True, "logprobs": 2}, {"logprobs": 1}])
def test_a_stream_is_the_answer_in_pieces(null, options):
    arguments = {**GREEDY, "prompt": ["hello", "wörld"], **options}
    whole = null.client.completions.create(**arguments)
    texts, tokens, offsets = {}, {}, {}
    for chunk in null.client.completions.create(**arguments, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        if choice.logprobs:
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens)
            offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        if "logprobs" in options:
            assert tokens[choice.index] == choice.logprobs.tokens
            assert offsets[choice.index] == choice.logprobs.text_offset


def test_echo_with_logprobs_scores_the_prompt(null):
    answer = null.client.completions.create(model="null", prompt="hello", echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == "hello"
    assert choice.logprobs.tokens == list("hello")
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    score = null.post("/score", {"text": "hello"}).json()
    assert score["log_likelihood"] == pytest.approx(sum(choice.logprobs.token_logprobs[1:]))
    assert score["num_scored"] == 4
    longer = null.client.completions.create(model="null", prompt="hello", echo=True, logprobs=1, max_tokens=3)
    assert longer.choices[0].text.startswith("hello")
    assert len(longer.choices[0].logprobs.tokens) == 8


def test_echo_alone(null):
    answer = null.client.completions.create(model="null", prompt=list(b"hello"), echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("hello", 0)


def test_tokenize_and_back(null):
    found = null.post("/tokenize", {"prompt": "héllo", "return_token_strs": True}).json()
    assert found["tokens"] == list("héllo".encode())
    assert (found["count"], found["max_model_len"], len(found["token_strs"])) == (6, 2048, 6)
    assert null.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
    messages = [{"role": "user", "content": "<|im_end|>"}]
    tokens = null.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert tokens.count(257) == 1  # typed control tokens stay text
    usage = null.client.chat.completions.create(model="null", messages=messages, max_tokens=1).usage
    assert usage.prompt_tokens == len(tokens)


def test_score_in_windows(null):
    found = null.post("/score", {"text": "x" * 64, "window": 16, "return_logprobs": True}).json()
    assert (found["num_scored"], len(found["tokens"]), len(found["logprobs"])) == (28, 64, 64)
    assert found["logprobs"][0] is None


def test_scores_that_are_refused(null):
    for body, words in (
        ({"text": "x" * 5000, "window": 4}, "more than 1024 windows"),
        ({"text": "x" * 50, "window": 2}, "from 4 to 2048"),
        ({"text": "x" * 3000}, "exceeds the context"),
        ({"text": 3}, "give a text"),
    ):
        response = null.post("/score", body)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
