from __future__ import annotations

import numpy as np
import pytest

from turbolm import LLM
from turbolm.bench.workload import decode, prefill, random_tokens, run, run_prompts, summary
from turbolm.errors import RequestError


def test_prompts_are_fresh_in_each_round_and_the_same_in_each_run():
    work = decode(3, context=20, answer=5)
    assert work.prompts(1000, 1) == work.prompts(1000, 1)
    assert work.prompts(1000, 1) != work.prompts(1000, 2)
    assert [len(prompt) for prompt in work.prompts(1000)] == [20, 20, 20]
    assert work.num_tokens == 75
    assert prefill(64).is_prefill
    assert not work.is_prefill


@pytest.mark.parametrize("vocab_size", [32, 256, 1001, 49152])
def test_tokens_are_of_the_vocabulary(vocab_size: int):
    tokens = random_tokens(np.random.default_rng(0), vocab_size, 1000)
    assert min(tokens) >= 0
    assert max(tokens) < vocab_size
    assert len(set(tokens)) > 20


def test_longer_prompts_of_a_seed_go_on_where_shorter_end():
    long, short = (random_tokens(np.random.default_rng(7), 49152, count) for count in (500, 100))
    assert long[:100] == short


def test_a_run_computes_its_prompts():
    with LLM("null", progress=False, speculation="off", threads=1) as llm:
        assert run(llm, decode(2, context=8, answer=300), 0) > 0
        assert llm.stats.num_prompt_tokens == 2 * 8
        assert run(llm, prefill(32), 0) > 0
        assert llm.stats.num_prompt_tokens == 2 * 8 + 32
        assert llm.stats.num_prefix_hit_tokens == 0
        with pytest.raises(RequestError):
            run_prompts(llm, [[1 << 30]], 4)


def test_summary():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
