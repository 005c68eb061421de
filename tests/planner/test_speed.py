"""Predicted steps beside the measured ones in benchmarks/results."""

from __future__ import annotations

from dataclasses import replace

import plan_fit
import pytest

from turbolm.planner.gpus import parse_machine
from turbolm.planner.speed import GPU, StepCost, step_seconds

ROWS = plan_fit.read_rows()
COST = StepCost(16 * 10**9, 131072, 8 * 10**9, 32, is_shared=False)


def test_there_are_records() -> None:
    assert {row.streams for row in ROWS} >= {1, 64, 256}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_predictions_are_near_what_was_measured(row: plan_fit.Row) -> None:
    """Where this fails after new measurements, benchmarks/plan_fit.py gives the new figures for speed.py."""
    assert row.predicted == pytest.approx(row.seconds, rel=0.25)


def test_the_script_weighs_what_the_formula_does() -> None:
    row = ROWS[0]
    parts = (1 / GPU.weights, 1 / GPU.kv, GPU.arithmetic, GPU.layer_seconds, GPU.exchange_seconds)
    assert sum(a * b for a, b in zip(plan_fit.features(row), parts, strict=True)) == pytest.approx(row.predicted)


def test_a_step_takes_longer_with_every_cost() -> None:
    rates = parse_machine("h200").rates
    base = step_seconds(rates, COST, 8, 1000)
    assert step_seconds(rates, COST, 9, 1000) > base
    assert step_seconds(rates, COST, 8, 2000) > base
    assert step_seconds(rates, replace(COST, is_shared=True), 8, 1000) > base
    assert base > COST.weight_bytes / rates.bandwidth
