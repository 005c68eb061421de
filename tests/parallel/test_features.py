"""What works on one device works over two processes: penalties, adapters, prompts as vectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from adapter_files import save_random_adapter
from spread_model import Served, asked, assert_same_answers, built, children
from tiny import Tiny

from turbolm.engine.ranks import Ranks
from turbolm.errors import CheckpointError, RequestError
from turbolm.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes end with their parent on Linux only")

GREEDY = SamplingParams(temperature=0, max_tokens=12)
ADJUSTED = {
    "repetition": SamplingParams.of(GREEDY, repetition_penalty=1.4),
    "presence": SamplingParams.of(GREEDY, presence_penalty=0.7, frequency_penalty=0.4),
    "sampled": SamplingParams(seed=3, repetition_penalty=1.2, frequency_penalty=0.3, max_tokens=12),
    "filtered": SamplingParams(seed=4, temperature=1.3, top_k=9, presence_penalty=0.5, max_tokens=12),
    # One token of each process's part.
    "bias": SamplingParams.of(GREEDY, logit_bias={7: 3.0, 80: 3.5, 60: -100.0}, repetition_penalty=1.6),
    "stop late": SamplingParams.of(GREEDY, stop_token_ids=tuple(range(30, 89)), min_tokens=6),
    "plain": GREEDY,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    Tiny("Llama", {"num_key_value_heads": 2, "vocab_size": 91}).save(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(folder, parent / str(seed), seed, rank=8, scale=0.3) for seed in range(3)]


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[list[Served]]:
    """Over one process, and over two."""
    engines = [Served(built(folder, size, max_adapters=2, max_adapter_rank=8)[0]) for size in (1, 2)]
    yield engines
    for own in engines:
        own.engine.close()
    assert not children()


def test_penalties_biases_and_bans_are_made_by_every_rank(served: list[Served]) -> None:
    requests = asked(ADJUSTED, (1, 11, 45))
    words = replace(requests[0], id="words", bad_words_ids=((5,), (60, 61)), params=GREEDY)
    found = served[0].answers([words])["words"].token_ids
    banned = replace(words, id="banned", bad_words_ids=(found[1:3], found[4:5], (88,)))
    with mock.patch.object(Ranks, "step", autospec=True, side_effect=Ranks.step) as step:
        answers = assert_same_answers([*requests, banned], served)
    assert answers["banned"].token_ids != found
    assert answers["repetition 11"].token_ids != answers["plain 11"].token_ids
    assert step.call_count and not any(call.args[3] for call in step.call_args_list), "the host chose tokens"


def test_penalties_go_on_where_the_host_chose_tokens_in_between(served: list[Served]) -> None:
    """While some request wants log-probabilities, the host chooses for all; the ranks catch up with what it chose."""
    requests = asked({name: ADJUSTED[name] for name in ("repetition", "presence", "sampled")}, (5, 9))
    short = replace(requests[0], id="logprobs", params=SamplingParams.of(GREEDY, logprobs=1, max_tokens=5))
    assert_same_answers([*requests[:3], short, *requests[3:]], served)


def test_prompts_become_the_same_vectors(served: list[Served]) -> None:
    requests = [
        replace(request, id=f"{request.id} {pooling}", pooling=pooling)
        for request in asked({"": SamplingParams()}, (2, 17, 70))
        for pooling in ("mean", "last")
    ]
    beside = asked({"beside": GREEDY}, (3, 40))
    expected, found = (own.answers([*requests, *beside]) for own in served)
    for request in requests:
        vectors = [np.frombuffer(answers[request.id].embedding or b"", "<f4") for answers in (expected, found)]
        np.testing.assert_allclose(vectors[1], vectors[0], rtol=1e-4, atol=1e-5)


def test_adapters_come_and_go_on_all_ranks(served: list[Served], adapters: list[Path]) -> None:
    def requests(names: list[str | None]) -> list[Request]:
        """Of one prompt, and some beside each other in each step."""
        first = asked({"": GREEDY}, (9,))[0]
        return [
            replace(first, id=f"{name} {i}", adapter=name, prompt_token_ids=first.prompt_token_ids[i:])
            for i in range(2)
            for name in names
        ]

    for own in served:
        own.engine.add_adapter("a", str(adapters[0]))
        own.engine.add_adapter("b", str(adapters[1]))
    first = assert_same_answers(requests(["a", None, "b"]), served)
    assert len({first[f"{name} 0"].token_ids for name in ("a", "b", None)}) == 3
    for own in served:
        own.engine.remove_adapter("a")
        own.engine.add_adapter("c", str(adapters[2]))
        with pytest.raises(RequestError, match="there is an adapter 'c' already"):
            own.engine.add_adapter("c", str(adapters[0]))
    second = assert_same_answers(requests(["c", "b", None]), served)
    assert second["c 0"].token_ids not in {output.token_ids for output in first.values()}
    assert second["b 0"].token_ids == first["b 0"].token_ids


def test_an_adapter_as_wide_as_a_part_is_for_another_model(served: list[Served], tmp_path: Path) -> None:
    """Adapters are checked against the whole model; one that is refused harms nobody."""
    Tiny("Llama", {"num_key_value_heads": 2, "vocab_size": 91, "intermediate_size": 48}).save(tmp_path / "half")
    save_random_adapter(tmp_path / "half", tmp_path / "adapter", 0)
    with pytest.raises(CheckpointError, match="is the adapter for another model"):
        served[1].engine.add_adapter("half", str(tmp_path / "adapter"))
    assert_same_answers(asked({"after": GREEDY}, (6,)), served)
