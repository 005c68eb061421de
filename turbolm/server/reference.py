"""What answers are compared with: the model at a higher precision, in an engine of its own or at a URL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import httpx

from turbolm.config import EngineConfig, ResolvedConfig, resolve
from turbolm.engine.build import model_needs
from turbolm.errors import CapacityError, ConfigError, EngineError
from turbolm.hub import fetch
from turbolm.llm import AsyncLLM
from turbolm.loading import NULL_MODEL, load_text
from turbolm.models.checkpoint import open_checkpoint
from turbolm.models.registry import decoder_spec
from turbolm.ops.hardware import probe
from turbolm.types import Output, SamplingParams

_STEP_TOKENS = {"cpu": 64, "cuda": 512}  # a step can't be cut off: a live request may have to wait for one
_LAST = 1 << 20  # priority: after everything else
_SECONDS = 120.0  # without an answer from a URL
_UNSERVED = (400, 404, 405, 422, 501)  # how servers refuse to score a prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer that was served."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    is_greedy: bool
    """Each token was the likeliest, and nothing else had a say."""
    log_likelihood: float | None = None
    """Of the answer, where the request asked for logprobs."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How a reference finds an answer of `num_tokens`."""

    num_tokens: int
    num_common: int
    """Tokens before the first at which the reference finds another likelier: there a greedy answer of it diverges."""
    num_agreed: int
    """Tokens that the reference finds likeliest, given those before."""
    log_likelihood: float | None
    """None: it can only generate."""


class Reference(Protocol):
    """Whatever it is that answers are compared with."""

    title: str
    is_here: bool
    """It shares the machine with the model that is served, and must wait for it."""

    async def judge(self, sample: Sample) -> Finding | None:
        """None: it can't say anything about such a sample. Raises TurbolmError."""

    async def close(self) -> None: ...


def compare(logprobs: Sequence[float], is_likeliest: Sequence[bool]) -> Finding:
    """From an answer's tokens under the reference."""
    num_common = next((number for number, same in enumerate(is_likeliest) if not same), len(is_likeliest))
    return Finding(len(logprobs), num_common, sum(is_likeliest), math.fsum(logprobs))


class EngineReference:
    """A second engine."""

    is_here = True

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm = llm
        self.title = f"{llm.model_name} with KV cache in {llm.config.kv}"

    async def judge(self, sample: Sample) -> Finding | None:
        """One pass over prompt and answer says what a greedy answer would have been up to where it differs."""
        token_ids = [*sample.prompt_token_ids, *sample.token_ids]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        output = Output.collect([delta async for delta in self.llm.generate(token_ids, params, priority=_LAST)])
        if output.error is not None:
            raise output.error
        entries = [entry for entry in output.prompt_logprobs[len(sample.prompt_token_ids) :] if entry is not None]
        return compare([entry.logprob for entry in entries], [entry.rank == 1 for entry in entries])

    async def close(self) -> None:
        await self.llm.close()


class UrlReference:
    """An OpenAI-compatible server of a model with the same tokenizer."""

    is_here = False

    def __init__(self, url: str, model: str, api_key: str | None, served: AsyncLLM) -> None:
        base = url.rstrip("/")
        self.title = f"{model} at {base}"
        self._url = f"{base if base.endswith('/v1') else f'{base}/v1'}/completions"
        self._model = model
        self._tokenizer = served.tokenizer
        self._can_score = True
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(timeout=_SECONDS, headers=headers)

    async def judge(self, sample: Sample) -> Finding | None:
        if self._can_score:
            finding = await self._score(sample)
            if finding is not None:
                return finding
            self._can_score = False
        return await self._generate(sample) if sample.is_greedy else None

    async def close(self) -> None:
        await self._client.aclose()

    async def _score(self, sample: Sample) -> Finding | None:
        """None: the server doesn't score prompts."""
        token_ids = [*sample.prompt_token_ids, *sample.token_ids]
        body = {"prompt": token_ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        choice = await self._ask(body, may_refuse=True)
        found = choice and choice.get("logprobs")
        if not found:
            return None
        rows = slice(len(sample.prompt_token_ids), len(token_ids))
        logprobs, tops = found["token_logprobs"][rows], found["top_logprobs"][rows]
        if len(logprobs) != len(sample.token_ids):
            raise EngineError(f"{self.title} reads {len(token_ids)} tokens as another number: the tokenizers differ")
        best = [max((top or {}).values(), default=own) for top, own in zip(tops, logprobs, strict=True)]
        return compare(logprobs, [own >= most for own, most in zip(logprobs, best, strict=True)])

    async def _generate(self, sample: Sample) -> Finding:
        """Its own greedy answer; what follows where it differs can't be compared."""
        body = {"prompt": list(sample.prompt_token_ids), "max_tokens": len(sample.token_ids), "temperature": 0}
        choice = await self._ask(body) or {}
        text, low, high = str(choice.get("text", "")), 0, len(sample.token_ids)
        while low < high:  # the most tokens whose text it begins with
            middle = (low + high + 1) // 2
            is_common = text.startswith(self._tokenizer.decode(sample.token_ids[:middle]))
            low, high = (middle, high) if is_common else (low, middle - 1)
        return Finding(len(sample.token_ids), low, low, None)

    async def _ask(self, body: dict[str, Any], *, may_refuse: bool = False) -> dict[str, Any] | None:
        """The first choice. EngineError where there is none; None where the server refuses, if it may."""
        try:
            response = await self._client.post(self._url, json={"model": self._model, **body})
            if may_refuse and response.status_code in _UNSERVED:
                return None
            response.raise_for_status()
            return dict(response.json()["choices"][0])
        except httpx.HTTPStatusError as error:
            raise EngineError(f"{self._url} answered {error.response.status_code}") from None
        except httpx.HTTPError as error:
            raise EngineError(f"can't reach {self._url} ({str(error) or type(error).__name__})") from None
        except (ValueError, LookupError, TypeError):
            raise EngineError(f"{self._url} isn't an OpenAI-compatible server: it sent no choices") from None


def open_engine(model: str, engine: EngineConfig, served: AsyncLLM, *, isolated: bool) -> EngineReference:
    """Loads `model`, unquantized but for what its checkpoint is, beside `served`. ConfigError where that would be no
    other precision or another tokenizer; CapacityError where both don't fit."""
    config = EngineConfig(
        device=engine.device,
        dtype=engine.dtype,
        kernels=engine.kernels,
        threads=engine.threads,
        tensor_parallel=engine.tensor_parallel,
        max_context=served.config.max_context,
        max_batch_size=1,
        max_batch_tokens=_STEP_TOKENS[served.config.device],
        prefix_cache=False,
        speculation="off",
    )
    path = None if model == NULL_MODEL else fetch(model).path
    vocab_size = load_text(model, path).vocab_size
    if vocab_size != served.tokenizer.vocab_size:
        raise ConfigError(
            f"shadow_model '{model}' has {vocab_size} tokens, the model that is served "
            f"{served.tokenizer.vocab_size}: name one with the same tokenizer"
        )
    if path is not None:
        _check_room(model, path, config, served.config)
    return EngineReference(AsyncLLM(model, config, isolated=isolated))


def _check_room(model: str, path: Path, config: EngineConfig, served: ResolvedConfig) -> None:
    """Counts the second model as `config.resolve` does, in what the first leaves when its KV cache is full."""
    checkpoint = open_checkpoint(path)
    needs = model_needs(model, checkpoint, decoder_spec(checkpoint.config), config.tensor_parallel)
    hardware = probe()
    if served.device == "cpu":  # whose KV cache takes memory as it fills
        pool = served.pool_tokens * served.kv_bytes_per_token
        hardware = replace(hardware, free_memory=max(0, hardware.free_memory - pool))
    try:
        resolve(config, needs, hardware)
    except CapacityError as error:
        raise CapacityError(
            f"there is no room for a second model to compare answers with: {error}. Lower kv_memory or max_context, or "
            "name a server that has it with --shadow-url"
        ) from None
