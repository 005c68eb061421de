"""Runs the rungs, one loaded model after the other, and decides. What was found before is not asked again."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Protocol

from turbolm import __version__ as turbolm_version
from turbolm.config import EngineConfig, choose_backend, parse_part
from turbolm.errors import CapacityError, ConfigError, UserError
from turbolm.eval.answer import Answer
from turbolm.eval.config import ExamConfig
from turbolm.eval.data import Item, Problem, report_problems
from turbolm.eval.examination import ExamOptions, Question, Reference, examine, prepare
from turbolm.hub import fetch
from turbolm.ladder.config import LadderConfig, Preference, parse_time
from turbolm.ladder.cost import Cost, default_streams, measure
from turbolm.ladder.fingerprint import content_hash, model_fingerprint
from turbolm.ladder.outcome import Outcome, judge, mean_score
from turbolm.ladder.rungs import AUTO, Rung
from turbolm.ladder.sensitivity import Find, Sensitivity, find_layers
from turbolm.ladder.store import Store
from turbolm.ladder.subject import Subject, calibration_file, checkpoint_of
from turbolm.llm import AsyncLLM
from turbolm.ops.hardware import probe

Load = Callable[[str, EngineConfig], AsyncLLM]
Measure = Callable[[AsyncLLM, Sequence[Sequence[int]], int, float], Coroutine[None, None, Cost]]

_GPU_BATCH = 256  # requests together: so few rows of logits a step that scored prompts are read through the KV cache
_MIN_SECONDS = 1.0  # for the items of a rung, however little of the budget is left
MEMORY_CONTEXT = 4096  # tokens of the sequences by whose memory rungs are compared


class Watch(Protocol):
    """Who is told how far things are."""

    def begin(self, rung: Rung, num_items: int, num_done: int) -> None: ...
    def advance(self) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """A rung and what became of it."""

    rung: Rung
    outcome: Outcome
    model: str = ""  # that it loads
    fingerprint: str = ""  # of that model
    answers: Mapping[str, Answer] = field(default_factory=dict)  # by item key
    cost: Cost | None = None
    layers: Sensitivity | None = None  # where the layers that keep 16 bits were to be found


@dataclass(frozen=True, slots=True)
class Climb:
    """A whole run."""

    steps: tuple[Step, ...]
    items: tuple[Item, ...]  # those that the base answered
    problems: tuple[Problem, ...]  # items that the model can't take
    num_unasked: int  # items for which there was no time
    seconds: float  # of this run and those that it goes on from
    recommended: Step | None  # None: the base isn't good enough


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A rung about to run."""

    rung: Rung
    model: str
    fingerprint: str
    engine: EngineConfig
    key: str  # of its answers in the store
    layers: Sensitivity | None


class Climber:
    """One run over `items`, the user's and the probes. `held_out` calibrates. `load`, `measure` and `find`
    make models, measure their costs and choose layers: for tests."""

    def __init__(
        self,
        subject: Subject,
        items: Sequence[Item],
        held_out: Sequence[Item],
        config: LadderConfig,
        exam: ExamConfig,
        engine: EngineConfig,
        store: Store,
        watch: Watch,
        *,
        load: Load = AsyncLLM,
        measure: Measure = measure,
        find: Find = find_layers,
    ) -> None:
        self.subject = subject
        self.items = in_order(items, exam.seed)
        self.held_out = held_out
        self.config = config
        self.engine = engine
        if not engine.max_batch_size and choose_backend(engine, probe()).device == "cuda":
            self.engine = replace(engine, max_batch_size=_GPU_BATCH)
        self.store = store
        self.watch = watch
        self.max_drop = parse_part(config.max_drop, "max_drop")
        self.budget = parse_time(config.budget, "budget") if config.budget else math.inf
        self.keep_going = exam.keep_going
        self.exam = ExamOptions(exam.max_tokens, exam.judge())
        self._load = load
        self._measure = measure
        self._find = find
        self._seconds = 0.0
        self._base: _Attempt | None = None

    def run(self, rungs: Sequence[Rung]) -> Climb:
        """`rungs`: the base first. UserError or CapacityError for items that can't be used, and for whatever keeps the
        base from loading; a rung that can't be loaded is left out."""
        steps: list[Step] = []
        for number, rung in enumerate(rungs):
            steps.append(self._step(rung, steps, len(rungs) - number))
            if steps[0].outcome.status == "not good enough":
                break
        problems = self._problems()
        answered = steps[0].answers
        return Climb(
            steps=tuple(steps),
            items=tuple(item for item in self.items if item.key in answered),
            problems=tuple(Problem(item.line, problems[item.key]) for item in self.items if item.key in problems),
            num_unasked=sum(item.key not in answered and item.key not in problems for item in self.items),
            seconds=self._seconds,
            recommended=recommend(steps, self.config.prefer),
        )

    def _step(self, rung: Rung, before: Sequence[Step], num_left: int) -> Step:
        blocker = next((s for s in before if s.outcome.status == "rejected" and rung.includes(s.rung)), None)
        if blocker is not None and not self.config.every:
            reason = f"it includes {blocker.rung.title}, which was rejected (--every runs it all the same)"
            return Step(rung, Outcome("skipped", reason))
        try:
            attempt = self._attempt(rung)
            answers, cost = self._results(attempt, before[0].answers if before else None, num_left)
        except (UserError, CapacityError) as error:
            if rung.is_base:
                raise
            return Step(rung, Outcome("not served", str(error)))
        outcome = self._judge_base(answers)
        if before:
            outcome = judge(self.items, before[0].answers, answers, self.max_drop, self.config.metric)
        self.watch.say(f"{attempt.rung.title}: {outcome.status}. {outcome.reason}".rstrip(". "))
        return Step(attempt.rung, outcome, attempt.model, attempt.fingerprint, answers, cost, attempt.layers)

    def _attempt(self, rung: Rung) -> _Attempt:
        model = checkpoint_of(self.subject, rung, self.held_out, self.watch.say)
        changed = model != self.subject.name
        fingerprint = model_fingerprint(fetch(model).path) if changed else self.subject.fingerprint
        layers = self._layers(rung, model, fingerprint) if rung.skip == AUTO else None
        if layers is not None:
            rung = replace(rung, skip=layers.skip)
        engine = EngineConfig.of(self.engine, **rung.engine_options)
        key = content_hash(
            {
                "turbolm": turbolm_version,
                "model": fingerprint,
                "engine": asdict(engine),
                "max_tokens": self.exam.max_tokens,
                "judge": [self.exam.judge.url, self.exam.judge.model] if self.exam.judge else None,
                "base": self._base.key if self._base else None,
            }
        )
        attempt = _Attempt(rung, model, fingerprint, engine, key, layers)
        if rung.is_base:
            self._base = attempt
        return attempt

    def _layers(self, rung: Rung, model: str, fingerprint: str) -> Sensitivity:
        """Those that keep 16 bits, found once."""
        data = calibration_file(self.held_out)
        engine = replace(self.engine, kv=rung.kv)
        key = content_hash([turbolm_version, fingerprint, asdict(engine), self.max_drop, str(data)])
        known = self.store.fact(key, "layers")
        if known is None:
            self.watch.say(f"{rung.title}: measuring what each layer's KV cache in {rung.kv} changes")
            known = asdict(self._find(model, engine, self.max_drop, str(data or "")))
            self.store.set_fact(key, "layers", known)
        return Sensitivity(**{**known, "divergences": tuple(known["divergences"]), "skipped": tuple(known["skipped"])})

    def _results(
        self, attempt: _Attempt, base: Mapping[str, Answer] | None, num_left: int
    ) -> tuple[dict[str, Answer], Cost | None]:
        """The rung's answers and cost: those in the store, and what is missing of them."""
        answers = self.store.answers(attempt.key)
        past = self.store.fact(attempt.key, "seconds") or {"seconds": 0.0}
        self._seconds += past["seconds"]
        cost = self.store.fact(attempt.key, "cost")
        wanted = {item.key: item for item in self.items if base is None or item.key in base}
        problems = self._problems() if base is None else {}
        known = {key for key, answer in answers.items() if answer.error is None}  # the others may have met bad luck
        missing = [item for key, item in wanted.items() if key not in known and key not in problems]
        goal = {"budget": self.config.budget, "items": content_hash(sorted(wanted))}
        is_over = bool(self.config.budget) and self.store.fact(attempt.key, "done") == goal
        if cost is None or (missing and not is_over):
            started = time.monotonic()
            deadline = started + max(_MIN_SECONDS, (self.budget - self._seconds) / num_left)
            try:
                asyncio.run(self._session(attempt, missing, len(wanted), base, deadline))
            finally:
                spent = time.monotonic() - started
                self._seconds += spent
                self.store.set_fact(attempt.key, "seconds", {"seconds": past["seconds"] + spent})
            self.store.set_fact(attempt.key, "done", goal)
        # Items that were taken out of the data since, or fell out of the sample, don't count.
        found = {key: answer for key, answer in self.store.answers(attempt.key).items() if key in wanted}
        cost = self.store.fact(attempt.key, "cost")
        return found, Cost(**cost) if cost else None

    async def _session(
        self,
        attempt: _Attempt,
        missing: Sequence[Item],
        num_wanted: int,
        base: Mapping[str, Answer] | None,
        deadline: float,
    ) -> None:
        """Loads the model, measures its cost, asks the missing items."""
        self.watch.say(f"{attempt.rung.title}: loading {attempt.model}")
        started = time.monotonic()
        async with self._load(attempt.model, attempt.engine) as llm:
            load_seconds = time.monotonic() - started
            if llm.config.kernels == "reference" and attempt.engine.kernels == "auto":
                reasons = "; ".join(llm.config.reasons)
                self.watch.say(f"{attempt.rung.title}: in plain PyTorch, which is slow: {reasons}")
            self._check_tokenizer(llm)
            questions, problems = prepare(llm, missing, self.exam)
            if base is None:
                self._report(problems)
            if self.store.fact(attempt.key, "cost") is None:
                await self._measure_cost(llm, attempt, load_seconds)
            self.watch.begin(attempt.rung, num_wanted - len(problems), num_wanted - len(missing))
            references = None if base is None else self._references(questions, base)
            answers = examine(llm, questions, self.exam, references=references, deadline=deadline)
            async with aclosing(answers):
                async for item, answer, distributions in answers:
                    self.store.add(attempt.key, item.key, answer, distributions)
                    self.watch.advance()

    def _check_tokenizer(self, llm: AsyncLLM) -> None:
        assert self._base is not None
        known = self.store.fact(self._base.key, "vocabulary")
        size = llm.tokenizer.vocab_size
        if known is None:
            self.store.set_fact(self._base.key, "vocabulary", {"size": size})
        elif known["size"] != size:
            raise ConfigError(f"its tokenizer has {size} tokens, the base's {known['size']}: they can't be compared")

    def _report(self, problems: Mapping[str, str]) -> None:
        """The user's items that the base can't take end the run, unless it is to go on; probes are left out."""
        assert self._base is not None
        lines = {item.key: item.line for item in self.items}
        users = [Problem(lines[key], text) for key, text in problems.items() if lines[key]]
        report_problems(users, keep_going=self.keep_going)
        self.store.set_fact(self._base.key, "problems", {**self._problems(), **problems})

    def _problems(self) -> dict[str, str]:
        """Why items can't be used, by their key."""
        return (self._base and self.store.fact(self._base.key, "problems")) or {}

    def _references(self, questions: Sequence[Question], base: Mapping[str, Answer]) -> dict[str, Reference]:
        assert self._base is not None
        keys = [question.item.key for question in questions]
        return {key: Reference(base[key], self.store.distributions(self._base.key, key)) for key in keys}

    async def _measure_cost(self, llm: AsyncLLM, attempt: _Attempt, load_seconds: float) -> None:
        self.watch.say(f"{attempt.rung.title}: measuring speed")
        streams = self.config.streams or default_streams(llm.config)
        sample = [item for item in self.items if item.key not in self._problems()][:streams]
        questions, _ = prepare(llm, sample, self.exam)
        prompts = [question.prompt_token_ids for question in questions]
        if prompts:
            cost = await self._measure(llm, prompts, streams, load_seconds)
            self.store.set_fact(attempt.key, "cost", asdict(cost))

    def _judge_base(self, answers: Mapping[str, Answer]) -> Outcome:
        least = parse_part(self.config.min_score, "min_score")
        score = mean_score(self.items, answers)
        if score is None:
            return Outcome("base", "no item has a check: rungs are compared with the base's own answers")
        if score < least:
            reason = f"it scores {score:.1%}, less than {least:.1%}: choose a larger model, or fine-tune this one"
            return Outcome("not good enough", reason)
        return Outcome("base", f"it scores {score:.1%}")


def in_order(items: Sequence[Item], seed: int) -> list[Item]:
    """Shuffled, the groups evenly mixed: any first part of them is a fair sample."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    placed: list[tuple[float, str, Item]] = []
    for name, members in groups.items():
        random.Random(f"{seed} {name}").shuffle(members)
        placed += [((number + 0.5) / len(members), name, item) for number, item in enumerate(members)]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


def recommend(steps: Sequence[Step], prefer: Preference) -> Step | None:
    """Of the acceptable rungs the one with the least memory, or the most tokens per second under load."""
    good = [step for step in steps if step.outcome.status in ("base", "accepted")]
    if not good:
        return None

    def rank(step: Step) -> float:
        if step.cost is None:
            return math.inf
        return step.cost.memory(MEMORY_CONTEXT) if prefer == "memory" else -step.cost.tokens_per_second_load

    return min(reversed(good), key=rank)
