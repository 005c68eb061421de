"""llama.cpp, driven through its C interface: llama_decode and its own greedy sampler, with flash attention."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import Workload

from turbolm.env import cache_folder

_BATCH = 512


class LlamaCppEngine:
    """Prompts of all streams one after the other, then one batch per step with a token of each stream."""

    def __init__(self, path: str, threads: int, max_context: int, max_streams: int, kv_tokens: int = 0) -> None:
        """`kv_tokens`: that the KV cache holds, shared by all streams; 0: `max_context` for each."""
        self.lib = llama_cpp = library()
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = kv_tokens or max_context * max_streams
        params.n_batch = params.n_ubatch = _BATCH
        params.n_seq_max = max_streams
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1  # enabled
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, f"llama.cpp can't load {path} with {params.n_ctx} tokens of KV cache"
        self.load_seconds = time.perf_counter() - start
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        self.batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._filled: list[Sequence[int]] = [()] * max_streams  # the prompt in each stream's part of the cache

    def run(self, work: Workload, round_: int) -> float:
        """Tokens per second, counted as `run_turbolm` counts them; nothing is cached between calls."""
        self.lib.llama_memory_clear(self.memory, True)
        self._filled = [()] * len(self._filled)
        return self._run(work.prompts(self.vocab_size, round_), work.answer)

    def run_prompts(self, prompts: Sequence[Sequence[int]], answer: int) -> float:
        """Tokens per second; prompts that begin as those of the call before are not computed again, as turbolm's
        prefix cache does it."""
        for stream in range(len(prompts), len(self._filled)):
            self.lib.llama_memory_seq_rm(self.memory, stream, -1, -1)
            self._filled[stream] = ()
        return self._run(prompts, answer)

    def _run(self, prompts: Sequence[Sequence[int]], answer: int) -> float:
        start = time.perf_counter()
        tokens = [self._prefill(stream, prompt) for stream, prompt in enumerate(prompts)]
        if answer == 1:
            return sum(map(len, prompts)) / (time.perf_counter() - start)
        positions = [len(prompt) for prompt in prompts]
        start = time.perf_counter()
        for step in range(answer - 1):
            self._fill([(tokens[stream], position + step, stream, True) for stream, position in enumerate(positions)])
            tokens = [self._sample(row) for row in range(len(prompts))]
        return len(prompts) * (answer - 1) / (time.perf_counter() - start)

    def _prefill(self, stream: int, prompt: Sequence[int]) -> int:
        known = self._filled[stream]
        same = next((i for i, pair in enumerate(zip(known, prompt, strict=False)) if pair[0] != pair[1]), len(known))
        kept = min(same, len(known), len(prompt) - 1)  # the last token is computed for its logits
        self.lib.llama_memory_seq_rm(self.memory, stream, kept, -1)
        rows = [(token, i, stream, i == len(prompt) - 1) for i, token in enumerate(prompt)][kept:]
        for first in range(0, len(rows), _BATCH):
            self._fill(rows[first : first + _BATCH])
        self._filled[stream] = prompt
        return self._sample(-1)

    def _sample(self, row: int) -> int:
        return int(self.lib.llama_sampler_sample(self.sampler, self.context, row))

    def _fill(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, stream, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
        status = self.lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode returned {status}"

    def about(self) -> dict[str, Any]:
        version = f"llama-cpp-python {self.lib.__version__}; {self.lib.llama_print_system_info().decode()}"
        kv_tokens = int(self.lib.llama_n_ctx(self.context))
        return {"load_seconds": self.load_seconds, "version": version, "kv_tokens": kv_tokens}


@functools.cache
def library() -> Any:
    """llama.cpp's Python module, which these scripts take only where it is installed; silent."""
    import llama_cpp

    llama_cpp.turbolm_log = llama_cpp.llama_log_callback(lambda *_: None)  # must live as long as the library
    llama_cpp.llama_log_set(llama_cpp.turbolm_log, None)
    return llama_cpp


def requantized(path: Path, threads: int) -> Path:
    """The model as Q4_0, llama.cpp's fastest format: made once, with llama.cpp's own quantizer, and lossy where the
    file is quantized already."""
    made = cache_folder() / "benchmarks" / f"{path.stem}.as-q4_0.gguf"
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_suffix(".partial")
    llama_cpp = library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(str(path).encode(), str(partial).encode(), params)
    assert status == 0, f"llama_model_quantize returned {status}"
    return partial.replace(made)
