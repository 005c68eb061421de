"""The bodies of requests. Every field is honoured, or refused by name: none is accepted and ignored.

Fields that the OpenAI API knows and turbolm doesn't serve are declared as `Unserved`: null, which clients
send for what they don't use, is accepted, and anything else refused. The checks of values are `SamplingParams`'.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from turbolm.errors import RequestError
from turbolm.server.structured import GrammarFields
from turbolm.types import MAX_TIMEOUT, SamplingParams

Unserved = Annotated[None, Field(description="Not served: leave it out.")]

# Fields of several bodies.
MODEL: Any = Field(None, description="The served model's name; may be left out.")
USER: Any = Field(None, max_length=512, description="Goes into the log line of the request.")
PRIORITY: Any = Field(0, ge=-(1 << 31), lt=1 << 31, description="Lower goes first.")
CACHE_SALT: Any = Field(
    None, max_length=512, description="Share cached prompt prefixes with requests of the same salt alone."
)
TIMEOUT: Any = Field(
    None, gt=0, le=MAX_TIMEOUT, description="Seconds; a request that isn't done by then ends with status 504."
)

# Fields with the name and the meaning that SamplingParams gives them.
_SAME = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "max_tokens", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "ignore_eos", "skip_special_tokens", "timeout",
)  # fmt: skip
_RENAMED = {"include_stop": "include_stop_str_in_output", "logprobs": "top_logprobs"}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Send the token counts in a last chunk before [DONE].")
    include_obfuscation: Literal[False] | None = None


class SamplingBody(Body, GrammarFields):
    """What chat and text completions share."""

    model: str | None = MODEL
    temperature: float | None = Field(None, description="Divides the logits, 0 to 100; 0 is greedy.")
    top_p: float | None = Field(None, description="Keep the smallest set of tokens whose probability reaches it.")
    n: int | None = Field(None, description="Independent answers to the same prompt.")
    seed: int | None = Field(None, description="The same seed and request give the same tokens.")
    stop: str | list[str] | None = Field(None, description="Strings that end the answer; up to 64.")
    presence_penalty: float | None = Field(None, description="-2 to 2.")
    frequency_penalty: float | None = Field(None, description="-2 to 2.")
    logit_bias: dict[str, float] | None = Field(None, description="Token id → what to add to its logit, -100 to 100.")
    max_tokens: int | None = Field(None, description="Longest answer in tokens.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events, as it grows.")
    stream_options: StreamOptions | None = None
    user: str | None = USER
    top_k: int | None = Field(None, description="Keep the k likeliest tokens; 0: all.")
    min_p: float | None = Field(None, description="Drop tokens less likely than this fraction of the likeliest.")
    repetition_penalty: float | None = Field(None, description="Above 1: what prompt and answer hold, less likely.")
    min_tokens: int | None = Field(None, description="The answer can't end before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on past end-of-text tokens.")
    stop_token_ids: list[int] | None = Field(None, description="Tokens that end the answer; up to 64.")
    include_stop_str_in_output: bool | None = Field(None, description="Leave what ended the answer in it.")
    skip_special_tokens: bool | None = Field(None, description="Leave control tokens out of the text.")
    bad_words: list[str] | None = Field(None, description="Strings that never appear in the answer; up to 64.")
    priority: int = PRIORITY
    cache_salt: str | None = CACHE_SALT
    timeout: float | None = TIMEOUT

    def sampling(self, base: SamplingParams, num_logprobs: int | None, **more: object) -> SamplingParams:
        """`base` with what the request gives. Raises RequestError."""
        given: dict[str, object] = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        if self.stop is not None:
            given["stop"] = self.stop if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        for name in ("stop_token_ids", "bad_words"):
            if (value := getattr(self, name)) is not None:
                given[name] = tuple(value)
        if self.include_stop_str_in_output is not None:
            given["include_stop"] = self.include_stop_str_in_output
        if (grammar := self.grammar()) is not None:
            given["grammar"] = grammar
        try:
            return SamplingParams.of(base, logprobs=num_logprobs, **(given | more))
        except RequestError as error:
            name = error.parameter or ""
            if name == "logprobs" and "top_logprobs" not in type(self).model_fields:
                raise
            shown = _RENAMED.get(name, name)
            raise RequestError(str(error).replace(name, shown, 1), shown) from None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream = true alone", "stream_options")


class Extensions(Body):
    """What turbolm's engine does beyond the APIs of others, by the names of the chat API."""

    seed: int | None = Field(None, description="The same seed and request give the same tokens.")
    top_k: int | None = Field(None, description="Keep the k likeliest tokens; 0: all.")
    min_p: float | None = Field(None, description="Drop tokens less likely than this fraction of the likeliest.")
    repetition_penalty: float | None = Field(None, description="Above 1: what prompt and answer hold, less likely.")
    min_tokens: int | None = Field(None, description="The answer can't end before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on past end-of-text tokens.")
    priority: int = PRIORITY
    cache_salt: str | None = CACHE_SALT
    timeout: float | None = TIMEOUT
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )

    def extensions(self) -> dict[str, Any]:
        """These fields, for a ChatBody."""
        return {name: getattr(self, name) for name in Extensions.model_fields}


class Tool(Body):
    type: Literal["function"]
    function: dict[str, Any] = Field(description="name, description, parameters (a JSON schema), strict.")


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]] = Field(
        description="The conversation: objects with role and content (a string, or a list of text parts); an "
        "assistant's may have tool_calls and reasoning_content, a tool's has tool_call_id."
    )
    max_completion_tokens: int | None = Field(None, description="Longest answer in tokens, reasoning included.")
    logprobs: bool | None = Field(None, description="Send the log-probability of each token.")
    top_logprobs: int | None = Field(None, description="And of so many likeliest ones; up to 100.")
    tools: list[Tool] | None = Field(None, description="Functions that the model may call.")
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = Field(
        None, description="Where it demands a call, the answer is one, of the tool's schema."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: the first call alone.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="For models whose chat template has such a switch; 'none' turns reasoning off."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Goes into the request's log line.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=512, description="Goes into the request's log line.")
    prompt_cache_key: str | None = Field(None, max_length=512, description="The same as cache_salt.")
    audio: Unserved = None
    function_call: Unserved = None
    functions: Unserved = None
    moderation: Unserved = None
    prediction: Unserved = None
    prompt_cache_options: Unserved = None
    prompt_cache_retention: Unserved = None
    verbosity: Unserved = None
    web_search_options: Unserved = None

    instead: ClassVar[dict[str, str]] = {
        "functions": "use tools",
        "function_call": "use tool_choice",
        "tool_choice": 'use \'auto\', \'none\', \'required\' or {"type": "function", "function": {"name": …}}',
        "response_format.type": "use 'text', 'json_object' or 'json_schema'",
        "store": "answers aren't stored: leave it out or send false",
    }

    @property
    def num_logprobs(self) -> int | None:
        """As SamplingParams counts them."""
        if not self.logprobs:
            if self.top_logprobs:
                raise RequestError("top_logprobs goes with logprobs = true alone", "top_logprobs")
            return None
        return self.top_logprobs or 0

    @property
    def length_limit(self) -> dict[str, object]:
        """max_tokens by its newer name."""
        if self.max_completion_tokens is None:
            return {}
        if self.max_tokens not in (None, self.max_completion_tokens):
            raise RequestError("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
        return {"max_tokens": self.max_completion_tokens}


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="A text, several texts, token ids, or several lists of token ids."
    )
    max_tokens: int | None = Field(16, description="Longest answer in tokens; 0 with echo: the prompt alone.")
    logprobs: int | None = Field(None, description="Log-probabilities of the tokens, and of so many likeliest ones.")
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    best_of: int | None = Field(None, description="Only as many as n.")
    suffix: Unserved = None

    instead: ClassVar[dict[str, str]] = {
        "suffix": "turbolm doesn't fill in the middle of texts",
        "prompt": "give a text, a list of texts, a list of token ids, or a list of such lists",
    }


class TokenizeBody(Body):
    """POST /tokenize"""

    model: str | None = None
    prompt: str | None = Field(None, description="The text; or give messages.")
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = Field(True, description="With the begin token that the model wants before a text.")
    return_token_strs: bool = Field(False, description="Send the tokens' spellings too.")


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool = False


class ScoreBody(Body):
    """POST /score"""

    model: str | None = None
    text: str | list[int] = Field(description="A text, or token ids.")
    window: int | None = Field(
        None, description="Cut the text into windows of so many tokens; score the second half of each given its first."
    )
    return_logprobs: bool = Field(False, description="Send the tokens and their log-probabilities too.")
    timeout: float | None = TIMEOUT

    instead: ClassVar[dict[str, str]] = {"text": "give a text or a list of token ids"}


def _token_id(key: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 10:
        raise RequestError(f"logit_bias maps token ids to numbers, got the key {key[:40]!r}", "logit_bias")
    return int(key)
