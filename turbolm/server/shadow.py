"""Answers compared with a reference while the server runs: a sample of them, when there is nothing else to do.

A live request is never slower for it: its tokens are noted after they were sent on, a comparison on this machine is
cut off when a request comes in, and what finds the queue full is dropped. Prompts stay in memory, and are in no log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from turbolm.config import EngineConfig
from turbolm.delivery import Sink
from turbolm.errors import ConfigError, TurbolmError
from turbolm.llm import AsyncLLM
from turbolm.server.exchange import Source
from turbolm.server.metrics import TOKENS, Histogram
from turbolm.server.reference import Finding, Reference, Sample, UrlReference, open_engine
from turbolm.server.shadow_config import ShadowConfig
from turbolm.types import Output, SamplingParams

logger = logging.getLogger(__name__)

_MAX_QUEUED = 16  # samples
_MAX_TOKENS = 8192  # of a sample's prompt and answer
_QUIET_SECONDS = 0.25  # without a request, before a comparison begins
_WINDOW = 200  # answers that agreement is counted over
_MIN_ANSWERS, _MIN_TOKENS = 20, 500  # below which nothing is said of drift
_SIGMAS = 3.0
_COMPLAINT_SECONDS = 60.0  # between two log lines about a reference that fails
_NATS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Shadow:
    def __init__(self, reference: Reference, config: ShadowConfig, is_idle: Callable[[], bool]) -> None:
        """`is_idle`: whether no request is at work."""
        self.reference = reference
        self.outcomes: Counter[str] = Counter()  # compared, dropped, interrupted, skipped, failed
        self._rate = config.rate
        self._least = config.least
        self._is_idle = is_idle
        self._queue: deque[Sample] = deque()
        self._added = asyncio.Event()
        self._work: asyncio.Task[Finding | None] | None = None
        self._recent: deque[Finding] = deque(maxlen=_WINDOW)  # of greedy answers
        self._is_low = False
        self._complained = -math.inf
        self._tokens = self._agreed = self._diverged = 0  # of greedy answers
        self._common = Histogram(TOKENS)
        self._surprise = Histogram(_NATS)
        self._gap = Histogram(_NATS)

    def interrupt(self) -> None:
        """A request comes in: a comparison on this machine makes way."""
        if self._work is not None and self.reference.is_here:
            self._work.cancel()

    def watch(self, sources: Sequence[Source]) -> Sequence[Source]:
        """The sources of a request that begins now; of some, the first is listened to. None of an adapter, which the
        reference doesn't have."""
        if not sources or sources[0].request.adapter is not None or random.random() >= self._rate:
            return sources
        return [_Listener(sources[0], self._add), *sources[1:]]

    async def run(self) -> None:
        """Compares, until it is cancelled."""
        try:
            while True:
                while not self._queue:
                    self._added.clear()
                    await self._added.wait()
                await self._wait_for_quiet()
                await self._compare(self._queue.popleft())
        finally:
            await self.reference.close()

    def agreement(self) -> float | None:
        """Part of the tokens of the last greedy answers that the reference finds likeliest."""
        total = sum(finding.num_tokens for finding in self._recent)
        return sum(finding.num_agreed for finding in self._recent) / total if total else None

    def _add(self, sample: Sample) -> None:
        if len(self._queue) >= _MAX_QUEUED or len(sample.prompt_token_ids) + len(sample.token_ids) > _MAX_TOKENS:
            self.outcomes["dropped"] += 1
            return
        self._queue.append(sample)
        self._added.set()

    async def _wait_for_quiet(self) -> None:
        """Two looks, some time apart."""
        num_idle = 0
        while self.reference.is_here and num_idle < 2:
            num_idle = num_idle + 1 if self._is_idle() else 0
            await asyncio.sleep(_QUIET_SECONDS / 2)

    async def _compare(self, sample: Sample) -> None:
        self._work = asyncio.create_task(self.reference.judge(sample))
        try:
            finding = await asyncio.shield(self._work)
        except TurbolmError as error:
            self._complain(error)
        except asyncio.CancelledError:
            if not self._work.cancelled():  # this server ends, not the comparison alone
                self._work.cancel()
                raise
            self.outcomes["interrupted"] += 1
            self._queue.appendleft(sample)
        else:
            if finding is None or not finding.num_tokens:
                self.outcomes["skipped"] += 1
            else:
                self._note(sample, finding)
        finally:
            self._work = None

    def _complain(self, error: TurbolmError) -> None:
        self.outcomes["failed"] += 1
        if time.monotonic() - self._complained > _COMPLAINT_SECONDS:
            self._complained = time.monotonic()
            logger.warning("shadow: an answer could not be compared: %s", error)

    def _note(self, sample: Sample, finding: Finding) -> None:
        self.outcomes["compared"] += 1
        if finding.log_likelihood is not None:
            self._surprise.observe(-finding.log_likelihood / finding.num_tokens)
            if sample.log_likelihood is not None:
                self._gap.observe((sample.log_likelihood - finding.log_likelihood) / finding.num_tokens)
        if not sample.is_greedy:
            return
        self._tokens += finding.num_tokens
        self._agreed += finding.num_agreed
        self._diverged += finding.num_common < finding.num_tokens
        self._common.observe(finding.num_common)
        self._recent.append(finding)
        self._look_for_drift()

    def _look_for_drift(self) -> None:
        """A line in the log when agreement falls below the least by more than chance, and when it is back."""
        agreement, num_tokens = self.agreement(), sum(finding.num_tokens for finding in self._recent)
        if agreement is None or len(self._recent) < _MIN_ANSWERS or num_tokens < _MIN_TOKENS:
            return
        chance = _SIGMAS * math.sqrt(self._least * (1 - self._least) / num_tokens)
        if not self._is_low and agreement < self._least - chance:
            self._is_low = True
            logger.warning(
                "shadow: drift: %s finds %.2f%% of the tokens of the last %d greedy answers likeliest, and %.2f%% is "
                "the least; run turbolm ladder on questions like those that come in now, or serve a milder "
                "quantization",
                self.reference.title, 100 * agreement, len(self._recent), 100 * self._least,
            )  # fmt: skip
        elif self._is_low and agreement >= self._least:
            self._is_low = False
            logger.warning("shadow: no more drift: %.2f%% of the tokens are likeliest", 100 * agreement)

    def collect(self, model: str) -> Iterator[Metric]:
        """For `/metrics`."""
        outcomes = CounterMetricFamily(
            "turbolm:shadow_answers", "Sampled answers by what became of them.", labels=["model_name", "outcome"]
        )
        for outcome in ("compared", "dropped", "failed", "interrupted", "skipped"):
            outcomes.add_metric([model, outcome], self.outcomes[outcome])
        yield outcomes
        for name, text, value in (
            ("turbolm:shadow_tokens", "Tokens of greedy answers that were compared.", self._tokens),
            ("turbolm:shadow_agreed_tokens", "Those that the reference finds likeliest.", self._agreed),
            ("turbolm:shadow_diverged", "Greedy answers that differ from the reference's own.", self._diverged),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([model], value)
            yield counter
        agreement = self.agreement()
        if agreement is not None:
            text = "Agreed part of the tokens of the last greedy answers, 0 to 1."
            gauge = GaugeMetricFamily("turbolm:shadow_agreement", text, labels=["model_name"])
            gauge.add_metric([model], agreement)
            yield gauge
        for histogram, name, text in (
            (self._common, "turbolm:shadow_common_tokens", "Tokens before the reference's greedy answer differs."),
            (self._surprise, "turbolm:shadow_surprise_nats", "Negative log-likelihood per token by the reference."),
            (self._gap, "turbolm:shadow_gap_nats", "Log-likelihood per token beyond the reference's."),
        ):
            yield histogram.family(name, text, model)


class _Listener:
    """A source whose first answer is noted when it is whole."""

    def __init__(self, source: Source, done: Callable[[Sample], None]) -> None:
        self.request = source.request
        self._source = source
        self._done = done
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []

    def begin(self, sink: Sink) -> None:
        self._source.begin(partial(self._take, sink))

    def end(self) -> None:
        self._source.end()

    def _take(self, sink: Sink, output: Output) -> None:
        sink(output)
        if output.index:
            return
        self._token_ids += output.token_ids
        self._logprobs += [entry.logprob for entry in output.logprobs]
        if output.finish_reason in ("stop", "length", "tool_calls") and self._token_ids:
            is_whole = len(self._logprobs) == len(self._token_ids)
            self._done(
                Sample(
                    self.request.prompt_token_ids,
                    tuple(self._token_ids),
                    is_plain_greedy(self.request.params),
                    math.fsum(self._logprobs) if is_whole else None,
                )
            )


def is_plain_greedy(params: SamplingParams) -> bool:
    """Whether each token was the likeliest, and nothing else had a say."""
    changes = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty - 1, params.min_tokens)
    is_greedy = params.temperature == 0 or params.top_k == 1
    return is_greedy and not any(changes) and not (params.logit_bias or params.bad_words or params.grammar)


def open_shadow(
    config: ShadowConfig, model: str, engine: EngineConfig, served: AsyncLLM, is_idle: Callable[[], bool], *,
    isolated: bool,
) -> Shadow:  # fmt: skip
    """Loads what answers are compared with. ConfigError where it is the same, CapacityError where it doesn't fit."""
    if config.shadow_url:
        key = os.environ.get(config.shadow_key_env) if config.shadow_key_env else None
        remote = UrlReference(config.shadow_url, config.shadow_model or served.model_name, key, served)
        return Shadow(remote, config, is_idle)
    reference = config.shadow_model or model
    if reference == model and engine.weights == "auto" and not served.config.kv.is_quantized:
        raise ConfigError(
            f"shadow compares with a higher precision, and '{model}' is served as it is in its files; name the model "
            "that it was made from with --shadow-model, or a server of that with --shadow-url"
        )
    return Shadow(open_engine(reference, engine, served, isolated=isolated), config, is_idle)
