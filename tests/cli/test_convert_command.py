from __future__ import annotations

import subprocess
import sys

import pytest

from turbolm.cli.main import main


def test_converts(smollm2_path, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["convert", str(smollm2_path), "-o", str(output), "--device", "cpu"]) == 0
    assert f"{output}: 96." in capsys.readouterr().out
    assert main(["chat", str(output), "--prompt", "Hi", "--temperature", "0", "--max-tokens", "4"]) == 0
    answer = capsys.readouterr().out
    assert main(["chat", str(smollm2_path), "--prompt", "Hi", "--temperature", "0", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--tensor-parallel", "2"], "run in one process: use 1, or device 'cuda'"),
        (["--device", "cuda", "--dtype", "float32"], "compute in bfloat16 or float16"),
        (["--device", "cpu", "--weights", "int5"], 'invalid value "int5" for --weights'),
        (["--kv", "int8"], "unknown option"),
    ],
)
def test_mistakes_end_with_a_message(tmp_path, capsys, arguments, message):
    assert main(["convert", "smollm2-135m", "-o", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_does_not_load_torch():
    code = (
        "import sys; from turbolm.cli.main import main; main(['convert', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tensor-parallel" in done.stdout
