from __future__ import annotations

import json

from turbolm.compress.report import MatrixReport, Report, matrix_from_json, suffering, warnings_of


def matrices(*errors, notes=()):
    return [MatrixReport(f"model.layers.{i}.mlp.up_proj", 0.1, error, 5, notes) for i, error in enumerate(errors)]


def test_matrices_that_lost_much_are_named_worst_first():
    found = matrices(0.004, 0.005, 0.2, 0.006, 0.045, 0.004)
    assert [matrix.error for matrix in suffering(found)] == [0.2, 0.045]
    (warning,) = warnings_of(found)
    assert "layers.2.mlp.up_proj (20.0%), model.layers.4" in warning
    assert warnings_of(matrices(0.004, 0.005, 0.006)) == []
    assert warnings_of([]) == []


def test_notes_are_said_once_with_all_names():
    (warning,) = warnings_of(matrices(*[0.001] * 6, notes=("odd",)))
    assert warning.startswith("odd: model.layers.0.mlp.up_proj")
    assert warning.endswith("and 2 more")


def test_json_and_layers():
    found = tuple(matrices(0.1, 0.2, notes=("odd",)))
    report = Report({"method": "awq"}, found, ("w",), 1.5, 10, 20, 3, 300)
    again = json.loads(json.dumps(report.as_json()))
    assert tuple(matrix_from_json(value) for value in again["matrices"]) == found
    assert list(report.by_layer()) == ["model.layers.0", "model.layers.1"]
