"""Keys, CORS, ids, metrics, the page, readiness, the configuration."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from turbolm import __version__
from turbolm.errors import ConfigError
from turbolm.server.app import ROUTES
from turbolm.server.config import ServerConfig, read_keys
from turbolm.server.gate import OPEN_PATHS
from turbolm.server.metrics import Histogram

HELLO = {"prompt": "hello", "max_tokens": 4}


def test_every_endpoint_but_health_wants_a_key(null_llm, serving):
    with serving(null_llm, keys=(b"one", b"tw\xc3\xb6")) as served:
        for route in ROUTES:
            path = route.path.replace("{model:path}", "null").replace("{asset}", "swagger-ui.css")
            method = served.post if "POST" in route.methods else lambda path, _, **o: served.get(path, **o)
            status = method(path, {}).status_code
            assert status == (200 if path in OPEN_PATHS else 401), path
        post = served.post
        assert post("/v1/completions", HELLO, headers={"authorization": "Bearer one"}).status_code == 200
        assert post("/v1/completions", HELLO, headers={"authorization": "bearer twö".encode()}).status_code == 200
        assert post("/v1/completions", HELLO, headers={"x-api-key": "one"}).status_code == 200
        wrong = post("/v1/completions", HELLO, headers={"authorization": "Bearer onE"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
        assert post("/v1/completions", HELLO, headers={"authorization": "one"}).status_code == 401


def test_cors_is_off_unless_asked_for(null, null_llm, serving):
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in null.get("/health", headers=headers).headers
    with serving(null_llm, ServerConfig(cors_origins=("https://example.org",)), keys=(b"k",)) as served:
        preflight = httpx.options(f"{served.url}/v1/completions", headers=headers)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "https://example.org")
        assert "access-control-allow-origin" not in served.get("/health", headers={"origin": "https://x.org"}).headers


def test_ids_and_one_log_line_per_request(null, caplog, wait_until):
    access = logging.getLogger("turbolm.server.access")
    access.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO, "turbolm.server.access"):
        response = null.post("/v1/completions", HELLO | {"user": "me"}, headers={"x-request-id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        forged = null.post("/v1/completions", HELLO, headers={"x-request-id": "a b"})
        assert forged.headers["x-request-id"] != "a b"
        wait_until(lambda: len(caplog.records) == 2)
    line = json.loads(caplog.records[0].message)
    assert {
        "id": "abc-1",
        "status": 200,
        "outcome": "ok",
        "prompt_tokens": 5,
        "answer_tokens": 4,
        "user": "me",
    }.items() <= line.items()
    assert "hello" not in caplog.text


def test_prompts_are_logged_when_asked_for(null_llm, caplog, serving, wait_until):
    with serving(null_llm, ServerConfig(log_prompts=True)) as served, caplog.at_level(logging.INFO):
        served.post("/v1/completions", HELLO)
        wait_until(lambda: any("body" in record.message and "hello" in record.message for record in caplog.records))


def test_metrics_count_what_was_served(null_llm, serving, wait_until):
    with serving(null_llm) as served:
        served.post("/v1/completions", HELLO)
        served.post("/v1/completions", HELLO | {"stream": True, "n": 2})
        served.post("/v1/completions", {"prompt": 3})
        wait_until(lambda: served.service.num_admitted == 0)
        families = {family.name: family for family in text_string_to_metric_families(served.get("/metrics").text)}
    values = {(s.name, *sorted(s.labels.values())): s.value for f in families.values() for s in f.samples}
    assert values["vllm:generation_tokens_total", "null"] == 12
    assert values["vllm:prompt_tokens_total", "null"] == 10
    assert values["vllm:request_success_total", "length", "null"] == 3
    assert values["turbolm:requests_total", "/v1/completions", "200", "ok"] == 2
    assert values["vllm:time_to_first_token_seconds_count", "null"] == 2
    assert values["vllm:e2e_request_latency_seconds_count", "null"] == 2
    assert values["vllm:request_queue_time_seconds_count", "null"] == 2
    assert values["vllm:request_queue_time_seconds_sum", "null"] > 0
    assert values["vllm:num_requests_running", "null"] == 0
    assert values["vllm:kv_cache_usage_perc", "null"] == 0
    assert values["vllm:inter_token_latency_seconds_count", "null"] > 0
    refused = next(s for s in families["turbolm:requests"].samples if s.labels["status"] == "400")
    assert (refused.labels["outcome"], refused.value) == ("refused", 1)


def test_histograms_count_up_to_each_bound():
    histogram = Histogram((1.0, 2.0))
    histogram.observe(1.0)
    histogram.observe(1.5, 3)
    histogram.observe(9.0)
    samples = {s.labels.get("le", s.name): s.value for s in histogram.family("h", "help", "m").samples}
    assert samples == {"1.0": 1, "2.0": 4, "+Inf": 5, "h_count": 5, "h_sum": 14.5}


def test_the_page_works_offline(null):
    page = null.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    for name, size in (("swagger-ui-bundle.js", 500_000), ("swagger-ui.css", 50_000)):
        assert name in page
        assert len(null.get(f"/docs/{name}").content) > size
    assert null.get("/docs/..%2fcore.py").status_code == 404
    document = null.get("/openapi.json").json()
    assert {route.path.replace(":path", "") for route in ROUTES} - document["paths"].keys() == {
        "/docs", "/docs/{asset}", "/openapi.json",
    }  # fmt: skip
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert "temperature" in fields
    text = json.dumps(document)
    for reference in {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}:
        assert reference in document["components"]["schemas"]


def test_models_say_what_became_of_auto(null):
    assert [entry.id for entry in null.client.models.list()] == ["null"]
    shown = null.client.models.retrieve("null")
    assert shown.config["max_context"] == shown.max_model_len == 2048
    assert any("device" in reason for reason in shown.reasons)
    assert null.get("/version").json() == {"version": __version__}
    assert null.get("/ready").status_code == 200


def test_a_wedged_engine_is_not_ready(null, monkeypatch):
    service = null.service
    monkeypatch.setattr(service, "_exchanges", {object()})
    monkeypatch.setattr(service, "_steps", (service.llm.stats.num_steps, -1000.0))
    assert "made no step" in service.why_not_ready()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prot": 1}, "Did you mean 'port'?"),
        ({"port": 70000}, "0 to 65535"),
        ({"max_requests": 0}, "1 or more"),
        ({"max_body": "much"}, "max_body is 'much'"),
        ({"drain_timeout": -1.0}, "drain_timeout"),
        ({"tls_key": "x.pem"}, "belong together"),
        ({"tls_key": "x.pem", "tls_certificate": "y.pem"}, "no file"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        ServerConfig.of(None, **options)


def test_broken_certificates(tmp_path):
    path = tmp_path / "x.pem"
    path.write_text("nothing")
    with pytest.raises(ConfigError, match="PEM files that belong together"):
        ServerConfig(tls_key=str(path), tls_certificate=str(path))


def test_keys_come_from_files_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# people\none\n\n two \n")
    monkeypatch.setenv("MY_KEYS", "three, four")
    assert read_keys(ServerConfig(api_key_file=str(path), api_key_env="MY_KEYS")) == (b"one", b"two", b"three", b"four")
    assert read_keys(ServerConfig()) == ()
    path.write_text("# nobody\n")
    for config in (
        ServerConfig(api_key_file=str(path)),
        ServerConfig(api_key_env="NONE"),
        ServerConfig(api_key_file="no"),
    ):
        with pytest.raises(ConfigError, match="api_key"):
            read_keys(config)


def test_loopback_addresses():
    assert all(ServerConfig(host=host).is_loopback for host in ("127.0.0.1", "localhost", "::1"))
    assert not any(ServerConfig(host=host).is_loopback for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_the_dashboard_asks_for_series_that_exist(null):
    dashboard = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text())
    wanted = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|turbolm):\w+", target["expr"])
    }
    null.post("/v1/completions", HELLO)
    families = text_string_to_metric_families(null.get("/metrics").text)
    assert wanted <= {sample.name for family in families for sample in family.samples}
    assert len(wanted) > 15


def test_the_model_shows_its_limits(null):
    found = null.get("/v1/models/null").json()
    assert found["config"]["kv"]["k"] == null.service.llm.config.kv.k
    assert found["kv_cache_tokens"] == null.service.llm.config.pool_tokens
    assert found["limits"]["max_answers"] == 128
    assert found["limits"]["max_body"] == 8 << 20
