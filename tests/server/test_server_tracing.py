"""Spans: what they say, what they don't, and that a collector gets them."""

from __future__ import annotations

import http.server
import logging
import sys
import threading
import time

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from turbolm.engine.scheduler import Scheduler
from turbolm.errors import ConfigError
from turbolm.server.config import ServerConfig
from turbolm.server.tracing import Tracing, start_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the secret prompt"


@pytest.fixture
def spans(null, monkeypatch):
    """What was exported since the last call, as soon as there are so many."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(null.service, "tracing", tracing)
    yield exporter.get_finished_spans
    tracing.close()


def one(spans, wait_until):
    wait_until(lambda: len(spans()) == 1)
    return spans()[0]


def test_a_span_says_what_the_request_took(null, spans, wait_until):
    null.post("/v1/chat/completions", {
        "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "temperature": 0.5, "n": 2,
        "stop": ["\x01secret"],
    }, headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "abc"})  # fmt: skip
    span = one(spans, wait_until)
    assert (span.name, span.kind, span.status.status_code) == ("chat null", SpanKind.SERVER, StatusCode.UNSET)
    assert f"{span.context.trace_id:x}" == TRACE.lstrip("0")
    assert f"{span.parent.span_id:x}" == PARENT
    said = span.attributes
    assert {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "turbolm", "gen_ai.request.model": "null",
        "gen_ai.request.id": "abc", "gen_ai.request.max_tokens": 4, "gen_ai.request.temperature": 0.5,
        "gen_ai.request.choice.count": 2, "gen_ai.request.stream": False, "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ("length", "length"), "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }.items() <= said.items()  # fmt: skip
    assert "error.type" not in said
    assert "secret" not in span.to_json()
    seconds = (span.end_time - span.start_time) / 1e9
    parts = [said[f"gen_ai.latency.time_in_{part}"] for part in ("queue", "model_prefill", "model_decode")]
    assert said["gen_ai.latency.e2e"] == pytest.approx(seconds, abs=1e-6) == pytest.approx(sum(parts), abs=1e-6)
    assert all(part >= 0 for part in parts)
    assert said["gen_ai.latency.time_to_first_token"] == pytest.approx(parts[0] + parts[1])


def test_the_queue_is_the_time_before_the_first_step(null, spans, monkeypatch, wait_until):
    start = Scheduler._start

    def late(self, job, hits):
        time.sleep(0.1)
        start(self, job, hits)

    monkeypatch.setattr(Scheduler, "_start", late)
    null.post("/v1/completions", {"prompt": "hello", "max_tokens": 2})
    said = one(spans, wait_until).attributes
    assert 0.1 <= said["gen_ai.latency.time_in_queue"] < said["gen_ai.latency.time_to_first_token"]


@pytest.mark.parametrize(("path", "body", "operation"), [
    ("/v1/completions", {"prompt": "hello", "max_tokens": 3, "stream": True}, "text_completion"),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 3, "stream": True}, "chat"),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}, "chat"),
])  # fmt: skip
def test_every_api_that_answers_has_spans(null, spans, wait_until, path, body, operation):
    null.post(path, body)
    said = one(spans, wait_until).attributes
    assert said["gen_ai.operation.name"] == operation
    assert said["gen_ai.usage.output_tokens"] == 3
    assert said["gen_ai.request.stream"] is True
    assert said["gen_ai.response.time_to_first_chunk"] == said["gen_ai.latency.time_to_first_token"]


def test_a_seed_beyond_otlps_integers_is_left_out(null, spans, wait_until):
    null.post("/v1/completions", {"prompt": "x", "max_tokens": 1, "seed": (1 << 64) - 1})
    assert "gen_ai.request.seed" not in one(spans, wait_until).attributes


def test_refused_requests_and_others(null, spans, wait_until):
    null.get("/v1/models")
    null.post("/tokenize", {"prompt": "x"})
    null.post("/v1/completions", {"prompt": 3})
    span = one(spans, wait_until)
    assert (span.attributes["error.type"], span.status.status_code) == ("400", StatusCode.UNSET)
    assert span.parent is None
    assert "gen_ai.usage.input_tokens" not in span.attributes


def test_an_unsampled_trace_is_left_alone(null, spans, wait_until):
    hello = {"prompt": "hello", "max_tokens": 1}
    null.post("/v1/completions", hello, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    null.post("/v1/completions", hello, headers={"traceparent": "nonsense"})
    assert one(spans, wait_until).parent is None


class Collector(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_POST(self):
        self.received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_collector_gets_the_spans(null, monkeypatch, wait_until):
    handler = type("One", (Collector,), {"received": []})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracing = start_tracing(f"http://127.0.0.1:{collector.server_address[1]}/")
        monkeypatch.setattr(null.service, "tracing", tracing)
        null.post("/v1/completions", {"prompt": "hello", "max_tokens": 1})
        wait_until(lambda: null.service.num_admitted == 0)
        tracing.close()
        collector.shutdown()
    [(path, data)] = handler.received
    assert path == "/v1/traces"
    [resource] = ExportTraceServiceRequest.FromString(data).resource_spans
    about = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    assert about["service.name"] == "turbolm"
    assert resource.scope_spans[0].spans[0].name == "text_completion null"


def test_tracing_is_off_unless_asked_for(monkeypatch, caplog):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert start_tracing(None) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracing = start_tracing(None)
    assert tracing._provider.resource.attributes["service.name"] == "mine"
    tracing.close()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with caplog.at_level(logging.WARNING):
        assert start_tracing(None) is None
    assert "not by gRPC" in caplog.text


def test_what_is_missing_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"pip install 'turbolm\[otel\]'"):
        start_tracing("http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert start_tracing(None) is None
    assert "turbolm[otel]" in caplog.text
    with pytest.raises(ConfigError, match="http://localhost:4318"):
        ServerConfig(otlp_endpoint="localhost:4318")
