"""`AsyncLLM`, a model with its engine; `LLM`, the same without async."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turbolm.config import DEFAULT_MODEL, EngineConfig, ResolvedConfig
from turbolm.delivery import Answers, Delivery
from turbolm.engine.engine import Engine
from turbolm.engine.step import SchedulerStats
from turbolm.errors import ContextOverflowError, EngineError, RequestError
from turbolm.grammar import tool_grammar
from turbolm.stream import AnswerStream
from turbolm.text import ChatTemplate, PartParser, Tokenizer, choose_reasoning_format, encode_chat, parser_for
from turbolm.text.parser import choose_tool_format
from turbolm.types import Completion, Grammar, Output, Request, SamplingParams, Score
from turbolm.worker.supervisor import SupervisedEngine, Supervision

T = TypeVar("T")
Message = Mapping[str, Any]
#: One text, one list of token ids, or several of either.
Texts = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]
#: For all prompts, or one for each; None: what the checkpoint recommends.
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What to compute, and how to read the answer."""

    token_ids: tuple[int, ...]
    parser: Callable[[], PartParser]
    is_continuation: bool
    thoughts: tuple[str, str] | None = None  # as in Grammar


class AsyncLLM:
    """A loaded model that serves any number of requests at once.

    `model`: a folder, a .gguf file, "hf:org/name", "ms:org/name", "pypi:package" or a short name.
    `config` and `options` are `EngineConfig` and its fields. `isolated` runs the engine in a process of
    its own, which is started again when it dies. Raises UserError or CapacityError where the model can't
    be loaded here.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        progress: bool = True,
        isolated: bool | Supervision = False,
        **options: object,
    ) -> None:
        settings = EngineConfig.of(config, **options)
        self._delivery = Delivery()
        self._engine: Engine | SupervisedEngine
        self.config: ResolvedConfig
        if isolated:
            supervision = isolated if isinstance(isolated, Supervision) else None
            engine = SupervisedEngine(model, settings, progress, self._delivery.deliver, supervision)
            try:
                from turbolm.loading import load_text  # and torch, while the other process does the same

                engine.wait_until_loaded()
                self._model = load_text(engine.name, engine.path)
            except BaseException:
                engine.close()
                raise
            self._engine, self.config = engine, engine.config
        else:
            from turbolm.loading import load_model

            loaded = load_model(model, settings, progress)
            self._model, self.config = loaded.text, loaded.config
            self._engine = Engine(loaded.scheduler, loaded.runner, self._delivery.deliver, loaded.grammars)
        self.model_name = self._model.name
        self.tokenizer: Tokenizer = self._model.tokenizer
        self.chat_template: ChatTemplate | None = self._model.chat_template
        self.default_params = self._model.default_params
        """What the checkpoint recommends; used where a request brings no parameters."""

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, priority: int = 0, tenant: str = ""
    ) -> Answers:
        """Continue a text or token ids. Yields deltas; each of the `n` answers ends with one that has
        a `finish_reason`. Closing the iterator cancels. Raises RequestError before anything runs."""
        return self._submit(self._plain(prompt), params, priority, tenant)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        template_variables: Mapping[str, Any] | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Answers:
        """Answer a conversation (OpenAI-style messages), as `generate`. Text, reasoning and tool calls
        come as parts of their own. Control tokens typed inside messages stay plain text. `tool_choice`: "auto", "none",
        "required" or {"type": "function", "function": {"name": …}}; the latter two are enforced, and then
        `parallel_tool_calls` says whether there may be several."""
        if tools and tool_choice == "none":
            tools = None
        prompt = self._conversation(messages, tools, template_variables)
        params = self.default_params if params is None else params
        if tools and params.grammar is not None:
            raise RequestError(
                "an answer can't be by a grammar and with tools: use tool_choice 'none', or no grammar", "tools"
            )
        if tools and tool_choice != "auto":
            params = replace(params, grammar=self._tool_grammar(tools, tool_choice, not parallel_tool_calls))
        return self._submit(prompt, params, priority, tenant)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as the model sees it, up to where its answer begins."""
        return list(self._conversation(messages, tools, template_variables).token_ids)

    async def score(self, text: str | Sequence[int], *, window: int | None = None) -> Score:
        """The log-likelihood of given text.

        Without `window` the whole text is one context (refused where it's too long). With it, the
        text is cut into consecutive windows of that many tokens, a shorter rest is left out, and the
        second half of each is scored given its first half, as llama.cpp measures perplexity."""
        token_ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if window is None:
            return Score(tuple(token_ids), await self._logprobs(token_ids))
        if not 4 <= window <= self.config.max_context:
            raise RequestError(f"window must be from 4 to {self.config.max_context} tokens, got {window}", "window")
        if len(token_ids) < window:
            raise RequestError(f"the text has {len(token_ids)} tokens, less than one window of {window}", "text")
        starts = range(0, len(token_ids) - window + 1, window)
        chunks = await asyncio.gather(*(self._logprobs(token_ids[start : start + window]) for start in starts))
        halves = (value if position > window // 2 else None for chunk in chunks for position, value in enumerate(chunk))
        return Score(tuple(token_ids[: len(chunks) * window]), tuple(halves))

    @property
    def stats(self) -> SchedulerStats:
        """What the engine has counted so far."""
        return self._engine.stats

    @property
    def trouble(self) -> str | None:
        """Why nothing is being computed: the engine's process died and is being started again, or is given up."""
        return self._engine.trouble if isinstance(self._engine, SupervisedEngine) else None

    @property
    def is_given_up(self) -> bool:
        """Whether the engine's process died too often for another try: every request ends with an error."""
        return isinstance(self._engine, SupervisedEngine) and self._engine.is_given_up

    async def wait_until_warm(self) -> None:
        """Wait until everything is prepared that makes steps faster (on a GPU, CUDA graphs: a few seconds
        after the model is loaded). Requests are answered before that, too."""
        await asyncio.to_thread(self._engine.wait_until_warm)

    async def close(self) -> None:
        """Cancel what is running and free the model. Idempotent."""
        await asyncio.to_thread(self._engine.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _prompt(self, prompt: str | Sequence[int] | Sequence[Message]) -> _Prompt:
        """A text, token ids or messages."""
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self._conversation(cast(Sequence[Message], prompt), None, None)
        return self._plain(cast("str | Sequence[int]", prompt))

    def _plain(self, prompt: str | Sequence[int]) -> _Prompt:
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return _Prompt(tuple(token_ids), PartParser, is_continuation=True)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_variables: Mapping[str, Any] | None,
    ) -> _Prompt:
        template = self.chat_template
        if template is None:
            raise RequestError(
                f"'{self.model_name}' has no chat template; use generate with a plain prompt, or choose a template: "
                "llm.chat_template = named_template('chatml')",
                "messages",
            )
        token_ids = encode_chat(self.tokenizer, template, messages, tools=tools, **(template_variables or {}))
        reasoning = choose_reasoning_format(template.source)
        tail = self.tokenizer.decode(token_ids[-16:], skip_special=False)
        is_open = reasoning is not None and reasoning.is_open(tail)  # some templates open the block themselves

        def parser() -> PartParser:
            return parser_for(template.source, tools_given=bool(tools), tools=tools or (), starts_in_reasoning=is_open)

        thoughts = None
        if reasoning is not None and not tail.rstrip().endswith(reasoning.closer):
            thoughts = ("" if is_open else reasoning.opener, reasoning.closer)
        return _Prompt(tuple(token_ids), parser, is_continuation=False, thoughts=thoughts)

    def _tool_grammar(
        self, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any], is_single: bool
    ) -> Grammar:
        name = None
        if isinstance(choice, Mapping):
            function = choice.get("function")
            name = function.get("name") if isinstance(function, Mapping) else None
        if choice != "required" and not isinstance(name, str):
            raise RequestError(
                f"tool_choice is 'auto', 'none', 'required' or names a function, got {choice!r:.80}", "tool_choice"
            )
        form = choose_tool_format(self.chat_template.source if self.chat_template else None)
        if form is None:
            raise RequestError(f"'{self.model_name}' takes no tools: its chat template has no place for them", "tools")
        return tool_grammar(form.name, tools, self.tokenizer, name=name, is_single=is_single or name is not None)

    async def _logprobs(self, token_ids: Sequence[int]) -> tuple[float | None, ...]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        result = Output.collect([output async for output in self._submit(self._plain(token_ids), params, deltas=False)])
        if result.error is not None:
            raise result.error
        return tuple(None if entry is None else entry.logprob for entry in result.prompt_logprobs)

    def _submit(
        self,
        prompt: _Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        tenant: str = "",
        deltas: bool = True,
    ) -> Answers:
        """Without `deltas`, for callers that wait for the end anyway, an answer is one output where that is
        possible: then nothing is done per token but to compute it."""
        params = self.default_params if params is None else params
        self._check(prompt.token_ids, params)
        eos_token_ids = self._model.eos_token_ids
        if params.grammar is not None:
            params = replace(params, grammar=replace(params.grammar, thoughts=prompt.thoughts))
            eos_token_ids = eos_token_ids or self.tokenizer.eos_ids  # of the null model, whose answers never end
        first = Request(
            id=uuid.uuid4().hex,
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=priority,
            tenant=tenant,
            eos_token_ids=eos_token_ids,
            bad_words_ids=self._tokenize_bad_words(params.bad_words),
        )
        requests = [replace(first, index=index) for index in range(params.n)]
        streams = [
            AnswerStream(request, self.tokenizer, prompt.parser(), is_continuation=prompt.is_continuation)
            for request in requests
        ]
        deltas = deltas or bool(params.stop)  # stop strings show as the text grows
        return Answers(self._engine, self._delivery, requests, streams, deltas)

    def _check(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """What depends on the model: context and vocabulary."""
        limit, num_prompt, vocabulary = self.config.max_context, len(token_ids), self._model.vocab_size
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if num_prompt + wanted > limit:
            answer = "an answer" if params.max_tokens is None else f"max_tokens {params.max_tokens}"
            raise ContextOverflowError(
                f"the prompt has {num_prompt} tokens; with {answer} that exceeds the context of {limit} tokens. "
                "Shorten the prompt, lower max_tokens or raise max_context",
                "prompt",
            )
        for name, ids in (
            ("prompt", token_ids), ("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids),
        ):  # fmt: skip
            for token in ids:
                if not 0 <= token < vocabulary:
                    raise RequestError(f"{name} holds token id {token}; the vocabulary is 0 to {vocabulary - 1}", name)

    def _tokenize_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it's tokenized at the start of a text and after a space."""
        variants = (self.tokenizer.encode(p + w, add_special=False) for w in words for p in ("", " "))
        return tuple(dict.fromkeys(tuple(ids) for ids in variants if ids))


class LLM:
    """`AsyncLLM` without async: the same arguments; methods wait for their results."""

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        config: EngineConfig | None = None,
        *,
        progress: bool = True,
        isolated: bool | Supervision = False,
        **options: object,
    ) -> None:
        self._llm = AsyncLLM(model, config, progress=progress, isolated=isolated, **options)
        self._show = progress
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="turbolm-llm", daemon=True)
        self._thread.start()

    @property
    def model_name(self) -> str:
        return self._llm.model_name

    @property
    def config(self) -> ResolvedConfig:
        return self._llm.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self._llm.tokenizer

    @property
    def default_params(self) -> SamplingParams:
        return self._llm.default_params

    def generate(self, prompts: Texts, params: Params = None) -> list[Completion]:
        """Continue one prompt (a text, or token ids) or each of several; results in the order of the prompts.
        `params`: for all of them, or one for each. A bad request raises before anything runs; one that fails
        later has an output with `error`, and doesn't touch the others."""
        return self._complete([self._llm._plain(prompt) for prompt in _listed(prompts)], params)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Completion]:
        """Answer one conversation (a list of messages) or several, as `generate`."""
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        given: Sequence[Any] = [conversations] if is_one else conversations
        return self._complete([self._llm._conversation(messages, tools, None) for messages in given], params)

    def stream(
        self, prompt: str | Sequence[int] | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[Output]:
        """Deltas of the answer to a text, token ids or messages, as they come. Leaving the loop cancels."""
        return (delta for _, delta in self.stream_many([prompt], params))

    def stream_many(
        self, prompts: Sequence[str | Sequence[int] | Sequence[Message]], params: SamplingParams | None = None
    ) -> Iterator[tuple[int, Output]]:
        """(prompt number, delta) of all answers, as they come. Leaving the loop cancels what is left."""
        self._check_open()
        streams = [self._llm._submit(self._llm._prompt(prompt), params) for prompt in prompts]
        deltas: queue.Queue[tuple[int, Output] | BaseException | None] = queue.Queue()

        async def pump(index: int, stream: AsyncIterator[Output]) -> None:
            async for delta in stream:
                deltas.put((index, delta))

        async def pump_all() -> None:
            try:
                await asyncio.gather(*(pump(index, stream) for index, stream in enumerate(streams)))
                deltas.put(None)
            except Exception as error:  # noqa: BLE001 (raised again in the caller's thread)
                deltas.put(error)

        future = asyncio.run_coroutine_threadsafe(pump_all(), self._loop)
        try:
            while (item := deltas.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def score(self, texts: Texts, *, window: int | None = None) -> list[Score]:
        """The log-likelihood and perplexity of one text (or token ids) or of each of several, as
        `AsyncLLM.score`."""
        given = _listed(texts)

        self._check_open()
        with _count_bar("scoring", len(given), self._show) as advance:

            async def one(text: Any) -> Score:
                score = await self._llm.score(text, window=window)
                advance(1)
                return score

            return self._gather([one(text) for text in given])

    @property
    def stats(self) -> SchedulerStats:
        return self._llm.stats

    def close(self) -> None:
        """Cancel what is running and free the model. Idempotent."""
        if self._thread.is_alive():
            self._gather([self._llm.close()])
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._loop.is_closed():
            raise EngineError("this model was closed; load it again")

    def _complete(self, prompts: Sequence[_Prompt], params: Params) -> list[Completion]:
        self._check_open()
        given = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(given) != len(prompts):
            raise RequestError(
                f"{len(given)} sampling parameters for {len(prompts)} prompts: give one for each, or one for all",
                "params",
            )
        streams = [self._llm._submit(prompt, own, deltas=False) for prompt, own in zip(prompts, given, strict=True)]
        with _count_bar("generating", len(prompts), self._show) as advance:

            async def one(prompt: _Prompt, stream: AsyncIterator[Output]) -> Completion:
                deltas: dict[int, list[Output]] = {}
                async for delta in stream:
                    deltas.setdefault(delta.index, []).append(delta)
                advance(1)
                return Completion(prompt.token_ids, tuple(Output.collect(deltas[index]) for index in sorted(deltas)))

            return self._gather([one(prompt, stream) for prompt, stream in zip(prompts, streams, strict=True)])

    def _gather(self, jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
        """Run coroutines together on the engine's loop, and wait; ctrl-C cancels them."""

        async def run() -> list[T]:
            return list(await asyncio.gather(*jobs))

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _listed(given: Texts) -> list[Any]:
    """One text, or one list of token ids, as a list of one."""
    is_one = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    return [given] if is_one else list(given)


Advance = Callable[[int], None]


@contextlib.contextmanager
def _count_bar(title: str, total: int, show: bool) -> Iterator[Advance]:
    """A progress bar over things done, on a terminal's standard error; silent elsewhere and for one."""
    if not show or total < 2 or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)
