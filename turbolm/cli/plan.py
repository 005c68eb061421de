"""`turbolm plan`: what fits where, and how fast, from a model's headers alone."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from turbolm.config import DEFAULT_MODEL

_ModelName = Annotated[str | None, Parameter(show_default=lambda _: DEFAULT_MODEL)]


def plan(
    model: _ModelName = None,
    /,
    *,
    gpu: Annotated[tuple[str, ...], Parameter(negative_iterable=(), show_default=False)] = (),
    cpu: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    context: int | None = None,
    concurrency: Annotated[int, Parameter(show_default=False)] = 0,
    json: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
) -> None:
    """Say what a model takes: memory of weights and KV cache in 16, 8 and 4 bits, the longest contexts, how many at
    once, tokens per second. Reads headers, no weights; those of a model on the Hugging Face Hub are not downloaded.

    Parameters
    ----------
    model
        A short name, folder, .gguf file, hf:org/name[:quantization], or the config.json of a model.
    gpu
        A card, such as h200, 4090x2 or 24GB; may be given several times. Without it: this machine.
    cpu
        This machine's CPU.
    context
        Tokens of prompt and answer of each sequence; 4096, or what the model was made for, if less.
    concurrency
        Sequences at once; without it: as many as fit.
    json
        Print everything as JSON.
    """
    from turbolm.planner.run import run  # torch, which --help can do without

    run(model or DEFAULT_MODEL, gpu, use_cpu=cpu, context=context, concurrency=concurrency, as_json=json)
