"""The HTTP servers of vLLM and LMDeploy over an engine that computes nothing: what benchmarks/front_ends.py times.

Runs with the Python of an environment that has them (front_ends.py says how to make one), and needs nothing of turbolm:

    PYTHON benchmarks/peer_front_ends.py vllm|lmdeploy PORT FOLDER

Everything from the socket to the engine's client is theirs. The engine hands over finished text, token by token, in
this process: no detokenization and no second process, which both need with a real one. So it flatters them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTEXT = 4096


def write_model(folder: Path) -> None:
    """A model's folder without weights: a small Llama's configuration, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"},
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 64,
            "vocab_size": 257, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "eos_token_id": 256,
            "torch_dtype": "bfloat16",
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


async def letters(count: int) -> AsyncIterator[tuple[int, str, bool]]:
    """An answer's tokens: number, text, whether it is the last. All streams go on in turn."""
    for number in range(1, count + 1):
        await asyncio.sleep(0)
        yield number, LETTERS[number % 26], number == count


def serve_vllm(port: int, folder: Path) -> None:
    from vllm import platforms

    platforms.builtin_platform_plugins = {"cpu": lambda: "vllm.platforms.cpu.CpuPlatform"}

    import uvloop
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.renderers import renderer_from_config
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.input_processor import InputProcessor

    class NullEngine(EngineClient):
        is_running, is_stopped, errored, dead_error = True, False, False, RuntimeError()

        def __init__(self, config: Any) -> None:
            self.vllm_config, self.model_config = config, config.model_config
            self.renderer = renderer_from_config(config)
            self.input_processor = InputProcessor(config, self.renderer)

        async def generate(self, prompt: Any, params: Any, request_id: str, **__: Any) -> AsyncIterator[RequestOutput]:
            ids, whole = prompt["prompt_token_ids"], []
            is_delta = params.output_kind.name == "DELTA"
            async for _, text, is_last in letters(params.max_tokens):
                whole.append(text)
                if is_delta or is_last:
                    shown = [text] if is_delta else whole
                    out = CompletionOutput(
                        0, "".join(shown), [97] * len(shown), None, None, finish_reason="length" if is_last else None
                    )
                    yield RequestOutput(request_id, None, ids, None, [out], is_last)

        async def get_supported_tasks(self) -> tuple[str, ...]:
            return ("generate",)

        async def is_tracing_enabled(self) -> bool:
            return False

    async def nothing(*_: Any, **__: Any) -> None:
        return None

    for name in EngineClient.__abstractmethods__ - vars(NullEngine).keys():
        setattr(NullEngine, name, nothing)
    NullEngine.__abstractmethods__ = frozenset()

    async def run(args: Any) -> None:
        engine = NullEngine(AsyncEngineArgs.from_cli_args(args).create_engine_config())
        address, sock = setup_server(args, reuse_port=False)
        await (await build_and_serve(engine, address, sock, args))

    flags = ["--model", str(folder), "--served-model-name", "null", "--host", "127.0.0.1", "--port", str(port),
             "--disable-uvicorn-access-log", "--disable-log-stats", "--enforce-eager",
             "--uvicorn-log-level", "warning"]  # fmt: skip
    uvloop.run(run(make_arg_parser(FlexibleArgumentParser()).parse_args(flags)))


def serve_lmdeploy(port: int, folder: Path) -> None:
    os.environ["UVICORN_LOG_LEVEL"] = "warning"

    from lmdeploy.messages import PytorchEngineConfig
    from lmdeploy.serve.core.async_engine import GenOut
    from lmdeploy.serve.managers import SessionManager
    from lmdeploy.serve.openai import api_server
    from lmdeploy.tokenizer import Tokenizer

    class NullEngine:
        arch, model_name, epoch, is_sleeping, engine = "LlamaForCausalLM", "null", 0, False, None
        chat_template = None

        def __init__(self, *, model_path: str, backend_config: Any, **_: Any) -> None:
            self.backend_config = backend_config
            self.session_mgr = SessionManager()
            self.tokenizer = Tokenizer(model_path)

        def start_loop(self, loop: Any, **_: Any) -> None:
            self.session_mgr.attach_event_loop(loop)

        def close(self) -> None:
            pass

        async def preprocess(self, prompt: str, *_: Any, gen_config: Any, **__: Any) -> tuple[list[int], Any]:
            return self.tokenizer.encode(prompt), gen_config

        async def generate(self, request: tuple[list[int], Any], stream_response: bool = True) -> AsyncIterator[GenOut]:
            ids, config = request
            whole = []
            async for number, text, is_last in letters(config.max_new_tokens):
                whole.append(text)
                if stream_response or is_last:
                    shown = [text] if stream_response else whole
                    yield GenOut("".join(shown), len(ids), number, "length" if is_last else None, [97] * len(shown))

    api_server.get_task = lambda *_, **__: ("llm", NullEngine)
    api_server.serve(
        str(folder), "null", "pytorch", PytorchEngineConfig(), server_name="127.0.0.1",
        server_port=port, log_level="ERROR",
    )  # fmt: skip


def main() -> None:
    name, port, folder = sys.argv[1:]
    write_model(Path(folder))
    {"vllm": serve_vllm, "lmdeploy": serve_lmdeploy}[name](int(port), Path(folder))


if __name__ == "__main__":
    main()
