from __future__ import annotations

import logging

import pytest

from turbolm import fallbacks


def test_told_once_and_to_each_who_listens(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model that runs the slower way says so too, though the log has it already."""
    monkeypatch.setattr(fallbacks, "_told", set())
    logger = logging.getLogger("turbolm.test")
    with fallbacks.collected() as first:
        fallbacks.note_fallback(logger, "slow 5%")
        fallbacks.note_fallback(logger, "slow 5%")
    with fallbacks.collected() as second:
        fallbacks.note_fallback(logger, "slow 5%")
    fallbacks.note_fallback(logger, "other")
    assert first == second == ["slow 5%"]
    assert [record.getMessage() for record in caplog.records] == ["slow 5%", "other"]
