"""A draft model: what it proposes changes how fast an answer comes, and never what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Rows
from typing import Any

import pytest
import torch
from tiny import TINY_MODELS

from turbolm.config import EngineConfig
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.draft import DraftModel, PairedRunner
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import Costs, PromptLookup
from turbolm.engine.step import SchedulerStats
from turbolm.engine.step_device import StepDevice
from turbolm.errors import ConfigError
from turbolm.kv import KvFormat
from turbolm.loading import load_model
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops.adjustments import adjust
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.sampling import sample
from turbolm.types import Output, Request, SamplingParams

BLOCK = 8
CPU = torch.device("cpu")
CHEAP = Costs(0.01, draft=0.01)


class Limits:
    max_batch_tokens = 64
    max_batch_size = 16
    max_logit_rows = 64
    max_context = 64


def resolve_tokens(token_ids_t: torch.Tensor, previous_r: torch.Tensor) -> None:
    for row, token in enumerate(token_ids_t.tolist()):
        if token < 0:
            token_ids_t[row] = max(int(previous_r[-1 - token]), 0)


def sample_rows(*arguments: Any) -> torch.Tensor:
    return sample(*arguments[:-1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Decoder]:
    """A model, and another with the same vocabulary."""
    found = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("model")
        TINY_MODELS["llama-tied"].save(folder, seed=seed)
        checkpoint = open_checkpoint(folder)
        ops = ReferenceOps(CPU, torch.float32)
        found.append(load_decoder(decoder_spec(checkpoint.config), Loader(checkpoint.source, ops), 64))
    return found


def runner_of(model: Decoder, num_blocks: int, overlapped: bool) -> Runner | DeviceRunner:
    caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(num_blocks, BLOCK, CPU)

    def forward(batch: object) -> torch.Tensor:
        return model.forward(batch, caches)

    if not overlapped:
        return Runner(forward, BLOCK, CPU, 96)
    device = StepDevice(forward, None, CPU, sample_rows, resolve_tokens, adjust=adjust, counts_shape=(8, 96))
    return DeviceRunner(device, Limits(), BLOCK, 96)


def run(
    model: Decoder, draft: Decoder | None, requests: Rows[Request], *, overlapped: bool = False,
    costs: Costs = CHEAP, num_blocks: int = 64, **options: Any,
) -> tuple[dict[str, tuple[int, ...]], SchedulerStats]:  # fmt: skip
    """Answers by request, and what the scheduler counted."""
    runner: Any = runner_of(model, num_blocks, overlapped)
    draft_model = None
    if draft is not None:
        draft_runner = runner_of(draft, num_blocks, overlapped)
        draft_model = DraftModel(draft_runner, 16, costs)
        runner = PairedRunner(runner, draft_runner)
    scheduler = Scheduler(
        num_blocks=num_blocks, block_size=BLOCK, max_batch_size=8, max_batch_tokens=64, max_context=64, max_waiting=99,
        max_logit_rows=64, draft_model=draft_model, **options,
    )  # fmt: skip
    for request in requests:
        scheduler.add(request)
    deltas: dict[str, list[Output]] = {}
    in_flight: deque = deque()
    while scheduler.has_work or in_flight:
        step = scheduler.next_batch() if len(in_flight) < runner.depth else None
        if step is not None:
            in_flight.append((step, runner.submit(step)))
            if len(in_flight) < runner.depth:
                continue
        step, pending = in_flight.popleft()
        for output in scheduler.update(step, pending.results()):
            deltas.setdefault(output.request_id, []).append(output)
    assert scheduler.stats.num_used_blocks == 0
    return {key: Output.collect(items).token_ids for key, items in deltas.items()}, scheduler.stats


def requests(count: int = 3, **options: Any) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(0, 96, (3 + 9 * i,), generator=generator).tolist()) for i in range(count)]
    return [
        Request(f"r{i}", prompt, SamplingParams.of(SamplingParams(max_tokens=24), seed=i, **options))
        for i, prompt in enumerate(prompts)
    ]


VARIANTS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 20},
    "penalties": {"temperature": 0.5, "repetition_penalty": 1.4, "frequency_penalty": 0.6},
    "logprobs": {"temperature": 0.7, "logprobs": 1},
}


@pytest.mark.parametrize("overlapped", [False, True])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_an_answer_is_the_same_with_a_good_draft_model_a_bad_one_and_none(
    models: list[Decoder], options: dict, overlapped: bool
) -> None:
    items = requests(**options)
    plain, before = run(models[0], None, items, overlapped=overlapped)
    for draft in models:
        found, stats = run(models[0], draft, items, overlapped=overlapped)
        assert found == plain
        assert stats.num_draft_tokens > 0
        if draft is models[0]:  # it knows what the model says
            assert stats.num_accepted_tokens == stats.num_draft_tokens
            assert stats.num_steps < before.num_steps / 2


@pytest.mark.parametrize("overlapped", [False, True])
def test_preempted_sequences_and_shared_blocks_are_drafted_rightly(models: list[Decoder], overlapped: bool) -> None:
    items = [*requests(4), Request("again", requests(4)[3].prompt_token_ids, SamplingParams(max_tokens=9, seed=7))]
    plain, _ = run(models[0], None, items, overlapped=overlapped, num_blocks=12)
    found, stats = run(models[0], models[0], items, overlapped=overlapped, num_blocks=12)
    assert found == plain
    assert stats.num_preemptions > 0
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


def test_drafts_that_are_wrong_or_dear_are_given_up(models: list[Decoder]) -> None:
    item = [Request("a", (1, 2, 3), SamplingParams(max_tokens=58, temperature=2.0, seed=3))]
    _, stats = run(models[0], models[1], item, costs=Costs(0.2, draft=0.3))
    assert stats.num_draft_tokens < 15
    _, stats = run(models[0], models[0], item, costs=Costs(0.2, draft=1.0))  # as slow as the model itself
    assert stats.num_draft_tokens <= 1


def test_prompt_lookup_goes_first_and_both_leave_the_text_alone(models: list[Decoder]) -> None:
    items = [Request("a", (5, 6, 7, 8) * 6, SamplingParams(max_tokens=24, temperature=0.0))]
    plain, _ = run(models[0], None, items)
    found, stats = run(models[0], models[0], items, drafter=PromptLookup)
    assert found == plain and stats.num_accepted_tokens > 0


def test_the_real_thing_drafts_for_itself_and_refuses_others(smollm2_path: object) -> None:
    name = str(smollm2_path)
    with pytest.raises(ConfigError, match="draft_model"):
        load_model("null", EngineConfig(draft_model=name), progress=False)
    loaded = load_model(name, EngineConfig(draft_model=name, max_context=256, speculation="auto"), progress=False)
    assert loaded.config.draft_model and loaded.config.draft_cost == 1.0
    loaded.runner.close()
