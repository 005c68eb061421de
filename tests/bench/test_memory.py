"""What serving the default model takes in memory: its weights, its KV cache, and little else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CODE = """
import json, re, sys
import torch

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1])

library = kilobytes("VmRSS")
from turbolm import LLM, SamplingParams
with LLM(sys.argv[1], progress=False, kv_memory="32M", max_context=1024, threads=2) as llm:
    loaded = kilobytes("VmHWM")
    llm.generate([list(range(100 + n, 1000 + n)) for n in (0, 7)], SamplingParams(max_tokens=8, ignore_eos=True))
print(json.dumps({"library": library * 1024, "loaded": loaded * 1024, "peak": kilobytes("VmHWM") * 1024}))
"""


def test_peak_memory_is_weights_kv_cache_and_300_mb(smollm2_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(smollm2_path)], capture_output=True, text=True, timeout=240, check=True
    )
    found = json.loads(done.stdout)
    weights, pool = smollm2_path.stat().st_size, 32 << 20
    # PyTorch itself is 235 MB of it in its CPU build, more in others.
    rest = max(300 << 20, found["library"] + (65 << 20))
    assert found["loaded"] <= weights + rest, found  # the KV cache is taken as it fills
    assert found["peak"] <= weights + pool + rest, found
