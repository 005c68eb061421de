"""An engine process without a model or torch: its prompts say what goes wrong.

[KILL, …]   the process kills itself when it computes this prompt
[HANG, …]   the step never ends
[BREAK, …]  the step raises
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from turbolm.config import EngineConfig, Hardware, ResolvedConfig, resolve
from turbolm.engine.scheduler import Scheduler
from turbolm.engine.step import Step, StepResult
from turbolm.errors import CapacityError, ModelNotFoundError, RequestError
from turbolm.kv import KvShape
from turbolm.lora import adapter_sources
from turbolm.memory import ModelNeeds
from turbolm.types import LoadedAdapter
from turbolm.worker.process import main

KILL, HANG, BREAK = 1, 2, 3
STEP_SECONDS = 0.002


class ToyRunner:
    depth = 1
    num_replays = 0

    def submit(self, step: Step) -> ToyRunner:
        self.step = step
        return self

    def results(self) -> list[StepResult]:
        for item in self.step.items:
            prompt = item.sequence.request.prompt_token_ids
            if prompt[0] == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif prompt[0] == HANG:
                time.sleep(3600)
            elif prompt[0] == BREAK:
                raise RuntimeError("a device error")
        time.sleep(STEP_SECONDS)
        return [StepResult((self.next_token(item.sequence.token_ids),)) for item in self.step.items]

    @staticmethod
    def next_token(token_ids: list[int]) -> int:
        return 100 + (token_ids[-1] * 31 + len(token_ids)) % 50

    def warm_up(self) -> bool:
        return False

    def close(self) -> None:
        pass


class ToyAdapters:
    """Adapters without weights: files that are there can be added."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.named: dict[str, LoadedAdapter] = {}
        for name, source in sources.items():
            self.add(name, self.read(source))

    def read(self, source: str) -> str:
        if not Path(source).exists():
            raise ModelNotFoundError(f"there is no adapter '{source}'")
        return source

    def add(self, name: str, adapter: object, is_used: object = None) -> None:
        self.named[name] = LoadedAdapter(name, len(self.named), len(self.named))

    def remove(self, name: str) -> None:
        del self.named[self.find(name).name]

    def find(self, name: str) -> LoadedAdapter:
        if name not in self.named:
            raise RequestError(f"no adapter '{name}'", "adapter")
        return self.named[name]


@dataclass
class ToyModel:
    name: str
    path: Path | None
    config: ResolvedConfig
    scheduler: Scheduler
    runner: ToyRunner
    adapters: ToyAdapters
    grammars: None = None


def load(name: str, config: EngineConfig, progress: bool) -> ToyModel:
    if name == "missing":
        raise ModelNotFoundError("there is no model 'missing'")
    if name == "too-large":
        raise CapacityError("too large")
    if name == "odd":
        raise RequestError("odd", "prompt")
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "bug":
        raise ZeroDivisionError("a bug in loading")
    if name.startswith("once:"):  # loads, but not again
        marker = Path(name[5:])
        if marker.exists():
            raise CapacityError("no memory left")
        marker.touch()
    needs = ModelNeeds("toy", 4096, 0, 0, (KvShape(1, 1, 1),), 256)
    resolved = resolve(config, needs, Hardware("toy", "x86_64", 1, (), 1 << 34, 1 << 34))
    scheduler = Scheduler(
        num_blocks=256, block_size=16, max_batch_size=8, max_batch_tokens=256, max_context=2048, max_waiting=1000
    )
    adapters = ToyAdapters(adapter_sources(config.adapters))
    return ToyModel(f"toy/{name}", None, resolved, scheduler, ToyRunner(), adapters)


if __name__ == "__main__":
    main(load, sys.argv[1:])
