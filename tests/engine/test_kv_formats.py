"""A tiny model over a quantized KV cache: how steps are cut must not change what is said."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from tiny import TINY_MODELS

from turbolm.engine.runner import Runner
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import SchedulerStats
from turbolm.kv import KvFormat
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.decoder import Decoder, cache_spec, load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops.reference import ReferenceOps
from turbolm.types import Output, Request, SamplingParams

BLOCK = 8
CPU = torch.device("cpu")
FORMATS = [
    KvFormat.both("int8"),
    KvFormat.both("int4"),
    KvFormat.both("fp8"),
    KvFormat("int8", "int4", "float32", skipped=(0, 2)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("qwen3")
    TINY_MODELS["qwen3"].save(folder)
    checkpoint = open_checkpoint(folder)
    loader = Loader(checkpoint.source, ReferenceOps(CPU, torch.float32))
    return load_decoder(decoder_spec(checkpoint.config), loader, 64)


def run(
    model: Decoder, kv: KvFormat, requests: Iterable[Request], num_blocks: int = 64, **limits: int
) -> tuple[dict[str, Output], SchedulerStats]:
    """Outputs by id of a fresh engine that runs requests to their end."""
    caches = cache_spec(model.spec, kv).allocate(num_blocks, BLOCK, CPU)
    sizes = {"max_batch_size": 16, "max_batch_tokens": 64, "max_context": 64, "max_waiting": 100} | limits
    scheduler = Scheduler(num_blocks=num_blocks, block_size=BLOCK, max_logit_rows=64, **sizes)
    runner = Runner(lambda batch: model.forward(batch, caches), BLOCK, CPU, 96)
    for request in requests:
        scheduler.add(request)
    deltas: dict[str, list[Output]] = {}
    while (step := scheduler.next_batch()) is not None:
        for output in scheduler.update(step, runner.run(step)):
            deltas.setdefault(output.request_id, []).append(output)
    return {key: Output.collect(items) for key, items in deltas.items()}, scheduler.stats


def requests(**params: object) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    shared, *prompts = (
        tuple(torch.randint(0, 96, (length,), generator=generator).tolist()) for length in (16, 1, 9, 4, 30, 2, 6)
    )
    prompts[-2:] = [shared + prompt for prompt in prompts[-2:]]
    sampling = SamplingParams.of(None, **({"temperature": 0, "max_tokens": 24} | params))
    return [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_answers_do_not_depend_on_chunks_prefixes_and_preemption(model: Decoder, kv: KvFormat) -> None:
    items = requests()
    expected = {name: output.token_ids for name, output in run(model, kv, items)[0].items()}
    for request in items[2:5:2]:  # alone
        assert run(model, kv, [request])[0][request.id].token_ids == expected[request.id]
    chunked, _ = run(model, kv, items, max_batch_tokens=5, max_batch_size=4)
    assert {name: output.token_ids for name, output in chunked.items()} == expected
    crowded, stats = run(model, kv, items, num_blocks=9)
    assert stats.num_preemptions > 0
    assert {name: output.token_ids for name, output in crowded.items()} == expected
    again = [Request(f"again-{r.id}", r.prompt_token_ids, r.params) for r in items]
    repeated, stats = run(model, kv, [*items, *again])
    assert stats.num_prefix_hit_tokens > 0
    assert {name.removeprefix("again-"): o.token_ids for name, o in repeated.items() if "again" in name} == expected


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.3), ("int8", 0.05), ("int4", 0.6)])
def test_what_quantization_costs_is_small(model: Decoder, kind: str, most: float) -> None:
    """Mean change of the log probability of the same prompt's tokens, in nats; not 0: something was rounded."""

    def logprobs(kv: KvFormat) -> torch.Tensor:
        items = requests(max_tokens=0, prompt_logprobs=0)[3:]
        found, _ = run(model, kv, items)
        return torch.tensor([e.logprob for r in items for e in found[r.id].prompt_logprobs[1:]])  # type: ignore[union-attr,index]

    change = (logprobs(KvFormat.both(kind)) - logprobs(KvFormat.both("float32"))).abs().mean()  # type: ignore[arg-type]
    assert 1e-4 < change < most
