"""POST /v1/completions"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import partial
from json.encoder import encode_basestring as quote  # JSON of a string, non-ASCII as it is
from typing import Any, NamedTuple, cast

from starlette.requests import Request
from starlette.responses import Response

from turbolm.errors import RequestError
from turbolm.server.answer import Answer, completion_logprobs
from turbolm.server.body import read_body
from turbolm.server.exchange import Record
from turbolm.server.failures import ApiError, to_json
from turbolm.server.schema import CompletionBody
from turbolm.server.service import Service
from turbolm.server.stream import DONE, AnswerResponse, error_event, usage_object
from turbolm.text import Tokenizer
from turbolm.types import Usage

Prompt = str | list[int]


class Echo(NamedTuple):
    """The prompt that an answer begins with."""

    text: str = ""
    first_token: int = 0


class CompletionFormat:
    """OpenAI's text completion objects. Of a chunk, all but the text is made once per answer."""

    def __init__(
        self, identity: str, model: str, tokenizer: Tokenizer, *, logprobs: bool, usage: bool, echoes: Sequence[Echo]
    ) -> None:
        """`echoes`: what each answer begins with."""
        self._identity = identity
        self._model = model
        self._created = int(time.time())
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = usage
        self._echoes = echoes
        self._heads: dict[int, str] = {}
        self._offsets: dict[int, int] = {}  # characters of the tokens whose logprobs were written, by choice
        self._tail = ',"usage":null}\n\n' if usage else "}\n\n"

    def chunk(self, choice: int, answer: Answer) -> bytes:
        head, text = self._heads.get(choice), answer.text
        if head is None:
            start = to_json(self._object()).decode()[:-1]
            head = self._heads[choice] = f'data: {start},"choices":[{{"index":{choice},"text":'
            text = self._echoes[choice].text + text
        logprobs = "null"
        if self._logprobs and (answer.logprobs or answer.prompt_logprobs):
            logprobs = to_json(self._logprobs_of(choice, answer)).decode()
        reason = "null" if answer.final is None else f'"{answer.final.finish_reason}"'
        if not text and logprobs == reason == "null":
            return b""
        return f'{head}{quote(text)},"logprobs":{logprobs},"finish_reason":{reason}}}]{self._tail}'.encode()

    def ending(self, usage: Usage) -> bytes:
        if not self._usage:
            return DONE
        return b"data: " + to_json(self._object() | {"choices": [], "usage": usage_object(usage)}) + b"\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        return error_event(error)

    def whole(self, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echoes[index].text + answer.text,
                "logprobs": self._logprobs_of(index, answer) if self._logprobs else None,
                "finish_reason": answer.final.finish_reason if answer.final else None,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object() | {"choices": choices, "usage": usage_object(usage)}

    def _object(self) -> dict[str, Any]:
        return {"id": self._identity, "object": "text_completion", "created": self._created, "model": self._model}

    def _logprobs_of(self, choice: int, answer: Answer) -> dict[str, Any]:
        entries = [*answer.prompt_logprobs, *answer.logprobs]
        offset = self._offsets.get(choice, 0 if answer.prompt_logprobs else len(self._echoes[choice].text))
        shown = completion_logprobs(self._tokenizer, entries, self._echoes[choice].first_token, offset)
        if entries:
            self._offsets[choice] = shown["text_offset"][-1] + len(shown["tokens"][-1])
        return shown


async def complete(request: Request) -> Response:
    """Continues texts."""
    service: Service = request.app.state.service
    record: Record = request.scope["record"]
    body, data = await read_body(request, CompletionBody, service.config.max_body_bytes)
    record.details |= body.model_dump(include={"user"}, exclude_none=True)
    if service.config.log_prompts:
        record.details["body"] = data.decode("utf-8", "replace")
    adapter = service.find_model(body.model)
    body.check_stream()
    prompts = _prompts(body)
    more: dict[str, object] = {}
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        more["prompt_logprobs"] = body.logprobs or 0
    params = body.sampling(service.llm.default_params, body.logprobs, **more)
    if body.best_of not in (None, params.n):
        raise RequestError(
            f"best_of is {body.best_of}, and n {params.n}: turbolm returns every answer it makes", "best_of"
        )
    if len(prompts) * params.n > service.config.max_answers:
        raise RequestError(
            f"{len(prompts)} prompts with {params.n} answers each; this server allows {service.config.max_answers} "
            "answers to one request",
            "n" if params.n > 1 else "prompt",
        )
    options = {"params": params, "adapter": adapter, "priority": body.priority, "tenant": body.cache_salt or ""}
    echoes = [Echo()] * len(prompts)
    if body.echo:
        encoded = [await service.encode(prompt) for prompt in prompts]
        echoes = [_echo(prompt, ids, service.llm.tokenizer) for prompt, ids in zip(prompts, encoded, strict=True)]
        prompts = list(encoded)
    sources = [await service.generate(prompt, **options) for prompt in prompts]
    form = CompletionFormat(
        f"cmpl-{uuid.uuid4().hex}",
        adapter or service.name,
        service.llm.tokenizer,
        logprobs=body.logprobs is not None,
        usage=body.includes_usage,
        echoes=[echo for echo in echoes for _ in range(params.n)],
    )
    return AnswerResponse(partial(service.exchange, sources, params.n, record), form, bool(body.stream))


def _prompts(body: CompletionBody) -> list[Prompt]:
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise RequestError("prompt is empty: give at least one text or list of token ids", "prompt")
    return list(cast("list[Prompt]", given))


def _echo(prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer) -> Echo:
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False)
    return Echo(text, ids[0] if ids else 0)
