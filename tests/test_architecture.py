"""The house rules that a machine can check: who may import whom, and where torch.cuda may appear."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "turbolm"
LEVELS = (
    {"errors", "env", "types", "config", "weights", "fields", "kv", "lora", "kv_scales", "memory",
     "progress", "drafts", "embedding", "form", "fallbacks"},
    {"text", "ops", "hub", "parallel", "events"},
    {"quant", "cache", "grammar"},
    {"layers", "prompt"},
    {"models"},
    {"engine", "compress"},
    {"loading", "stream", "delivery", "worker", "llm", "adapters", "answer", "remote"},
    {"lmdeploy", "server", "ui", "bench", "eval", "cluster"},
    {"ladder", "planner"},
    {"cli"},
    {"__init__", "__main__"},
)  # fmt: skip
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PEERS = (  # may import each other
    {"loading", "stream", "delivery", "worker", "llm", "adapters"},
    {"errors", "env", "types", "config", "weights", "kv", "kv_scales", "lora", "memory", "drafts", "embedding", "form"},
)
CUDA_ALLOWED = ("ops/", "parallel/", "engine/graph.py", "engine/device_runner.py", "engine/step_device.py")
# Optional packages, and those that take long to load and are not always needed, are imported where they are used.
OPTIONAL = {
    "modelscope", "huggingface_hub", "matplotlib", "datasets", "sacrebleu", "rouge_score", "lm_eval", "llguidance",
    "opentelemetry",
}  # fmt: skip
LATE = {
    "cli/chat.py": {"turbolm.llm", "turbolm.remote", "turbolm.cli.terminal"},
    "cli/quantize.py": {"turbolm.compress.job", "turbolm.compress.kv"},
    "cli/convert.py": {"turbolm.compress.conversion"},
    "cli/eval.py": {"turbolm.bench.record", "turbolm.eval.harness", "turbolm.eval.run"},
    "cli/ladder.py": {"turbolm.ladder.run"},
    "cli/plan.py": {"turbolm.planner.run"},
    "cli/serve.py": {"turbolm.server.run"},
    "cli/ui.py": {"turbolm.llm", "turbolm.ui.app", "turbolm.ui.chat"},
    "llm.py": {"turbolm.loading"},
    "ops/select.py": {
        f"turbolm.ops.cuda.{name}" for name in ("deterministic", "ops", "sharded", "sharded_deterministic", "stored")
    },
    "parallel/peers.py": {"torch.distributed"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """`turbolm.engine.runner` → `engine`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module or ""


def in_functions(tree: ast.AST) -> set[ast.stmt]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {node for function in functions for node, _ in imports(function)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    tree = ast.parse(path.read_text())
    for node, module in imports(tree):
        if module.split(".")[0] != "turbolm":
            continue
        names = [alias.name for alias in node.names] if module == "turbolm" else [room_of(module)]
        for target in names:
            same = target in (room, "__version__") or any({target, room} <= peers for peers in PEERS)
            assert same or LEVEL_OF[target] < LEVEL_OF[room], f"{path.name} imports {target}: not below {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_function_level_imports_are_for_optional_packages(path: Path) -> None:
    tree = ast.parse(path.read_text())
    nested = in_functions(tree)
    for node, module in imports(tree):
        if node in nested:
            late = LATE.get(path.relative_to(PACKAGE).as_posix(), set())
            assert module.split(".")[0] in OPTIONAL or module in late, f"line {node.lineno} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_cuda_only_where_devices_are_known(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if not name.startswith(CUDA_ALLOWED):
        assert "torch.cuda" not in path.read_text()


def test_no_import_cycles() -> None:
    names = {module_name(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse(path.read_text())
        checking = {n for node in ast.walk(tree) if _is_type_checking(node) for n, _ in imports(node)}
        targets = graph[module_name(path)] = set()
        for node, module in imports(tree):
            if node not in checking:
                submodules = {f"{module}.{alias.name}" for alias in node.names} & names
                targets |= submodules or {module}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, f"import cycle: {' → '.join((*trail, name))}"
        if name in graph and name not in state:
            state[name] = 1
            for target in graph[name]:
                visit(target, (*trail, name))
            state[name] = 2

    for name in graph:
        visit(name, ())


def module_name(path: Path) -> str:
    parts = ("turbolm", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
