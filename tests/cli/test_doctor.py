from __future__ import annotations

import platform

import torch

from turbolm import __version__
from turbolm.cli import doctor
from turbolm.cli.main import main
from turbolm.errors import ConfigError


def test_tells_machine_software_and_choices(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOLM_CACHE", str(tmp_path / "models-here"))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for text in (__version__, platform.python_version(), torch.__version__, str(tmp_path / "models-here"), "device"):
        assert text in printed


def test_a_machine_that_cannot_run_anything_is_told_so(capsys, monkeypatch):
    def refuse(config, hardware):
        raise ConfigError("nothing runs here")

    monkeypatch.setattr(doctor, "choose_backend", refuse)
    assert main(["doctor"]) == 0
    assert "nothing runs here" in capsys.readouterr().out
