"""Items put to a loaded model: answers, scores, and how the answers' distributions compare with the base's."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

import httpx

from turbolm.errors import ConfigError, EngineError, RequestError, TemplateError
from turbolm.eval.agreement import NUM_TOP, agreement, distributions
from turbolm.eval.answer import Answer, Distributions
from turbolm.eval.checks import ToolCall
from turbolm.eval.data import Item
from turbolm.eval.judge import Judge
from turbolm.llm import AsyncLLM
from turbolm.types import Output, SamplingParams, ToolCallPart

TEXT_WINDOW = 512  # tokens: longer texts are scored in windows, the second half of each given the first
_JUDGE_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True, slots=True)
class ExamOptions:
    max_tokens: int = 256
    """Longest answer, where the item says nothing."""
    judge: Judge | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """An item, ready for one model."""

    item: Item
    prompt_token_ids: tuple[int, ...]
    choice_token_ids: tuple[tuple[int, ...], ...] = ()  # prompt and choice, for each choice
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reference:
    """What the base made of an item."""

    answer: Answer
    distributions: Distributions | None


def prepare(llm: AsyncLLM, items: Sequence[Item], options: ExamOptions) -> tuple[list[Question], dict[str, str]]:
    """Encodes the items. Those that the model can't take come back by their key, with the reason: template errors,
    too long for the context. ConfigError where items want a judge and there is none."""
    if options.judge is None and any(item.check and item.check.needs_judge for item in items):
        raise ConfigError("the data ask for a judge; name one with --judge-url and --judge-model")
    questions: list[Question] = []
    problems: dict[str, str] = {}
    for item in items:
        try:
            question = _question(llm, item, options)
            _check_room(llm, question)
        except (RequestError, TemplateError) as error:
            problems[item.key] = str(error)
        else:
            questions.append(question)
    return questions, problems


def _question(llm: AsyncLLM, item: Item, options: ExamOptions) -> Question:
    if _is_chat(llm, item):
        template = llm.chat_template
        if item.tools and template is not None and not any("tools" in text for text in template.sources.values()):
            raise RequestError("the model's chat template has no place for tools")
        ids = llm.encode_chat(item.messages, tools=item.tools or None)
    else:
        ids = llm.tokenizer.encode(_plain(item))
    choices: tuple[tuple[int, ...], ...] = ()
    if item.check is not None and item.check.is_log_likelihood:
        choices = tuple(
            (*ids, *llm.tokenizer.encode(choice, add_special=False))
            if item.messages
            else tuple(llm.tokenizer.encode(f"{item.prompt}{choice}"))
            for choice in item.check.choices
        )
    wanted = 0 if choices or item.text is not None else item.max_tokens or options.max_tokens
    return Question(item, tuple(ids), choices, wanted)


def _is_chat(llm: AsyncLLM, item: Item) -> bool:
    """Messages go through the chat template; those of probes are plain text to a model without one."""
    return bool(item.messages) and (llm.chat_template is not None or not item.is_probe)


def _plain(item: Item) -> str:
    if item.messages:
        return "\n\n".join([*(str(message["content"]) for message in item.messages), ""])
    return item.prompt or item.text or ""


def _check_room(llm: AsyncLLM, question: Question) -> None:
    limit = llm.config.max_context
    if question.item.text is not None:
        if len(question.prompt_token_ids) < 2:
            raise RequestError("the text has fewer than two tokens: there is nothing to predict")
        return
    longest = max(map(len, question.choice_token_ids), default=len(question.prompt_token_ids) + question.max_tokens)
    if longest > limit:
        answer = "its longest choice" if question.choice_token_ids else f"max_tokens {question.max_tokens}"
        raise RequestError(
            f"{longest} tokens with {answer} exceed the context of {limit}; shorten the item, lower max_tokens or "
            "raise --max-context"
        )


async def examine(
    llm: AsyncLLM,
    questions: Sequence[Question],
    options: ExamOptions,
    *,
    references: Mapping[str, Reference] | None = None,
    deadline: float = math.inf,
) -> AsyncGenerator[tuple[Item, Answer, Distributions | None], None]:
    """Answers as they come, many at once. `references`: the base's, by the item's key; without them this is the
    base, and distributions come along. After `deadline` (time.monotonic) no further item is begun."""
    waiting = iter(questions)
    running: set[asyncio.Task[tuple[Item, Answer, Distributions | None]]] = set()
    async with httpx.AsyncClient(timeout=_JUDGE_TIMEOUT) as client:
        try:
            while True:
                while len(running) < 2 * llm.config.max_batch_size and time.monotonic() < deadline:
                    question = next(waiting, None)
                    if question is None:
                        break
                    running.add(asyncio.create_task(_examine_one(llm, question, options, references, client)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _examine_one(
    llm: AsyncLLM,
    question: Question,
    options: ExamOptions,
    references: Mapping[str, Reference] | None,
    client: httpx.AsyncClient,
) -> tuple[Item, Answer, Distributions | None]:
    item = question.item
    reference = references.get(item.key) if references is not None else None
    try:
        if item.text is not None:
            answer = await _read_text(llm, question)
        elif question.choice_token_ids:
            answer = await _choose(llm, question)
        else:
            answer = await _generate(llm, question)
        shared = answer if references is None else reference.answer if reference else None
        found = None
        if shared is not None and shared.token_ids:
            found = await _distributions(llm, question, shared.token_ids)
    except EngineError as error:
        return item, Answer(error=str(error), score=0.0 if item.check else None), None
    if reference is not None and reference.distributions is not None and found is not None:
        answer = replace(answer, agreement=agreement(reference.distributions, found))
    if item.check is not None:
        if item.check.needs_judge:
            assert options.judge is not None  # prepare has seen to it
            grade = await options.judge.grade(client, item.check, item.question, answer.shown)
        else:
            grade = item.check.grade(answer.text, answer.tool_calls)
        answer = replace(answer, score=grade.score, note=grade.note)
    return item, answer, found if references is None else None


async def _generate(llm: AsyncLLM, question: Question) -> Answer:
    item, params = question.item, SamplingParams(temperature=0.0, max_tokens=question.max_tokens)
    if _is_chat(llm, item):
        stream = llm.chat(item.messages, params, tools=item.tools or None)
    else:
        stream = llm.generate(question.prompt_token_ids, params)
    output = Output.collect([delta async for delta in stream])
    if output.error is not None:
        raise output.error
    calls = (part for part in output.parts if isinstance(part, ToolCallPart))
    return Answer(
        text=output.text,
        tool_calls=tuple(ToolCall(call.name or "", call.arguments) for call in calls),
        token_ids=output.token_ids,
        prompt_tokens=len(question.prompt_token_ids),
        finish_reason=output.finish_reason or "",
    )


async def _choose(llm: AsyncLLM, question: Question) -> Answer:
    """The likeliest of the choices, per byte of its text unless the check says otherwise."""
    check = question.item.check
    assert check is not None
    begin = _common_length([question.prompt_token_ids, *question.choice_token_ids])
    scores = await asyncio.gather(*(llm.score(token_ids) for token_ids in question.choice_token_ids))
    sums = [math.fsum(value or 0.0 for value in score.logprobs[begin:]) for score in scores]
    normalize = check.options.get("normalize", True)
    ranks = [value / len(c.encode()) if normalize else value for value, c in zip(sums, check.choices, strict=True)]
    best = max(range(len(ranks)), key=ranks.__getitem__)
    return Answer(
        text=check.choices[best],
        prompt_tokens=len(question.prompt_token_ids),
        finish_reason="stop",
        log_likelihoods=tuple(sums),
    )


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all begin with: tokenizers may join the end of a prompt with a choice's beginning."""
    columns = enumerate(zip(*rows, strict=False))
    return next((number for number, column in columns if len(set(column)) > 1), min(map(len, rows)))


async def _read_text(llm: AsyncLLM, question: Question) -> Answer:
    window = TEXT_WINDOW if len(question.prompt_token_ids) > TEXT_WINDOW else None
    score = await llm.score(question.prompt_token_ids, window=window)
    return Answer(
        prompt_tokens=len(score.token_ids),
        note=f"perplexity {score.perplexity:.3f}",
        log_likelihoods=(score.log_likelihood / score.num_scored,),
    )


async def _distributions(llm: AsyncLLM, question: Question, answer: Sequence[int]) -> Distributions:
    """Along `answer`, given the prompt and the tokens before."""
    given = [*question.prompt_token_ids, *answer]
    params = SamplingParams(max_tokens=0, prompt_logprobs=NUM_TOP)
    output = Output.collect([delta async for delta in llm.generate(given, params)])
    if output.error is not None:
        raise output.error
    return distributions(output.prompt_logprobs[len(question.prompt_token_ids) :])
