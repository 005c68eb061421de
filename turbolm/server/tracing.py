"""OpenTelemetry traces: one span for each request that the model is to answer, with the names of the semantic
conventions for generative AI. No prompt, no answer, no stop string is in it.

Times that the conventions don't name carry vLLM's names. A span is made when its request ends, so that requests at
work have nothing to do with tracing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from turbolm import __version__
from turbolm.errors import ConfigError
from turbolm.server.exchange import Record

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

logger = logging.getLogger(__name__)

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_TRACES_PATH = "/v1/traces"
_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
#: Sampling parameters that are shown, by attribute. What is at its neutral value is left out.
_PARAMETERS = {
    "gen_ai.request.max_tokens": ("max_tokens", None),
    "gen_ai.request.temperature": ("temperature", None),
    "gen_ai.request.top_p": ("top_p", 1.0),
    "gen_ai.request.top_k": ("top_k", 0),
    "gen_ai.request.frequency_penalty": ("frequency_penalty", 0.0),
    "gen_ai.request.presence_penalty": ("presence_penalty", 0.0),
    "gen_ai.request.seed": ("seed", None),
    "gen_ai.request.choice.count": ("n", 1),
}
Value = str | float | int | bool | tuple[str, ...]


class Tracing:
    """Where spans go."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("turbolm", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def note(self, record: Record, model: str, headers: Mapping[bytes, bytes]) -> None:
        """A request has ended. Its span belongs to the trace that the header `traceparent` names, if there is one."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode

        operation = OPERATIONS.get(record.path)
        if operation is None or record.method != "POST":
            return
        seconds, now = time.perf_counter() - record.started, time.time_ns()
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=self._propagator.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, "gen_ai.provider.name": "turbolm",
                        "gen_ai.request.model": model},
            start_time=now - round(seconds * 1e9),
        )  # fmt: skip
        if span.is_recording():
            span.set_attributes(attributes(record, seconds))
            if record.outcome in ("failed", "timeout"):
                span.set_status(Status(StatusCode.ERROR))
        span.end(now)

    def close(self) -> None:
        """Sends what is left, as far as there is somebody to take it."""
        self._provider.shutdown()


def attributes(record: Record, seconds: float) -> dict[str, Value]:
    """What a span says of a request that took so long."""
    found: dict[str, Value] = {
        "gen_ai.request.id": record.id,
        "gen_ai.request.stream": record.streams,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "gen_ai.latency.e2e": seconds,
    }
    for name, (field, neutral) in _PARAMETERS.items():
        value = getattr(record.params, field, None)
        if value is not None and value != neutral and abs(value) < 1 << 63:  # OTLP's integers
            found[name] = value
    if record.outcome != "ok":
        found["error.type"] = str(record.status) if record.status >= 400 else record.outcome
    usage = record.usage
    if usage.prompt_tokens:
        found["gen_ai.usage.input_tokens"] = usage.prompt_tokens
        found["gen_ai.usage.output_tokens"] = usage.completion_tokens
        found["gen_ai.usage.cache_read.input_tokens"] = usage.cached_tokens
    if record.finish_reasons:
        found["gen_ai.response.finish_reasons"] = tuple(record.finish_reasons)
    if record.first_token:
        found["gen_ai.latency.time_in_queue"] = usage.queued
        found["gen_ai.latency.time_in_model_prefill"] = max(record.first_token - usage.queued, 0.0)
        found["gen_ai.latency.time_in_model_decode"] = max(seconds - record.first_token, 0.0)
        found["gen_ai.latency.time_to_first_token"] = record.first_token
        if record.streams:
            found["gen_ai.response.time_to_first_chunk"] = record.first_token
    return found


def start_tracing(endpoint: str | None) -> Tracing | None:
    """Traces to a collector, where the user names one: here, or in OpenTelemetry's environment variables. Raises
    ConfigError where `endpoint` can't be served; what the environment asks in vain is a warning."""
    by_environment = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if endpoint is None and (by_environment is None or os.environ.get("OTEL_TRACES_EXPORTER") == "none"):
        return None
    name = "otlp_endpoint" if endpoint is not None else str(by_environment)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        text = f"{name}: traces need packages that are missing ({error}): pip install 'turbolm[otel]'"
        if endpoint is not None:
            raise ConfigError(text) from None
        logger.warning("%s", text)
        return None
    if endpoint is None and any(os.environ.get(name) == "grpc" for name in _PROTOCOLS):
        logger.warning("%s: turbolm sends traces by HTTP alone, not by gRPC: there will be none", name)
        return None
    if endpoint is not None and not endpoint.endswith(_TRACES_PATH):
        endpoint = endpoint.rstrip("/") + _TRACES_PATH
    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint)))


def _resource() -> Resource:
    """Who sends the spans; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come first."""
    from opentelemetry.sdk.resources import Resource

    found = Resource.create({"service.version": __version__})
    if str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        found = found.merge(Resource({"service.name": "turbolm"}))
    return found
