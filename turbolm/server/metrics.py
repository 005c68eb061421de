"""What `/metrics` shows. Series that vLLM has too carry its names, which dashboards and autoscalers look for.

Values change in the event loop's thread alone, so nothing is locked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from turbolm.engine.step import SchedulerStats

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LONG = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, help_text: str, model: str) -> Metric:
        family = HistogramMetricFamily(name, help_text, labels=["model_name"])
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric([model], buckets, self._sum)
        return family


class Metrics:
    def __init__(self, model: str, stats: Callable[[], SchedulerStats], live: Callable[[], tuple[int, int]]) -> None:
        """`live` tells how many requests have begun to answer, and how many have not."""
        self._model = model
        self._stats = stats
        self._live = live
        self.requests: Counter[tuple[str, str, int]] = Counter()  # by path, outcome, status
        self.finished: Counter[str] = Counter()  # answers by finish reason
        self.num_prompt_tokens = 0
        self.num_answer_tokens = 0
        self.first_token = Histogram(_FIRST)  # seconds
        self.between_tokens = Histogram(_FAST)  # seconds
        self.end_to_end = Histogram(_LONG)  # seconds
        self.queue = Histogram(_LONG)  # seconds
        self.prompt_length = Histogram(TOKENS)
        self.answer_length = Histogram(TOKENS)
        self.more: list[Callable[[str], Iterator[Metric]]] = []  # what else is shown, given the model's name
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._engine()
        requests = CounterMetricFamily(
            "turbolm:requests", "Requests by path, outcome and status.", labels=["path", "outcome", "status"]
        )
        for (path, outcome, status), count in sorted(self.requests.items()):
            requests.add_metric([path, outcome, str(status)], count)
        yield requests
        finished = CounterMetricFamily(
            "vllm:request_success", "Answers by finish reason.", labels=["model_name", "finished_reason"]
        )
        for reason in sorted({"stop", "length", "abort", *self.finished}):
            finished.add_metric([self._model, reason], self.finished[reason])
        yield finished
        for histogram, name, text in (
            (self.first_token, "vllm:time_to_first_token_seconds", "From the request to its first token."),
            (self.between_tokens, "vllm:inter_token_latency_seconds", "From one token to the next."),
            (self.queue, "vllm:request_queue_time_seconds", "From the request to the first step that computes it."),
            (self.end_to_end, "vllm:e2e_request_latency_seconds", "From the request to the end of its answers."),
            (self.prompt_length, "vllm:request_prompt_tokens", "Prompt tokens of a request."),
            (self.answer_length, "vllm:request_generation_tokens", "Answer tokens of a request."),
        ):
            yield histogram.family(name, text, self._model)
        for collect in self.more:
            yield from collect(self._model)

    def _engine(self) -> Iterator[Metric]:
        stats = self._stats()
        running, waiting = self._live()
        for name, text, value in (
            ("vllm:num_requests_running", "Requests that have begun to answer.", running),
            ("vllm:num_requests_waiting", "Requests that wait for their first token.", waiting),
            ("vllm:kv_cache_usage_perc", "Part of the KV cache that requests hold, 0 to 1.", stats.kv_use),
        ):
            yield self._one(GaugeMetricFamily(name, text, labels=["model_name"]), value)
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens of requests that came to an end.", self.num_prompt_tokens),
            ("vllm:generation_tokens", "Answer tokens sent.", self.num_answer_tokens),
            ("vllm:num_preemptions", "Times that a request lost its KV blocks.", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.num_prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.num_prefix_hit_tokens),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed and verified.", stats.num_draft_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.num_accepted_tokens),
            ("turbolm:steps", "Steps of the engine.", stats.num_steps),
            ("turbolm:graph_steps", "Steps that replayed a CUDA graph.", stats.num_replays),
            ("turbolm:engine_restarts", "Times that the engine's process was started again.", stats.num_restarts),
        ):
            yield self._one(CounterMetricFamily(name, text, labels=["model_name"]), value)

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family
