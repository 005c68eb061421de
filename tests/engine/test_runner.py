"""Real tiny models through scheduler, runner and sampler: batching must not change what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from tiny import TINY_MODELS
from transformers import PreTrainedModel

from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import PromptLookup
from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops.reference import ReferenceOps
from turbolm.types import Batch, Output, Request, SamplingParams

BLOCK = 8
Run = Callable[..., dict[str, Output]]


@pytest.fixture(scope="module", params=["llama-tied", "mistral-window", "qwen3"])
def model_and_reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp(request.param)
    reference = TINY_MODELS[request.param].save(folder)
    checkpoint = open_checkpoint(folder)
    ops = ReferenceOps(torch.device("cpu"), torch.float32)
    return load_decoder(decoder_spec(checkpoint.config), Loader(checkpoint.source, ops), 64), reference


@pytest.fixture
def run(model_and_reference: tuple) -> Run:
    """Runs requests to their end on a fresh engine → outputs by id."""
    model, _ = model_and_reference

    def run(requests: Iterable[Request], stats: dict | None = None, num_blocks: int = 64, **limits: object) -> dict:
        caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(num_blocks, BLOCK, torch.device("cpu"))
        sizes = {"max_batch_size": 16, "max_batch_tokens": 64, "max_context": 64, "max_waiting": 100} | limits
        scheduler = Scheduler(num_blocks=num_blocks, block_size=BLOCK, max_logit_rows=64, **sizes)
        runner = Runner(lambda batch: model.forward(batch, caches), BLOCK, torch.device("cpu"), 96)
        for request in requests:
            scheduler.add(request)
        deltas: dict[str, list[Output]] = {}
        while (step := scheduler.next_batch()) is not None:
            for output in scheduler.update(step, runner.run(step)):
                deltas.setdefault(f"{output.request_id}/{output.index}", []).append(output)
        if stats is not None:
            stats["stats"] = scheduler.stats
        return {key: Output.collect(items) for key, items in deltas.items()}

    return run


def prompt(seed: int, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 96, (length,), generator=generator).tolist())


def requests(params: SamplingParams) -> list[Request]:
    shared = prompt(99, 20)
    prompts = [prompt(i, 1 + 5 * i) for i in range(6)] + [shared + prompt(10 + i, 3 + i) for i in range(4)]
    return [Request(f"r{i}", tokens, params) for i, tokens in enumerate(prompts)]


def greedy_of(reference: PreTrainedModel, tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, len(tokens) :].tolist())


def test_greedy_equals_transformers_whatever_the_batching(run: Run, model_and_reference: tuple) -> None:
    items = requests(SamplingParams(temperature=0, max_tokens=12))
    expected = {f"{r.id}/0": greedy_of(model_and_reference[1], r.prompt_token_ids, 12) for r in items}

    def tokens(outputs: dict[str, Output]) -> dict[str, tuple[int, ...]]:
        return {key: output.token_ids for key, output in outputs.items()}

    assert tokens(run(items)) == expected
    for request in items:  # alone
        assert run([request])[f"{request.id}/0"].token_ids == expected[f"{request.id}/0"]
    for size in (1, 3, 7, 13):  # prompts in chunks, beside decodes
        assert tokens(run(items, max_batch_tokens=max(size, 4), max_batch_size=min(size, 4))) == expected
    found: dict = {}
    assert tokens(run(items, found, num_blocks=10)) == expected  # preemptions
    assert found["stats"].num_preemptions > 0
    assert tokens(run([*items, *(Request(f"again{r.id}", r.prompt_token_ids, r.params) for r in items)], found)) == (
        expected | {f"again{key}": value for key, value in expected.items()}
    )
    assert found["stats"].num_prefix_hit_tokens > 0


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs(run: Run) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=16)
    one = Request("one", prompt(3, 9), params)
    alone = run([one])["one/0"].token_ids
    other = SamplingParams(temperature=1.5, max_tokens=20)
    crowd = [Request(f"x{i}", prompt(i, 4 + i), other) for i in range(8)]
    assert run([*crowd, one])["one/0"].token_ids == alone
    assert run([*crowd, one], num_blocks=9, max_batch_tokens=16)["one/0"].token_ids == alone
    assert run([Request("two", one.prompt_token_ids, SamplingParams.of(params, seed=8))])["two/0"].token_ids != alone


def test_answers_of_one_request_differ_by_index_and_are_reproducible(run: Run) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=16, n=3)
    items = [Request("r", prompt(1, 8), params, index=i) for i in range(3)]
    first = [run(items)[f"r/{i}"].token_ids for i in range(3)]
    assert len(set(first)) == 3
    assert [run(items[::-1])[f"r/{i}"].token_ids for i in range(3)] == first


@pytest.mark.parametrize("max_batch_tokens", [64, 5])
def test_prompt_logprobs_equal_transformers(run: Run, model_and_reference: tuple, max_batch_tokens: int) -> None:
    tokens = prompt(4, 30)
    params = SamplingParams(max_tokens=0, prompt_logprobs=3)
    other = Request("other", prompt(5, 9), SamplingParams(temperature=0, max_tokens=8))
    output = run([other, Request("r", tokens, params)], max_batch_tokens=max_batch_tokens, max_batch_size=4)["r/0"]
    with torch.inference_mode():
        expected = model_and_reference[1](torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert output.token_ids == ()
    assert output.finish_reason == "length"
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 30
    for i, entry in enumerate(output.prompt_logprobs[1:]):
        assert entry is not None
        assert entry.token_id == tokens[i + 1]
        assert entry.logprob == pytest.approx(float(expected[i, tokens[i + 1]]), abs=1e-3)
        assert [token for token, _ in entry.top] == expected[i].topk(3).indices.tolist()
        assert entry.rank == int((expected[i] > expected[i, tokens[i + 1]]).sum()) + 1


def test_logprobs_of_the_answer_are_the_models(run: Run, model_and_reference: tuple) -> None:
    tokens = prompt(6, 7)
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, repetition_penalty=1.3)
    output = run([Request("r", tokens, params)])["r/0"]
    whole = torch.tensor([tokens + output.token_ids])
    with torch.inference_mode():
        expected = model_and_reference[1](whole).logits[0, 6:].log_softmax(-1)
    for i, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[i, token]), abs=1e-3)
        assert [t for t, _ in entry.top] == expected[i].topk(2).indices.tolist()


class Reader:
    """A drafter that knows the answer, with every sixth token wrong."""

    def __init__(self, token_ids: list[int], answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self.token_ids = token_ids
        self.num_prompt = len(token_ids)
        self.answer = answers[tuple(token_ids)]

    def propose(self, limit: int, num_decodes: int) -> tuple[int, ...]:
        first = len(self.token_ids) - self.num_prompt
        numbered = enumerate(self.answer[first : first + limit], first)
        return tuple((token + 1) % 96 if number % 6 == 5 else token for number, token in numbered)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 3, "top_p": 0.9},
        {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        {"seed": 4, "min_tokens": 9, "stop_token_ids": tuple(range(60)), "logit_bias": {5: 4.0}},
        {"temperature": 0, "logprobs": 2},
    ],
)
def test_drafts_do_not_change_what_is_said(run: Run, options: dict) -> None:
    params = SamplingParams(max_tokens=20, **options)
    items = [Request(f"r{i}", prompt(i, 2 + 7 * i), params, bad_words_ids=((i, 7), (3,))) for i in range(3)]
    plain = run(items)
    answers = {item.prompt_token_ids: plain[f"{item.id}/0"].token_ids for item in items}
    for limits in ({}, {"num_blocks": 8, "max_batch_tokens": 24}):  # the second preempts
        found: dict = {}
        drafted = run(items, found, drafter=lambda token_ids: Reader(token_ids, answers), **limits)
        for key, output in drafted.items():
            assert output.token_ids == plain[key].token_ids
            assert (output.finish_reason, output.stop) == (plain[key].finish_reason, plain[key].stop)
            for entry, expected in zip(output.logprobs, plain[key].logprobs, strict=True):
                assert entry.token_id == expected.token_id
                assert entry.logprob == pytest.approx(expected.logprob, abs=1e-4)
        stats = found["stats"]
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_prompt_lookup_finds_repetitions_and_saves_steps(run: Run) -> None:
    """Tiny random models end in loops."""
    items = [Request("r", prompt(9, 6), SamplingParams(temperature=0, max_tokens=50))]
    found: dict = {}
    assert run(items) == run(items, found, drafter=PromptLookup)
    assert found["stats"].num_accepted_tokens > 5
    assert found["stats"].num_steps == 50 - found["stats"].num_accepted_tokens


def test_what_one_request_asks_for_is_not_lost_among_plain_ones(run: Run) -> None:
    plain = requests(SamplingParams(max_tokens=12, temperature=0))[:3]
    biased = SamplingParams(max_tokens=6, temperature=0, logit_bias={7: 100.0}, logprobs=1)
    penalized = SamplingParams(max_tokens=8, temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    more = [Request("biased", prompt(50, 5), biased), Request("penalized", prompt(51, 5), penalized)]
    alone, together = run(plain), run([*plain, *more])
    assert together["biased/0"].token_ids == (7,) * 6 and len(together["biased/0"].logprobs) == 6
    assert together["penalized/0"].token_ids == run(more[1:])["penalized/0"].token_ids
    assert len(set(together["penalized/0"].token_ids)) > 4
    assert all(together[key].token_ids == output.token_ids for key, output in alone.items())


def test_a_request_without_a_distribution_ends_alone(model_and_reference: tuple) -> None:
    """As with broken weights: the others in its batch go on."""
    model, _ = model_and_reference
    caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(16, BLOCK, torch.device("cpu"))
    scheduler = Scheduler(16, BLOCK, max_batch_size=4, max_batch_tokens=64, max_context=64, max_waiting=10)

    def forward(batch: Batch) -> torch.Tensor:
        logits = model.forward(batch, caches)
        logits[batch.token_ids[batch.logit_rows.long()] == 7] = torch.nan
        return logits

    runner = Runner(forward, BLOCK, torch.device("cpu"), 96)
    params = SamplingParams(temperature=0, max_tokens=4, logit_bias={7: -100})
    for name, tokens in {"good": (1, 2, 3), "bad": (1, 2, 7)}.items():
        scheduler.add(Request(name, tokens, params))
    final = {}
    while (step := scheduler.next_batch()) is not None:
        final |= {o.request_id: o for o in scheduler.update(step, runner.run(step)) if o.is_final}
    assert final["good"].finish_reason == "length"
    assert final["bad"].finish_reason == "error"
    assert "not numbers" in str(final["bad"].error)
    assert scheduler.stats.num_used_blocks == 0
