"""LMDeploy's calling style over `LLM`, so that its users can move: `pipeline`, `GenerationConfig`,
`TurbomindEngineConfig`, `Response`, with LMDeploy's names and defaults.

    pipe = pipeline("smollm2-135m")
    print(pipe(["Hi, pls intro yourself", "Shanghai is"]))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from turbolm.config import DEFAULT_MODEL, DType, EngineConfig
from turbolm.errors import ConfigError, RequestError
from turbolm.llm import LLM
from turbolm.types import Completion, Output, SamplingParams, TokenLogprob

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """LMDeploy's sampling options. Without `do_sample` the answer is greedy."""

    n: int = 1
    max_new_tokens: int = 512
    do_sample: bool = False
    top_p: float = 1.0
    top_k: int = 50
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: list[str] | None = None
    bad_words: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_token_ids: list[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            n=self.n,
            max_tokens=self.max_new_tokens,
            min_tokens=self.min_new_tokens or 0,
            temperature=self.temperature if self.do_sample else 0.0,
            top_k=self.top_k if self.do_sample else 0,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
            seed=self.random_seed,
            stop=tuple(self.stop_words or ()),
            bad_words=tuple(self.bad_words or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=dict.fromkeys(self.bad_token_ids or (), -100.0),
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class TurbomindEngineConfig:
    """LMDeploy's engine options, as far as they have a meaning here; also as PytorchEngineConfig."""

    dtype: DType = "auto"
    tp: int = 1
    session_len: int | None = None
    max_batch_size: int | None = None
    cache_block_seq_len: int = 64
    enable_prefix_caching: bool = False
    quant_policy: int = 0
    max_prefill_token_num: int = 8192

    def engine_config(self) -> EngineConfig:
        for name, value, only in (("tp", self.tp, 1), ("quant_policy", self.quant_policy, 0)):
            if value != only:
                raise ConfigError(f"{name} is {value}; only {only} is served")
        return EngineConfig(
            dtype=self.dtype,
            max_context=self.session_len or 0,
            max_batch_size=self.max_batch_size or 0,
            block_size=self.cache_block_seq_len,
            prefix_cache=self.enable_prefix_caching,
            max_batch_tokens=self.max_prefill_token_num,
        )


PytorchEngineConfig = TurbomindEngineConfig


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, or a delta of it under `stream_infer`."""

    text: str
    generate_token_len: int
    input_token_len: int
    finish_reason: str | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float]] | None = None
    index: int = 0


class Pipeline:
    """Made by `pipeline`. `llm` is turbolm's own interface to the same model."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Response | list[Response]:
        """Answer one prompt (→ a Response) or a list of them (→ a list). Text goes through the chat
        template unless `do_preprocess` is off."""
        params = (gen_config or GenerationConfig()).sampling_params()
        is_one, given = _as_list(prompts)
        if do_preprocess:
            completions = self.llm.chat([_messages(prompt) for prompt in given], params)
        else:
            completions = self.llm.generate([_text(prompt) for prompt in given], params)
        responses = [
            _response(completion, output, index * params.n + output.index)
            for index, completion in enumerate(completions)
            for output in completion.outputs
        ]
        return responses[0] if is_one and params.n == 1 else responses

    def stream_infer(
        self,
        prompts: Prompt | Sequence[Prompt],
        gen_config: GenerationConfig | None = None,
        *,
        do_preprocess: bool = True,
    ) -> Iterator[Response]:
        """Deltas of all answers as they come; `index` says whose. Leaving the loop cancels them."""
        params = (gen_config or GenerationConfig()).sampling_params()
        _, given = _as_list(prompts)
        counts = [0] * len(given)
        jobs = [_messages(prompt) if do_preprocess else _text(prompt) for prompt in given]
        for number, delta in self.llm.stream_many(jobs, params):
            counts[number] += len(delta.token_ids)
            num_input = delta.usage.prompt_tokens if delta.usage else 0
            index = number * params.n + delta.index
            yield Response(
                text=delta.text,
                generate_token_len=counts[number],
                input_token_len=num_input,
                finish_reason=delta.finish_reason,
                token_ids=list(delta.token_ids),
                logprobs=_logprobs(delta.logprobs),
                index=index,
            )

    def get_ppl(self, input_ids: Sequence[int] | Sequence[Sequence[int]]) -> list[float]:
        """The mean negative log-likelihood per token of each list of token ids (LMDeploy's "ppl")."""
        given: Any = [input_ids] if input_ids and isinstance(input_ids[0], int) else input_ids
        return [-score.log_likelihood / score.num_scored for score in self.llm.score(given)]

    def close(self) -> None:
        self.llm.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pipeline(
    model_path: str = DEFAULT_MODEL, backend_config: TurbomindEngineConfig | EngineConfig | None = None
) -> Pipeline:
    """A model to call, in LMDeploy's style."""
    config = backend_config.engine_config() if isinstance(backend_config, TurbomindEngineConfig) else backend_config
    return Pipeline(LLM(model_path, config))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[bool, list[Prompt]]:
    """(whether it is one prompt, the prompts)."""
    is_one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
    given: Any = [prompts] if is_one else list(prompts)
    return is_one, given


def _messages(prompt: Prompt) -> Sequence[Mapping[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise RequestError("do_preprocess=False takes plain text, not messages", "prompts")
    return prompt


def _response(completion: Completion, output: Output, index: int) -> Response:
    if output.error is not None:
        raise output.error
    usage = output.usage
    return Response(
        text=output.text,
        generate_token_len=usage.completion_tokens if usage else len(output.token_ids),
        input_token_len=len(completion.prompt_token_ids),
        finish_reason=output.finish_reason,
        token_ids=list(output.token_ids),
        logprobs=_logprobs(output.logprobs),
        index=index,
    )


def _logprobs(entries: Sequence[TokenLogprob]) -> list[dict[int, float]] | None:
    return [dict([*entry.top, (entry.token_id, entry.logprob)]) for entry in entries] or None
