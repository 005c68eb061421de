"""What all requests share: the model, the limits, who is being served."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from turbolm import __version__
from turbolm.delivery import Answers
from turbolm.errors import EngineError, RequestError, nearest
from turbolm.llm import AsyncLLM
from turbolm.server.config import ServerConfig
from turbolm.server.exchange import Exchange, Record
from turbolm.server.failures import ApiError, busy, closing
from turbolm.server.metrics import Metrics
from turbolm.server.shadow import Shadow
from turbolm.server.store import ResponseStore
from turbolm.server.tracing import Tracing

STUCK_SECONDS = 120.0  # without a step of the engine, while requests are at work
_MAX_TOKEN_CHARS = 32  # longer tokens on average: not in any text that is meant to be read
_OFF_LOOP_CHARS = 8192  # texts from here on are tokenized in a thread


class Service:
    def __init__(self, llm: AsyncLLM, config: ServerConfig, keys: Sequence[bytes] = ()) -> None:
        self.llm = llm
        self.config = config
        self.keys = tuple(keys)
        self.name = config.served_name or llm.model_name
        self.created = int(time.time())
        self.metrics = Metrics(self.name, lambda: llm.stats, self._live)
        self.tracing: Tracing | None = None
        self.is_draining = False
        self.num_admitted = 0
        self.store = ResponseStore(config.store) if config.store else None
        self.shadow: Shadow | None = None
        self._exchanges: set[Exchange] = set()
        self._steps = (0, time.perf_counter())  # of the engine, and when that number was first seen

    def start_shadow(self, shadow: Shadow) -> None:
        """From now on a sample of the answers goes to `shadow`, which runs with the application."""
        self.shadow = shadow
        self.metrics.more.append(shadow.collect)

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place for a request. ApiError where there is none."""
        if self.is_draining:
            raise closing()
        if self.num_admitted >= self.config.max_requests:
            raise busy(f"{self.num_admitted} requests are at work, and max_requests is that many: try again later")
        self.num_admitted += 1
        if self.shadow is not None:
            self.shadow.interrupt()
        try:
            yield
        finally:
            self.num_admitted -= 1

    @contextlib.asynccontextmanager
    async def exchange(self, sources: Sequence[Answers], num_answers: int, record: Record) -> AsyncIterator[Exchange]:
        heard = sources if self.shadow is None else self.shadow.watch(sources)
        record.params = sources[0].request.params
        exchange = Exchange(heard, num_answers, record, self.metrics)
        self._exchanges.add(exchange)
        try:
            async with exchange:
                yield exchange
        finally:
            self._exchanges.discard(exchange)
            self._note(exchange)

    def find_model(self, name: str | None) -> str | None:
        """The adapter that a request asks for by this name; None: the model itself, which it need not name. ApiError
        for another name."""
        if name is None or name == self.name:
            return None
        if name not in self.llm.adapters:
            known = [self.name, *self.llm.adapters]
            shown = "', '".join(known)
            raise ApiError(
                404,
                f"no model '{name}'; this server has '{shown}'.{nearest(name, known)}",
                parameter="model",
                code="model_not_found",
            )
        return name

    def check_length(self, num_chars: int, parameter: str) -> None:
        """Refuses text that is far beyond the context before time goes into it."""
        limit = self.llm.config.max_context * _MAX_TOKEN_CHARS
        if num_chars > limit:
            raise ApiError(
                400,
                f"{parameter} has {num_chars} characters; the context of {self.llm.config.max_context} tokens holds "
                f"{limit} at the very most",
                parameter=parameter,
                code="context_length_exceeded",
            )

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answers:
        """`AsyncLLM.chat`; long conversations are encoded off the event loop."""
        num_chars = sum(_size(message) for message in messages)
        self.check_length(num_chars, "messages")
        if num_chars < _OFF_LOOP_CHARS:
            return self.llm.chat(messages, **options)
        return await asyncio.to_thread(self.llm.chat, messages, **options)

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Answers:
        """`AsyncLLM.generate`; long prompts are tokenized off the event loop."""
        if isinstance(prompt, str):
            self.check_length(len(prompt), "prompt")
        if len(prompt) < _OFF_LOOP_CHARS:
            return self.llm.generate(prompt, **options)
        return await asyncio.to_thread(self.llm.generate, prompt, **options)

    async def encode(self, prompt: str | Sequence[int], add_special: bool = True) -> list[int]:
        """A prompt's token ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        self.check_length(len(prompt), "prompt")
        encode = partial(self.llm.tokenizer.encode, prompt, add_special=add_special)
        return encode() if len(prompt) < _OFF_LOOP_CHARS else await asyncio.to_thread(encode)

    def template_variables(self, given: Mapping[str, Any] | None, effort: str | None) -> dict[str, Any]:
        """What a request sets in the chat template. RequestError for what the template doesn't read: it would
        change nothing."""
        template = self.llm.chat_template
        text = "" if template is None else "\n".join(template.sources.values())
        variables = dict(given or {})
        known = _names(text)
        for name in variables:
            if name in _OWN or name not in known:
                raise RequestError(
                    f"chat_template_kwargs holds '{name}', which the model's chat template doesn't read."
                    f"{nearest(name, known - _OWN)}",
                    "chat_template_kwargs",
                )
        if effort is not None:
            if "reasoning_effort" in known:
                variables.setdefault("reasoning_effort", effort)
            switch = next((name for name in ("enable_thinking", "thinking") if name in known), None)
            if switch:
                variables.setdefault(switch, effort != "none")
            elif "reasoning_effort" not in known:
                raise RequestError(
                    "reasoning_effort can't be set: the model's chat template has no such switch", "reasoning_effort"
                )
        return variables

    def describe(self, details: bool, adapter: str | None = None) -> dict[str, Any]:
        """The model, or one of its adapters, as /v1/models shows it."""
        config = self.llm.config
        shown: dict[str, Any] = {
            "id": adapter or self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "turbolm",
            "max_model_len": config.max_context,
        }
        if adapter is not None:
            shown["parent"] = self.name
        if details:
            values = asdict(config)
            reasons = values.pop("reasons")
            shown |= {
                "root": self.llm.model_name,
                "version": __version__,
                "config": values,
                "reasons": list(reasons),
                "kv_cache_tokens": config.pool_tokens,
                "limits": self.config.limits,
                "default_params": {k: v for k, v in asdict(self.llm.default_params).items() if v not in ({}, ())},
            }
        return shown

    def why_not_ready(self) -> str | None:
        """None while the engine does its work."""
        if self.is_draining:
            return "the server is shutting down"
        if self.llm.trouble is not None:
            return self.llm.trouble
        num_steps, since = self._steps
        stuck = time.perf_counter() - since
        if self._exchanges and num_steps == self.llm.stats.num_steps and stuck > STUCK_SECONDS:
            return f"the engine made no step for {stuck:.0f} s"
        return None

    async def heartbeat(self) -> None:
        """Runs as long as the server does: deadlines, comments, the engine's pulse."""
        while True:
            now = time.perf_counter()
            for exchange in tuple(self._exchanges):
                exchange.tick(now, self.config.request_timeout, self.config.ping_interval)
            num_steps = self.llm.stats.num_steps
            if num_steps != self._steps[0] or not self._exchanges:
                self._steps = (num_steps, now)
            await asyncio.sleep(min(1.0, (self.config.ping_interval or 1.0) / 2))

    async def drain(self) -> None:
        """Takes no more requests; returns when those at work are done, by themselves or by the time limit."""
        self.is_draining = True
        deadline = time.perf_counter() + self.config.drain_timeout
        while self.num_admitted and time.perf_counter() < deadline:
            await asyncio.sleep(0.05)
        for exchange in tuple(self._exchanges):
            exchange.fail(EngineError("the server is shutting down"))
        for _ in range(40):
            if not self.num_admitted:
                break
            await asyncio.sleep(0.05)

    def _live(self) -> tuple[int, int]:
        running = sum(exchange.has_begun for exchange in self._exchanges)
        return running, len(self._exchanges) - running

    def note_prompts(self, lengths: Sequence[int], record: Record) -> None:
        """Counts the tokens of texts that were computed without an answer."""
        record.prompt_tokens = sum(lengths)
        self.metrics.num_prompt_tokens += record.prompt_tokens
        for length in lengths:
            self.metrics.prompt_length.observe(length)

    def _note(self, exchange: Exchange) -> None:
        record, metrics, usage = exchange.record, self.metrics, exchange.usage
        record.prompt_tokens, record.usage = usage.prompt_tokens, usage
        metrics.num_prompt_tokens += usage.prompt_tokens
        metrics.num_answer_tokens += record.answer_tokens
        if exchange.error is None and not exchange.is_gone:
            metrics.end_to_end.observe(time.perf_counter() - record.started)
            metrics.queue.observe(usage.queued)
            metrics.prompt_length.observe(usage.prompt_tokens)
            metrics.answer_length.observe(usage.completion_tokens)


_OWN = frozenset(("messages", "tools", "tokenizer", "template", "documents", "add_generation_prompt", "continue_final"))


def _names(template: str) -> set[str]:
    """The words inside a template's tags."""
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(re.findall(r"{[{%].*?[}%]}", template, re.DOTALL))))


def _size(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    return len(str(content)) if content else 0
