"""Prompts as vectors: transformers' hidden states, whatever else is computed with them and however they are cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY_MODELS

from turbolm.engine.device_runner import DeviceRunner
from turbolm.engine.graph import plain_steps, record
from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step_device import StepDevice
from turbolm.errors import ContextOverflowError
from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import Ops
from turbolm.ops.cpu.ops import CpuOps
from turbolm.ops.reference import ReferenceOps
from turbolm.ops.sampling import sample
from turbolm.types import Output, Request, SamplingParams

BLOCK = 8
CPU = torch.device("cpu")
LENGTHS = (1, 5, 8, 9, 31, 64)


class Limits:
    max_batch_tokens = 64
    max_batch_size = 16
    max_logit_rows = 64
    max_context = 64


def load(folder: Path, ops: Ops) -> Decoder:
    checkpoint = open_checkpoint(folder)
    return load_decoder(decoder_spec(checkpoint.config), Loader(checkpoint.source, ops), 64)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    TINY_MODELS[request.param].save(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    """By request id, of all prompts."""
    import transformers

    reference = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    with torch.inference_mode():
        for request in prompts():
            hidden = reference(torch.tensor([request.prompt_token_ids])).last_hidden_state[0].double()
            found[f"{request.id}-last"], found[f"{request.id}-mean"] = hidden[-1].numpy(), hidden.mean(0).numpy()
    return found


def prompts(**fields: object) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    ids = [tuple(torch.randint(0, 96, (length,), generator=generator).tolist()) for length in LENGTHS]
    return [Request(f"p{len(tokens)}", tokens, **fields) for tokens in ids]  # type: ignore[arg-type]


def pooled(pooling: str) -> list[Request]:
    return [
        Request(f"{request.id}-{pooling}", request.prompt_token_ids, pooling=pooling)  # type: ignore[arg-type]
        for request in prompts()
    ]


def resolve_tokens(token_ids_t: torch.Tensor, previous_r: torch.Tensor) -> None:
    for row, token in enumerate(token_ids_t.tolist()):
        if token < 0:
            token_ids_t[row] = max(int(previous_r[-1 - token]), 0)


def reference_runner(folder: Path) -> Runner:
    model = load(folder, ReferenceOps(CPU, torch.float32))
    steps = plain_steps(model, cache_spec(model.spec, KvFormat.both("float32")).allocate(64, BLOCK, CPU))
    return Runner(steps.forward, BLOCK, CPU, 96, forward_hidden=steps.forward_hidden)


def native_runner(folder: Path) -> Runner:
    model = load(folder, CpuOps(threads=2))
    steps = record(model, cache_spec(model.spec, KvFormat.both("float32")).allocate(64, BLOCK, CPU), Limits())
    return Runner(steps.forward, BLOCK, CPU, 96, forward_hidden=steps.forward_hidden)


def device_runner(folder: Path) -> DeviceRunner:
    model = load(folder, ReferenceOps(CPU, torch.float32))
    steps = plain_steps(model, cache_spec(model.spec, KvFormat.both("float32")).allocate(64, BLOCK, CPU))
    device = StepDevice(
        steps.forward, None, CPU, lambda *columns: sample(*columns[:-1]), resolve_tokens,
        forward_hidden=steps.forward_hidden,
    )  # fmt: skip
    return DeviceRunner(device, Limits(), BLOCK, 96)


RUNNERS = {"reference": reference_runner, "native": native_runner, "device": device_runner}
SIZES = [{}, {"max_batch_tokens": 11, "max_batch_size": 3}, {"num_blocks": 10}]


def run(runner: Runner | DeviceRunner, requests: list[Request], **limits: int) -> dict[str, Output]:
    """The last outputs; each request has one."""
    sizes = {"num_blocks": 64, "max_batch_size": 16, "max_batch_tokens": 64} | limits
    scheduler = Scheduler(block_size=BLOCK, max_context=64, max_waiting=100, max_logit_rows=64, **sizes)
    for request in requests:
        scheduler.add(request)
    found: dict[str, list[Output]] = {}
    in_flight: deque = deque()
    while scheduler.has_work or in_flight:
        step = scheduler.next_batch() if len(in_flight) < runner.depth else None
        if step is not None:
            in_flight.append((step, runner.submit(step)))
            if len(in_flight) < runner.depth:
                continue
        step, pending = in_flight.popleft()
        for output in scheduler.update(step, pending.results()):
            found.setdefault(output.request_id, []).append(output)
    assert scheduler.stats.num_used_blocks == 0
    ends = {name: [output for output in outputs if output.is_final] for name, outputs in found.items()}
    assert all(len(outputs) == 1 for outputs in ends.values())
    assert all(len(found[request.id]) == 1 for request in requests if request.pooling), "one output each"
    assert len(ends) == len(requests)
    return {name: Output.collect(found[name]) for name in ends}


def vector(output: Output) -> np.ndarray:
    assert output.embedding is not None
    return np.frombuffer(output.embedding, "<f4")


@pytest.mark.parametrize("make", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("limits", SIZES, ids=["whole", "chunks", "preempted"])
def test_vectors_are_those_of_transformers(
    folder: Path, expected: dict[str, np.ndarray], make: Callable, limits: dict[str, int]
) -> None:
    """In whole prompts, in chunks, and where requests lose their blocks and begin again, beside answers being made."""
    answers = [
        Request(f"answer{index}", request.prompt_token_ids[:30], SamplingParams(max_tokens=20, temperature=temperature))
        for index, (request, temperature) in enumerate(zip(prompts(), (0.0, 1.0, 0.0, 0.7, 0.0, 1.0), strict=True))
    ]
    mixed = [request for three in zip(answers, pooled("last"), pooled("mean"), strict=True) for request in three]
    found = run(make(folder), mixed, **limits)
    for name, wanted in expected.items():
        output = found[name]
        assert output.finish_reason == "stop" and output.token_ids == () and output.usage is not None
        error = np.abs(vector(output) - wanted).max() / np.abs(wanted).max()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    alone = run(make(folder), answers)
    for name, output in alone.items():
        assert found[name].token_ids == output.token_ids, "company changes no answer"


def test_host_sampled_answers_share_steps_with_chunks(folder: Path, expected: dict[str, np.ndarray]) -> None:
    """Steps that are computed at once follow such that are in flight, with further chunks of the same prompts."""
    answers = [
        Request(f"answer{index}", (1 + index, 2), SamplingParams(max_tokens=3 + 2 * index, logprobs=1, temperature=0.0))
        for index in range(3)
    ]
    requests = [*pooled("mean"), *answers]
    found = run(device_runner(folder), requests, max_batch_tokens=9, max_batch_size=6)
    for request in pooled("mean"):
        wanted = expected[request.id]
        assert np.abs(vector(found[request.id]) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_a_cached_prefix_serves_the_last_token_and_not_the_mean(folder: Path, expected: dict[str, np.ndarray]) -> None:
    runner = reference_runner(folder)
    scheduler = Scheduler(64, BLOCK, 16, 64, 64, 100, max_logit_rows=64)
    found: dict[str, Output] = {}
    for request in (pooled("last")[4], Request("again", pooled("last")[4].prompt_token_ids, pooling="last"),
                    pooled("mean")[4]):  # fmt: skip
        scheduler.add(request)
        while (step := scheduler.next_batch()) is not None:
            for output in scheduler.update(step, runner.run(step)):
                found[output.request_id] = output
    assert found["again"].usage.cached_tokens == 24 and found["p31-mean"].usage.cached_tokens == 0
    assert np.allclose(vector(found["again"]), expected["p31-last"], rtol=1e-4, atol=1e-4)
    assert np.allclose(vector(found["p31-mean"]), expected["p31-mean"], rtol=1e-4, atol=1e-4)


def test_the_whole_context_may_be_pooled_and_no_more() -> None:
    scheduler = Scheduler(64, BLOCK, 16, 64, 64, 100)
    scheduler.add(Request("fits", (1,) * 64, pooling="mean"))
    with pytest.raises(ContextOverflowError, match="65 tokens and the context 64"):
        scheduler.add(Request("too long", (1,) * 65, pooling="mean"))
