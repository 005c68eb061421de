"""`AsyncLLM`, a model with its engine; `LLM`, the same without async."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from turbolm.adapters import ServedAdapters
from turbolm.config import DEFAULT_MODEL, EngineConfig, ResolvedConfig
from turbolm.delivery import Answers, Delivery, complete
from turbolm.embedding import Embedding
from turbolm.engine.engine import Engine
from turbolm.engine.step import SchedulerStats
from turbolm.errors import EngineError, RequestError
from turbolm.form import Grammar
from turbolm.lora import adapter_sources
from turbolm.progress import Advance, count_bar
from turbolm.prompt import (
    ChatOptions,
    Message,
    Params,
    Prompt,
    Texts,
    ToolChoice,
    Tools,
    bad_words_ids,
    chat_prompt,
    check_limits,
    constrained,
    listed,
    one_each,
    plain_prompt,
)
from turbolm.stream import AnswerStream
from turbolm.text import ChatTemplate, Tokenizer
from turbolm.types import Completion, Output, Pooling, Request, SamplingParams, Score
from turbolm.worker.supervisor import SupervisedEngine, Supervision

if TYPE_CHECKING:
    from turbolm.models.pooling import PoolingChoice

T = TypeVar("T")


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
            self._engine = Engine(
                loaded.scheduler, loaded.runner, self._delivery.deliver, loaded.grammars, loaded.adapters
            )
        self.adapters = ServedAdapters(self._engine, adapter_sources(settings.adapters))
        self.model_name = self._model.name
        self.tokenizer: Tokenizer = self._model.tokenizer
        self.chat_template: ChatTemplate | None = self._model.chat_template
        self.default_params = self._model.default_params
        """What the checkpoint recommends; used where a request brings no parameters."""

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Answers:
        """Continue a text or token ids. Yields deltas; each of the `n` answers ends with one with a `finish_reason`.
        Closing the iterator cancels. `adapter`: the name of one of `adapters`. RequestError before anything runs."""
        return self._submit(self._plain(prompt), params, priority, tenant, adapter=adapter)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | Grammar | None = None,
        template_variables: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Answers:
        """Answer a conversation (OpenAI-style messages), as `generate`. Text, reasoning and tool calls
        come as parts of their own. Control tokens typed inside messages stay plain text. `tool_choice`: "auto", "none",
        "required" or {"type": "function", "function": {"name": …}}; the latter two are enforced, and then
        `parallel_tool_calls` says whether there may be several. `response_format`: OpenAI's object, such as
        {"type": "json_schema", "json_schema": {"schema": …}}, or a Grammar; it is kept to."""
        options = ChatOptions(tools, tool_choice, parallel_tool_calls, response_format, template_variables)
        prompt, params = self._question(messages, params, options)
        return self._submit(prompt, params, priority, tenant, adapter=adapter)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as the model sees it, up to where its answer begins."""
        return list(self._conversation(messages, tools, template_variables).token_ids)

    async def score(self, text: str | Sequence[int], *, window: int | None = None, adapter: str | None = None) -> Score:
        """The log-likelihood of given text.

        Without `window` the whole text is one context (refused where it's too long). With it, the
        text is cut into consecutive windows of that many tokens, a shorter rest is left out, and the
        second half of each is scored given its first half, as llama.cpp measures perplexity."""
        token_ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if window is None:
            return Score(tuple(token_ids), await self._logprobs(token_ids, adapter))
        if not 4 <= window <= self.config.max_context:
            raise RequestError(f"window must be from 4 to {self.config.max_context} tokens, got {window}", "window")
        if len(token_ids) < window:
            raise RequestError(f"the text has {len(token_ids)} tokens, less than one window of {window}", "text")
        starts = range(0, len(token_ids) - window + 1, window)
        jobs = [self._logprobs(token_ids[start : start + window], adapter) for start in starts]
        chunks = await asyncio.gather(*jobs)
        halves = (value if position > window // 2 else None for chunk in chunks for position, value in enumerate(chunk))
        return Score(tuple(token_ids[: len(chunks) * window]), tuple(halves))

    async def embed(
        self,
        text: str | Sequence[int],
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        params: SamplingParams | None = None,
        adapter: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Embedding:
        """A text as one vector: the hidden state, after the final norm, of its last token, or the mean of all its
        tokens'. `pooling`: None is as the checkpoint's makers do it, by default "last". `dimensions`: only so many
        leading ones. `normalize`: scaled to length 1. Of `params` only `timeout` matters."""
        choice = self.pooling
        if pooling is None and choice.refusal is not None:
            raise RequestError(f"'{self.model_name}' has no embeddings as it was made for: {choice.refusal}", "pooling")
        prompt = self._plain(text)
        pooling, params = pooling or choice.pooling, params or SamplingParams()
        answers = self._submit(prompt, params, priority, tenant, deltas=False, pooling=pooling, adapter=adapter)
        result = Output.collect([output async for output in answers])
        if result.error is not None:
            raise result.error
        if result.embedding is None:
            raise EngineError("the engine has ended the request without an embedding")
        return Embedding.of(result.embedding, len(prompt.token_ids), dimensions, normalize)

    @property
    def pooling(self) -> PoolingChoice:
        """What `embed` does where it isn't told, and why."""
        return self._model.pooling

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

    def _prompt(self, prompt: str | Sequence[int] | Sequence[Message]) -> Prompt:
        """A text, token ids or messages."""
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            return self._conversation(cast(Sequence[Message], prompt), None, None)
        return self._plain(cast("str | Sequence[int]", prompt))

    def _plain(self, prompt: str | Sequence[int]) -> Prompt:
        return plain_prompt(self.tokenizer, prompt)

    def _conversation(
        self,
        messages: Sequence[Message],
        tools: Tools | None,
        template_variables: Mapping[str, Any] | None,
    ) -> Prompt:
        if self.chat_template is None:
            raise RequestError(
                f"'{self.model_name}' has no chat template; use generate with a plain prompt, or choose a template: "
                "llm.chat_template = named_template('chatml')",
                "messages",
            )
        return chat_prompt(self.tokenizer, self.chat_template, messages, tools, template_variables)

    def _question(
        self, messages: Sequence[Message], params: SamplingParams | None, options: ChatOptions
    ) -> tuple[Prompt, SamplingParams]:
        """What `chat` asks."""
        prompt = self._conversation(messages, options.shown_tools, options.template_variables)
        params = self.default_params if params is None else params
        return prompt, constrained(params, options, self.tokenizer, self.chat_template)

    async def _logprobs(self, token_ids: Sequence[int], adapter: str | None) -> tuple[float | None, ...]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        answers = self._submit(self._plain(token_ids), params, deltas=False, adapter=adapter)
        result = Output.collect([output async for output in answers])
        if result.error is not None:
            raise result.error
        return tuple(None if entry is None else entry.logprob for entry in result.prompt_logprobs)

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        tenant: str = "",
        deltas: bool = True,
        pooling: Pooling | None = None,
        adapter: str | None = None,
    ) -> Answers:
        """Without `deltas`, for callers that wait for the end anyway, an answer is one output where that is
        possible: then nothing is done per token but to compute it."""
        params = self.default_params if params is None else params
        self.adapters.check(adapter)
        check_limits(
            prompt.token_ids, params, self.config.max_context, self._model.vocab_size, has_answer=pooling is None
        )
        eos_token_ids = self._model.eos_token_ids
        if params.grammar is not None:
            params = replace(params, grammar=replace(params.grammar, thoughts=prompt.thoughts))
            eos_token_ids = eos_token_ids or self.tokenizer.eos_ids  # of the null model, whose answers never end
        first = Request(
            id=os.urandom(16).hex(),
            prompt_token_ids=prompt.token_ids,
            params=params,
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            pooling=pooling,
            eos_token_ids=eos_token_ids,
            bad_words_ids=bad_words_ids(self.tokenizer, params.bad_words),
        )
        requests = [first, *(replace(first, index=index) for index in range(1, params.n))]
        streams = [
            AnswerStream(request, self.tokenizer, prompt.parser, is_continuation=prompt.is_continuation)
            for request in requests
        ]
        deltas = deltas or bool(params.stop)  # stop strings show as the text grows
        return Answers(self._engine, self._delivery, requests, streams, deltas)


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
    def chat_template(self) -> ChatTemplate | None:
        return self._llm.chat_template

    @property
    def default_params(self) -> SamplingParams:
        return self._llm.default_params

    @property
    def adapters(self) -> ServedAdapters:
        return self._llm.adapters

    def generate(self, prompts: Texts, params: Params = None, *, adapter: str | None = None) -> list[Completion]:
        """Continue one prompt (a text, or token ids) or each of several; results in the order of the prompts.
        `params`: for all of them, or one for each. A bad request raises before anything runs; one that fails
        later has an output with `error`, and doesn't touch the others."""
        return self._complete([self._llm._plain(prompt) for prompt in listed(prompts)], params, adapter)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        response_format: Mapping[str, Any] | Grammar | None = None,
        template_variables: Mapping[str, Any] | None = None,
        adapter: str | None = None,
    ) -> list[Completion]:
        """Answer one conversation (a list of messages) or several, as `generate`; the rest as in `AsyncLLM.chat`."""
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        given: Sequence[Any] = [conversations] if is_one else conversations
        options = ChatOptions(tools, tool_choice, parallel_tool_calls, response_format, template_variables)
        own = one_each(params, len(given))
        asked = [self._llm._question(messages, of, options) for messages, of in zip(given, own, strict=True)]
        return self._complete([prompt for prompt, _ in asked], [of for _, of in asked], adapter)

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[Output]:
        """Deltas of the answer to a text, token ids or messages, as they come. Leaving the loop cancels."""
        return (delta for _, delta in self.stream_many([prompt], params, adapter=adapter))

    def stream_many(
        self,
        prompts: Sequence[str | Sequence[int] | Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
    ) -> Iterator[tuple[int, Output]]:
        """(prompt number, delta) of all answers, as they come. Leaving the loop cancels what is left."""
        self._check_open()
        streams = [self._llm._submit(self._llm._prompt(prompt), params, adapter=adapter) for prompt in prompts]
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

    def score(self, texts: Texts, *, window: int | None = None, adapter: str | None = None) -> list[Score]:
        """The log-likelihood and perplexity of one text (or token ids) or of each of several."""
        self._check_open()
        jobs = [self._llm.score(text, window=window, adapter=adapter) for text in listed(texts)]
        return self._gather(jobs, "scoring")

    def embed(
        self,
        texts: Texts,
        *,
        pooling: Pooling | None = None,
        normalize: bool = True,
        dimensions: int | None = None,
        adapter: str | None = None,
    ) -> list[Embedding]:
        """One text (or token ids) or each of several as one vector, as `AsyncLLM.embed`."""
        self._check_open()
        options: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "dimensions": dimensions}
        jobs = [self._llm.embed(text, adapter=adapter, **options) for text in listed(texts)]
        return self._gather(jobs, "embedding")

    @property
    def stats(self) -> SchedulerStats:
        return self._llm.stats

    def wait_until_warm(self) -> None:
        """As `AsyncLLM.wait_until_warm`."""
        self._gather([self._llm.wait_until_warm()])

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

    def _complete(self, prompts: Sequence[Prompt], params: Params, adapter: str | None) -> list[Completion]:
        self._check_open()
        own = one_each(params, len(prompts))
        pairs = zip(prompts, own, strict=True)
        asked = [self._llm._submit(prompt, of, deltas=False, adapter=adapter) for prompt, of in pairs]
        return self._wait(lambda advance: complete(asked, advance), len(asked), "generating")

    def _gather(self, jobs: Sequence[Coroutine[Any, Any, T]], title: str = "") -> list[T]:
        """Run coroutines together on the engine's loop, and wait."""

        async def run(advance: Advance) -> list[T]:
            async def one(job: Coroutine[Any, Any, T]) -> T:
                result = await job
                advance(1)
                return result

            return list(await asyncio.gather(*(one(job) for job in jobs)))

        return self._wait(run, len(jobs), title)

    def _wait(self, job: Callable[[Advance], Coroutine[Any, Any, T]], count: int, title: str) -> T:
        """Run a coroutine on the engine's loop, and wait, with a progress bar to `count`; ctrl-C cancels it."""
        with count_bar(title, count, self._show) as advance:
            future = asyncio.run_coroutine_threadsafe(job(advance), self._loop)
            try:
                return future.result()
            except BaseException:
                future.cancel()
                raise
