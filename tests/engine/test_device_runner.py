"""Steps in flight: what an overlapped runner says equals what the plain one says, token for token."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from tiny import TINY_MODELS

from turbolm.engine.batch import StepArrays
from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.graph import DecodeGraphs, GraphKey
from turbolm.engine.ranks import StepOrder
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.speculative import Costs, PromptLookup
from turbolm.engine.step_device import StepDevice
from turbolm.kv import KvFormat
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
NUM_SLOTS = 6  # fewer than requests: penalties of some are the host's work


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
    """Without the filters where it's said that there are none."""
    *columns, has_filters = arguments
    if not has_filters:
        columns[2], columns[3], columns[4] = (
            torch.full_like(columns[i], neutral) for i, neutral in ((2, 0), (3, 1), (4, 0))
        )
    return sample(*columns)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("model")
    TINY_MODELS["llama-tied"].save(folder)
    checkpoint = open_checkpoint(folder)
    return load_decoder(
        decoder_spec(checkpoint.config), Loader(checkpoint.source, ReferenceOps(CPU, torch.float32)), 64
    )


class ReplayedGraphs(DecodeGraphs):
    """Graphs whose replay is a call of the model, on their inputs."""

    def capture_all(self) -> None:
        self._captured = dict.fromkeys(self._pending)  # type: ignore[arg-type]

    def replay(self, key: GraphKey) -> torch.Tensor:
        batch = self._batch(key)
        batch.block_tables[batch.context_lens == 0] = 0  # what is there is not to be read, as kernels don't
        return self._forward(batch)


def device_of(model: Decoder, forward: Any, max_shared_rows: int, **options: Any) -> StepDevice:
    with mock.patch.multiple(torch.cuda, graph_pool_handle=mock.DEFAULT, Stream=mock.DEFAULT):
        graphs = ReplayedGraphs(forward, Limits(), BLOCK, CPU, max_shared_rows=max_shared_rows)
    graphs.capture_all()
    return StepDevice(
        forward, graphs, CPU, **({"sample_rows": sample_rows} | options), resolve_tokens=resolve_tokens, adjust=adjust,
        counts_shape=(NUM_SLOTS, 96),
    )  # fmt: skip


def forward_of(model: Decoder, num_blocks: int) -> Any:
    # The reference stores what has slot -1 in the last slot of all.
    caches = cache_spec(model.spec, KvFormat.both("float32")).allocate(num_blocks + 1, BLOCK, CPU)
    return lambda batch: model.forward(batch, caches)


class Rank:
    """Of ranks that have the whole model each. As `Followers`: another rank, to which steps go as bytes."""

    def __init__(self, model: Decoder, num_blocks: int) -> None:
        plain, self.tokens = forward_of(model, num_blocks), []
        logits = torch.empty(64, 96)

        def forward(batch: Any) -> torch.Tensor:
            found = plain(batch)
            return logits[: len(found)].copy_(found)

        def sample_shared(own: torch.Tensor, *columns: Any) -> torch.Tensor:
            assert own.data_ptr() == logits.data_ptr(), "other ranks look for them there"
            self.tokens.append(sample_rows(own, *columns))
            return self.tokens[-1]

        self.device = device_of(model, forward, 64, sample_rows=sample_shared, gather_logits=lambda own: own)

    def step(self, *order: Any) -> None:
        self.device.compute(*StepOrder.decode(memoryview(b"".join(StepOrder(*order).encode()))))

    def check(self, seconds: float) -> None:
        """It is not lost."""

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()


def run(
    model: Decoder,
    requests: Iterable[Request],
    overlapped: bool,
    drafter: Any = None,
    max_shared_rows: int = 16,
    ranks: list[Rank] | None = None,
    **limits: int,
) -> dict[str, Output]:
    """`ranks`: two, of which the first one leads."""
    sizes = {"num_blocks": 64, "max_batch_size": 16, "max_batch_tokens": 64} | limits
    scheduler = Scheduler(
        block_size=BLOCK, max_context=64, max_waiting=100, max_logit_rows=64, drafter=drafter, **sizes
    )

    forward = forward_of(model, sizes["num_blocks"])
    runner: Runner | DeviceRunner = Runner(forward, BLOCK, CPU, 96)
    if ranks is not None:
        runner = DeviceRunner(ranks[0].device, Limits(), BLOCK, 96, cast(Any, ranks[1]))
    elif overlapped:
        runner = DeviceRunner(device_of(model, forward, max_shared_rows), Limits(), BLOCK, 96)
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
            deltas.setdefault(f"{output.request_id}/{output.index}", []).append(output)
    assert (runner.num_replays > 0) == overlapped
    return {key: Output.collect(items) for key, items in deltas.items()}


def requests(**options: object) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(0, 96, (1 + 4 * i,), generator=generator).tolist()) for i in range(10)]
    words = options.pop("bad_words_ids", ())
    return [
        Request(
            f"r{i}", prompt, SamplingParams.of(SamplingParams(max_tokens=4 + i), seed=i, **options), bad_words_ids=words
        )
        for i, prompt in enumerate(prompts)
    ]


VARIANTS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.2, "top_p": 0.9},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "logprobs": {"temperature": 0.7, "logprobs": 2},
    "prompt logprobs": {"temperature": 0.7, "prompt_logprobs": 1},
    "bans": {"temperature": 1.0, "min_tokens": 3, "logit_bias": {5: 4.0}, "stop_token_ids": (5, 6)},
    "bad words": {"temperature": 0.3, "bad_words_ids": tuple((i, j) for i in range(96) for j in range(0, 96, 3))},
    "penalties, logprobs": {"temperature": 0.0, "frequency_penalty": 1.5, "logprobs": 1},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 11, "max_batch_size": 3}, {"num_blocks": 12}])
def test_overlapped_steps_give_the_same_answers(model: Decoder, options: dict, limits: dict) -> None:
    items = requests(**options)
    plain, found = run(model, items, False, **limits), run(model, items, True, **limits)
    assert {key: output.token_ids for key, output in found.items()} == {
        key: output.token_ids for key, output in plain.items()
    }
    for key, output in found.items():
        assert output.finish_reason == plain[key].finish_reason
        assert output.usage == plain[key].usage
        assert [entry.token_id for entry in output.logprobs] == [entry.token_id for entry in plain[key].logprobs]
        assert len(output.prompt_logprobs) == len(plain[key].prompt_logprobs)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.0, "presence_penalty": 0.2, "min_tokens": 9}]
)
def test_drafts_are_verified_by_rows_among_the_decodes(model: Decoder, options: dict) -> None:
    prompts = [(3, 4, 5, 6) * 5, (7, 8) * 9, tuple(range(20))]
    items = [
        Request(f"r{i}", prompt, SamplingParams.of(SamplingParams(max_tokens=24, temperature=0.0), **options))
        for i, prompt in enumerate(prompts)
    ]
    shared: list[bool] = []

    def find(graphs: DecodeGraphs, arrays: StepArrays) -> GraphKey | None:
        shared.append(arrays.shares_context)
        return found(graphs, arrays)

    found = DecodeGraphs.find
    plain = run(model, items, False)
    with mock.patch.object(DecodeGraphs, "find", find):
        drafted = run(model, items, True, drafter=partial(PromptLookup, costs=Costs(0.01)))
    assert any(shared) and not all(shared)
    assert {key: output.token_ids for key, output in drafted.items()} == {
        key: output.token_ids for key, output in plain.items()
    }


@pytest.mark.parametrize("limits", [{}, {"max_batch_tokens": 11, "max_batch_size": 3}, {"num_blocks": 12}])
@pytest.mark.parametrize("options", [{"temperature": 1.2}, {"temperature": 0.0, "presence_penalty": 0.5}])
def test_small_steps_with_prompts_are_served_by_graphs(model: Decoder, options: dict, limits: dict) -> None:
    steps: list[StepArrays] = []
    compute = StepDevice.compute

    def computed(device: StepDevice, arrays: StepArrays, *others: Any) -> Any:
        steps.append(arrays)
        replays = device.num_replays
        result = compute(device, arrays, *others)
        assert device.num_replays == replays + 1
        return result

    items = requests(**options)
    plain = run(model, items, False, **limits)
    with mock.patch.object(StepDevice, "compute", computed):
        found = run(model, items, True, max_shared_rows=64, **limits)
    assert any(len(arrays.logit_rows) < len(arrays.token_ids) for arrays in steps), "prompts' tokens were among them"
    assert {key: output.token_ids for key, output in found.items()} == {
        key: output.token_ids for key, output in plain.items()
    }


def test_requests_of_all_kinds_share_steps(model: Decoder) -> None:
    items = [
        Request(f"{name}-{request.id}", request.prompt_token_ids, request.params)
        for name, options in VARIANTS.items()
        for request in requests(**options)[:4]
    ]
    plain, found = run(model, items, False), run(model, items, True, max_shared_rows=64)
    assert {key: output.token_ids for key, output in found.items()} == {
        key: output.token_ids for key, output in plain.items()
    }


@pytest.mark.parametrize("drafter", [None, partial(PromptLookup, costs=Costs(0.01))], ids=["plain", "drafts"])
def test_other_ranks_choose_the_same_tokens_at_the_same_steps(model: Decoder, drafter: Any) -> None:
    """Small steps with prompts, drafts and adjustments among them; the host chooses in between."""
    items = [
        Request(f"{name}-{request.id}", request.prompt_token_ids, request.params, bad_words_ids=request.bad_words_ids)
        for name in ("greedy", "penalties", "bans", "bad words", "logprobs")
        for request in requests(**dict(VARIANTS[name]))[:5]
    ]
    items += [Request(f"again {i}", (3, 4, 5, 6) * i, SamplingParams(temperature=0, max_tokens=20)) for i in (2, 4)]
    ranks = [Rank(model, 64) for _ in range(2)]
    plain, found = run(model, items, False), run(model, items, True, drafter, ranks=ranks)
    assert {key: output.token_ids for key, output in found.items()} == {
        key: output.token_ids for key, output in plain.items()
    }
    leading, other = ranks
    assert len(leading.tokens) == len(other.tokens) > 10 and all(map(torch.equal, leading.tokens, other.tokens))
    assert leading.device.num_replays == other.device.num_replays > 10
