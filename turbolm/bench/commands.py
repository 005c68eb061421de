"""`turbolm bench`: its commands live in files of their own and are loaded when they are used."""

from __future__ import annotations

from cyclopts import App

app = App(name="bench", help="Time this machine, or a server.", help_format="plaintext")
app.command(
    "turbolm.bench.throughput:throughput",
    name="throughput",
    help="Tokens per second of a model: prefill, and decode of several streams at once.",
)
app.command(
    "turbolm.bench.kernels:kernels",
    name="kernels",
    help="The matrix products of a model beside the limits of memory and arithmetic.",
)
app.command(
    "turbolm.bench.serve:serve",
    name="serve",
    help="How fast an OpenAI-compatible server answers under load: latencies, tokens per second, goodput.",
)
