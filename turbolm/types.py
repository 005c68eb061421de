"""The four types that flow through turbolm, and the small values inside them.

    Request   (frozen)  what a front end asks for; validated once, here
    Sequence            a request at work; changed by the scheduler alone
    Batch     (frozen)  what one step computes; built by the runner, passed explicitly
    Output    (frozen)  a delta of what a request has produced

Nothing here imports torch at run time: the scheduler and its tests run without it.
"""

from __future__ import annotations

import enum
import itertools
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from turbolm.errors import RequestError, TurbolmError, nearest
from turbolm.form import Grammar

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]

#: How a text's hidden states become one vector: the last token's, or the mean of all tokens'.
Pooling = Literal["last", "mean"]

MAX_LOGPROBS = 100  # alternatives per position that a request may ask for
MAX_STOP = 64  # stop strings, stop token ids and bad words that a request may carry, each
MAX_TIMEOUT = 1e6  # seconds


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. The defaults change nothing in the model's
    distribution; 0 or None switches a filter off."""

    max_tokens: int | None = None
    """Longest answer in tokens; None: as long as the context allows."""
    min_tokens: int = 0
    """End-of-text and stops are impossible before this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer contains."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer; 1: off."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """The same seed and request give the same tokens, whatever else is in the batch."""
    n: int = 1
    """Independent answers to the same prompt."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's end-of-text tokens."""
    include_stop: bool = False
    """Leave the matched stop string or token in the answer."""
    ignore_eos: bool = False
    """Go on past end-of-text tokens."""
    bad_words: tuple[str, ...] = ()
    """Strings whose tokens never appear in sequence in the answer."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of this many best ones per position."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    skip_special_tokens: bool = True
    """Leave control tokens out of the text."""
    grammar: Grammar | None = None
    """What the answer must be: JSON of a schema, a regular expression, one of several texts."""
    timeout: float | None = None
    """Seconds from when the request is submitted; if it isn't done by then, it ends with a DeadlineError."""

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
            for item in getattr(self, name):
                if not isinstance(item, str) or not item:
                    raise RequestError(f"{name} takes non-empty strings, got {item!r}", name)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        self._check_number("temperature", 0.0, 100.0)
        self._check_number("top_p", 0.0, 1.0, above_low=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        self._check_number("repetition_penalty", 0.0, 100.0, above_low=True)
        self._check_int("top_k", 0, 1 << 31)
        self._check_int("min_tokens", 0, 1 << 31)
        self._check_int("n", 1, 256)
        self._check_int("max_tokens", 0, 1 << 31, optional=True)
        self._check_int("logprobs", 0, MAX_LOGPROBS, optional=True)
        self._check_int("prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        self._check_int("seed", -(1 << 63), (1 << 64) - 1, optional=True)
        if self.timeout is not None:
            self._check_number("timeout", 0.0, MAX_TIMEOUT, above_low=True)
        for name in ("stop", "stop_token_ids", "bad_words"):
            if len(getattr(self, name)) > MAX_STOP:
                raise RequestError(f"{name} takes at most {MAX_STOP} entries, got {len(getattr(self, name))}", name)
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0 or not isinstance(bias, (int, float)) or not abs(bias) <= 100:
                raise RequestError(
                    f"logit_bias maps token ids to numbers from -100 to 100, got {token!r}: {bias!r}", "logit_bias"
                )
        for token in self.stop_token_ids:
            if type(token) is not int or token < 0:
                raise RequestError(f"stop_token_ids takes token ids, got {token!r}", "stop_token_ids")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise RequestError("max_tokens must be at least 1 (0 is allowed with prompt_logprobs only)", "max_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", "min_tokens")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise RequestError(f"grammar takes a Grammar, got {self.grammar!r:.80}", "grammar")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError(
                "ignore_eos doesn't go with a grammar: the answer ends where the grammar does", "ignore_eos"
            )

    def _check_number(self, name: str, low: float, high: float, above_low: bool = False) -> None:
        value = getattr(self, name)
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not valid or not low <= value <= high or (above_low and value == low):
            bound = "above" if above_low else "from"
            raise RequestError(f"{name} must be a number {bound} {low:g} to {high:g}, got {value!r}", name)

    def _check_int(self, name: str, low: int, high: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if type(value) is not int or not low <= value <= high:
            raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r}", name)

    @classmethod
    def of(cls, base: SamplingParams | None = None, **options: object) -> SamplingParams:
        """`base` (default: the defaults) with `options` changed; unknown names are refused."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(
                    f"unknown sampling parameter '{name}'.{nearest(name, known)} Known: {', '.join(known)}", name
                )
        return replace(base or cls(), **options)  # type: ignore[arg-type]

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class LoadedAdapter(NamedTuple):
    """An adapter as the engine has it: one that comes later under the same name is another."""

    name: str
    number: int  # unique in an engine
    place: int  # where its weights are


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to one prompt. Every front end converts straight to it (`n` answers are `n`
    requests that differ in `index`). Limits that depend on the model (context, vocabulary) are
    checked where the request is submitted."""

    id: str
    """Unique among the requests alive in an engine."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    index: int = 0
    """Which of the `n` answers this is."""
    priority: int = 0
    """Lower goes first."""
    tenant: str = ""
    """Prefix-cache namespace: KV blocks are shared within one tenant only."""
    adapter: str | None = None
    """Name of a LoRA adapter that the engine has; None: the model as it is."""
    pooling: Pooling | None = None
    """The prompt's hidden states are wanted as one vector, and no answer."""
    eos_token_ids: tuple[int, ...] = ()
    """The model's end-of-text tokens (ignored under `ignore_eos`)."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words`, tokenized."""
    compiled_grammar: object | None = field(default=None, compare=False, repr=False)
    """`params.grammar`, as turbolm/grammar compiles it. The engine sees to it."""
    loaded_adapter: LoadedAdapter | None = field(default=None, compare=False, repr=False)
    """The adapter that bore the name when the request came. The engine sees to it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_token_ids", tuple(self.prompt_token_ids))
        if not self.prompt_token_ids:
            raise RequestError("the prompt is empty: give at least one token", "prompt")

    @property
    def has_answer(self) -> bool:
        """Whether any token is to be generated."""
        return self.pooling is None and self.params.max_tokens != 0


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A request at work. Only the scheduler changes it."""

    __slots__ = (
        "__weakref__", "arrival", "blocks", "finish_reason", "num_cached", "num_computed", "num_preemptions",
        "queued", "request", "state", "stop", "token_ids",
    )  # fmt: skip

    def __init__(self, request: Request) -> None:
        self.request = request
        self.token_ids: list[int] = list(request.prompt_token_ids)  # prompt, then answer
        self.num_computed = 0  # leading tokens whose K/V are in `blocks`
        self.num_cached = 0  # prompt tokens found in the prefix cache at first admission
        self.blocks: list[int] = []  # KV block ids, in order
        self.state = SequenceState.WAITING
        self.num_preemptions = 0
        self.finish_reason: FinishReason | None = None
        self.stop: int | None = None  # the token that ended it
        self.arrival = time.monotonic()
        self.queued = 0.0  # seconds from there to its first step

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.id!r}, {self.state.value}, {self.num_prompt}+{self.num_output} tokens, "
            f"{self.num_computed} computed)"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: t new tokens of s sequences, laid end to end. Built by the runner
    from the scheduler's step; nobody changes it afterwards. int32 tensors on the model's device."""

    token_ids: torch.Tensor  # [t] the new tokens
    positions: torch.Tensor  # [t] their positions in their sequence
    slots: torch.Tensor  # [t] where K/V go: block id * block size + offset within the block
    query_start: torch.Tensor  # [s+1] first row of each sequence in [t]
    context_lens: torch.Tensor  # [s] tokens in context after this step (cached + new)
    block_tables: torch.Tensor  # [s, b] KV block ids, in order; rows padded with 0
    logit_rows: torch.Tensor  # [r] rows of [t] whose logits are wanted
    num_tokens: int  # t
    num_sequences: int  # s
    max_query: int  # most new tokens of one sequence
    max_context: int  # longest context
    num_decodes: int = 0  # leading sequences with one new token each
    chunks: tuple[tuple[int, int, int], ...] = ()
    """Of the sequences after those: first row in [t], number of rows, context length with these rows."""
    shares_context: bool = False  # some decodes are of one sequence: a row's context holds what others of them store
    adapters: torch.Tensor | None = None  # [t] place of each row's adapter, -1: none; None where no row has one


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """A piece of the `index`-th tool call: the first carries `id` and `name`, all carry a further
    piece of the JSON text of the arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


Part = TextPart | ReasoningPart | ToolCallPart


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a token under the model's distribution, before penalties,
    temperature and filters."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...] = ()  # the best (token id, logprob), likeliest first


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # prompt tokens whose K/V came from the prefix cache
    queued: float = field(default=0.0, compare=False)  # seconds that the request waited for its first step

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Output(NamedTuple):
    """A delta: what a request has produced since its previous output. The last one, and only
    that, has a `finish_reason` and the `usage`. A tuple, because a step makes hundreds of them."""

    request_id: str
    index: int = 0  # type: ignore[assignment]  # hides tuple's method of that name
    token_ids: tuple[int, ...] = ()
    parts: tuple[Part, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, where asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # one per prompt token; None for the first
    finish_reason: FinishReason | None = None
    stop: int | str | None = None  # the stop token or string that ended the answer
    usage: Usage | None = None
    error: TurbolmError | None = None
    embedding: bytes | None = None  # of a request with pooling: float32 [hidden size], little-endian, not normalized

    @property
    def text(self) -> str:
        """The plain text in this delta, without reasoning and tool calls."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def is_final(self) -> bool:
        return self.finish_reason is not None

    @staticmethod
    def collect(deltas: Iterable[Output]) -> Output:
        """All deltas of one request as one output; neighbouring parts of a kind are joined."""
        items = list(deltas)
        last = items[-1]
        if len(items) == 1 and len(last.parts) < 2:
            return last
        return Output(
            request_id=last.request_id,
            index=last.index,
            token_ids=tuple(token for item in items for token in item.token_ids),
            parts=join_parts(part for item in items for part in item.parts),
            logprobs=tuple(entry for item in items for entry in item.logprobs),
            prompt_logprobs=tuple(entry for item in items for entry in item.prompt_logprobs),
            finish_reason=last.finish_reason,
            stop=last.stop,
            usage=last.usage,
            error=last.error,
            embedding=last.embedding,
        )


def join_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Neighbouring text parts, neighbouring reasoning parts, and the pieces of each tool call, joined."""

    def kind(part: Part) -> tuple[type, int]:
        return type(part), part.index if isinstance(part, ToolCallPart) else 0

    return tuple(_join(list(group)) for _, group in itertools.groupby(parts, kind))


def _join(parts: list[Part]) -> Part:
    """Parts of one kind as one."""
    first = parts[0]
    if isinstance(first, ToolCallPart):
        return replace(first, arguments="".join(part.arguments for part in parts if isinstance(part, ToolCallPart)))
    return replace(first, text="".join(part.text for part in parts if not isinstance(part, ToolCallPart)))


@dataclass(frozen=True, slots=True)
class Completion:
    """All answers to one prompt."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Output, ...]  # `n` of them, by index

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds given tokens."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # natural log; None where a token was not scored

    @property
    def num_scored(self) -> int:
        return sum(value is not None for value in self.logprobs)

    @property
    def log_likelihood(self) -> float:
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """exp(-log_likelihood / num_scored)."""
        return math.exp(-self.log_likelihood / self.num_scored) if self.num_scored else math.nan
