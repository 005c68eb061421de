"""`turbolm bench`: its commands live in files of their own and are loaded when they are used."""

from __future__ import annotations

from cyclopts import App

app = App(name="bench", help="Time this machine: a model's tokens per second, the kernels.", help_format="plaintext")
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
