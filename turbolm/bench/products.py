"""The matrix products of a model, each timed alone on the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from turbolm.bench.limits import best_seconds, cold_bytes
from turbolm.models.checkpoint import Checkpoint
from turbolm.models.decoder import load_decoder
from turbolm.models.loader import Loader
from turbolm.models.registry import decoder_spec
from turbolm.ops import PreparedLinear
from turbolm.ops.cpu import instructions, library
from turbolm.ops.cpu.matmul import PackedLinear, pack, workspace_bytes
from turbolm.ops.reference import ReferenceOps
from turbolm.weights import Weight

_MAX_COPIES = 512
_OPERATIONS_PER_CALL = 4e8  # with many rows, copies beyond this only cost time


@dataclass(slots=True)
class Product:
    """x · Wᵀ with one shape of W that the model has `count` times."""

    name: str  # as "q_proj, k_proj, v_proj"
    weights: list[Weight]  # stacked by output rows; of the first place where the model has this shape
    count: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): outputs and inputs."""
        return sum(weight.shape[0] for weight in self.weights), self.weights[0].shape[1]

    @property
    def formats(self) -> str:
        """As "q4_1", or "q5_0 + q8_0" where the stacked matrices differ."""
        return " + ".join(dict.fromkeys(weight.format.name for weight in self.weights))

    @property
    def is_dense(self) -> bool:
        """Multiplied in float32, not in int8."""
        return any(weight.format.is_dense for weight in self.weights)


@dataclass(frozen=True, slots=True)
class Timing:
    """One product with `rows` rows of x."""

    rows: int
    seconds: float
    num_bytes: int  # of the packed weights, read once
    num_operations: float  # multiplications and additions

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def operations_per_second(self) -> float:
        return self.num_operations / self.seconds


def products_of(checkpoint: Checkpoint) -> list[Product]:
    """Every kind of matrix product that a token of this model needs. Reads headers and views, packs nothing."""
    spec = decoder_spec(checkpoint.config)
    listing = _Listing(checkpoint, is_head_tied=spec.head is None)
    load_decoder(spec, listing, max_context=1)
    return list(listing.found.values())


@dataclass(slots=True)
class _Unpacked:
    """Stands where a prepared matrix would."""

    out_features: int
    in_features: int
    num_bytes: int


class _Listing(Loader):
    """A loader that notes the matrices instead of preparing them."""

    def __init__(self, checkpoint: Checkpoint, *, is_head_tied: bool) -> None:
        ops = ReferenceOps(torch.device("cpu"), torch.float32, unpack=False)
        super().__init__(checkpoint.source, ops, packing=checkpoint.packing)
        self.found: dict[tuple[str, str, tuple[int, int]], Product] = {}
        self._is_head_tied = is_head_tied

    def linear(
        self, prefixes: Sequence[str], shape: tuple[int, int], has_bias: bool, rows: Sequence[int] | None = None
    ) -> PreparedLinear:
        del rows  # their order makes no difference here
        if has_bias:
            for prefix in prefixes:
                self.vector(f"{prefix}.bias")
        return self._note(", ".join(prefix.rpartition(".")[2] for prefix in prefixes), prefixes, shape)

    def embedding(self, prefix: str, shape: tuple[int, int]) -> PreparedLinear:
        if self._is_head_tied:
            return self._note("head (tied)", [prefix], shape)
        self._release(prefix)
        return _Unpacked(*shape, 0)

    def _note(self, name: str, prefixes: Sequence[str], shape: tuple[int, int]) -> PreparedLinear:
        product = Product(name, [self._weight(prefix, shape[1]) for prefix in prefixes])
        key = (name, product.formats, product.shape)
        if key in self.found:
            self.found[key].count += 1
        else:
            self.found[key] = product
        self._release(*prefixes)
        return _Unpacked(*product.shape, 0)


def time_product(product: Product, rows: Sequence[int], team: library.Team, seconds: float) -> Iterator[Timing] | None:
    """A timing for each number of rows, each the best of about `seconds` seconds; None where the kernels lack a
    format. The matrix exists in as many copies as exceed the caches, multiplied one after the other in one call,
    as a model's layers are."""
    first = pack(product.weights, None)
    if first is None:
        return None
    wanted = min(_MAX_COPIES, -(-cold_bytes() // first.num_bytes))
    copies = [pack(product.weights, None) for _ in range(wanted - 1)]
    return _timings([first, *(copy for copy in copies if copy is not None)], rows, team, seconds)


def _timings(linears: list[PackedLinear], rows: Sequence[int], team: library.Team, seconds: float) -> Iterator[Timing]:
    n, k = linears[0].out_features, linears[0].in_features
    for count in rows:
        operations = 2.0 * count * n * k
        used = linears if count == 1 else linears[: max(1, int(_OPERATIONS_PER_CALL / operations))]
        best = best_seconds(_Calls(used, count, team), seconds) / len(used)
        yield Timing(count, best, linears[0].num_bytes, operations)


class _Calls:
    """One native call that multiplies x with each matrix in turn."""

    def __init__(self, linears: Sequence[PackedLinear], rows: int, team: library.Team) -> None:
        n, k = linears[0].out_features, linears[0].in_features
        x, y = torch.randn(rows, k), torch.empty(rows, n)
        workspace = torch.empty(workspace_bytes(k, rows, team.num_threads) + 64, dtype=torch.uint8)
        self._keep = (x, y, workspace, linears)
        self._operations = [
            instructions.Linear(
                code=instructions.Linear.opcode,
                barrier=1,
                linear=linear.address,
                x=x.data_ptr(),
                y=y.data_ptr(),
                workspace=-(-workspace.data_ptr() // 64) * 64,
            )
            for linear in linears
        ]
        self._addresses = (ctypes.c_void_p * len(linears))(*map(ctypes.addressof, self._operations))
        self._step = instructions.Step(num_tokens=rows)
        self._team = team
        self._run = library.library().turbolm_run

    def __call__(self) -> None:
        self._run(self._team.handle, self._addresses, len(self._operations), ctypes.byref(self._step))
