"""LMDeploy's calling style."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from turbolm.errors import ConfigError
from turbolm.lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, Response, TurbomindEngineConfig, pipeline

SHORT = GenerationConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline("null", TurbomindEngineConfig(session_len=512, max_batch_size=4)) as made:
        yield made


def test_one_prompt_gives_one_response_and_a_list_a_list(pipe: Pipeline) -> None:
    one = pipe("Hi", SHORT)
    assert isinstance(one, Response)
    assert (one.generate_token_len, one.finish_reason, len(one.text)) == (8, "length", 8)
    several = pipe(["Hi", "Shanghai is"], SHORT)
    assert isinstance(several, list)
    assert [r.index for r in several] == [0, 1]
    assert several[0].text == one.text
    messages = [{"role": "user", "content": "Hi"}]
    assert pipe(messages, SHORT) == one
    assert [r.text for r in pipe([messages, messages], SHORT)] == [one.text] * 2


def test_text_goes_through_the_chat_template_unless_told_otherwise(pipe: Pipeline) -> None:
    with_template, without = pipe("Hi", SHORT), pipe("Hi", SHORT, do_preprocess=False)
    assert with_template.input_token_len > without.input_token_len == 2


def test_stream_infer_yields_all_answers_in_pieces(pipe: Pipeline) -> None:
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for delta in pipe.stream_infer(["Hi", "Shanghai is"], SHORT):
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        if delta.finish_reason:
            ends[delta.index] = delta.finish_reason
            assert delta.generate_token_len == 8
    assert texts == {r.index: r.text for r in pipe(["Hi", "Shanghai is"], SHORT)}
    assert ends == {0: "length", 1: "length"}


def test_greedy_unless_do_sample() -> None:
    assert GenerationConfig(temperature=0.9).sampling_params().is_greedy
    params = GenerationConfig(
        do_sample=True, top_k=7, temperature=0.9, random_seed=3, stop_words=["x"]
    ).sampling_params()
    assert (params.temperature, params.top_k, params.seed, params.stop) == (0.9, 7, 3, ("x",))


def test_options_names_are_lmdeploys(pipe: Pipeline) -> None:
    assert pipe.llm.config.max_context == 512
    assert pipe.llm.config.max_batch_size == 4
    assert pipe.llm.config.block_size == 64
    assert PytorchEngineConfig is TurbomindEngineConfig
    with pytest.raises(ConfigError, match="tp is 2"):
        TurbomindEngineConfig(tp=2).engine_config()


def test_ppl_is_the_mean_negative_log_likelihood(pipe: Pipeline) -> None:
    ids = [1, 2, 3, 4]
    assert pipe.get_ppl(ids) == [pytest.approx(-pipe.llm.score(ids)[0].log_likelihood / 3)]
    assert len(pipe.get_ppl([ids, ids])) == 2


def test_the_names_come_from_turbolm_itself() -> None:
    import turbolm

    assert turbolm.GenerationConfig is GenerationConfig
    assert turbolm.pipeline is pipeline
