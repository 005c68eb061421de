"""`Ops` on native CPU kernels: float32 activations, packed weights, a paged KV cache.

Each op is an instruction (instructions.py). It runs at once, or, while a recorder is active, becomes
part of a plan (plan.py): the same instruction, so the same results bit by bit.

The kernels keep k of each KV block by dimension in groups of 16 tokens, and scales in an order of their own
(csrc/ops.h, KvPool), inside the memory that `LayerCache` describes: nothing but `rotary_store` and `attention`
may look into it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from turbolm.fallbacks import note_fallback
from turbolm.ops import Activation, AdapterWeights, AttentionSpec, LayerCache, PreparedLinear, RopeTable
from turbolm.ops.cpu import instructions, library
from turbolm.ops.cpu.matmul import PackedLinear, pack, workspace_bytes
from turbolm.ops.cpu.plan import ALIGNMENT, Buffer, NotRecordableError, Operand, PlanRecorder, Recorded, encode, step_of
from turbolm.ops.reference import ReferenceOps

if TYPE_CHECKING:
    from turbolm.types import Batch
    from turbolm.weights import Weight

log = logging.getLogger(__name__)


class CpuOps:
    """Raises EngineError where the native library is missing (library.failure() says why)."""

    name = "native"
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, *, threads: int, unpack: bool = False) -> None:
        """`threads`: that compute a step, the caller's among them. `unpack`: weights are unpacked to
        float32 at load."""
        self.team = library.Team(threads)
        self.unpack = unpack
        self._dll = library.library()
        self._reference = ReferenceOps(self.device, self.dtype, unpack=unpack)
        self._recorder: PlanRecorder | None = None
        self._eager_workspace = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def recording(self, recorder: PlanRecorder) -> Iterator[None]:
        """Until the end of the block, ops append to `recorder` and return buffers."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def supports(self, cache: LayerCache) -> bool:
        """Whether the kernels read and write this KV cache; else its ops run on plain PyTorch."""
        kinds = {cache.kind_k, cache.kind_v}
        if kinds <= instructions.CACHE_TYPES.keys() and cache.block_size in (8, 16, 32, 64, 128):
            return True
        note_fallback(
            log, f"no native kernels for {_described(cache)}: attention runs on plain PyTorch, several times slower"
        )
        return False

    # --- weights ---

    def prepare_linear(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        packed = pack(weights, bias, unpack=self.unpack)
        if packed is not None:
            return packed
        names = ", ".join(sorted({weight.format.name for weight in weights}))
        note_fallback(
            log, f"no native kernels for {names} weights: their products run on plain PyTorch, several times slower"
        )
        return self._reference.prepare_linear(weights, bias)

    def prepare_embedding(self, weight: Weight) -> PreparedLinear:
        return self.prepare_linear([weight], None)

    # --- ops ---

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        if not isinstance(weight, PackedLinear):
            return self._reference.linear(self._eager(x_tk, "a matrix product in a format"), weight)
        y = self._new(x_tk.shape[0], weight.out_features)
        self._multiply(x_tk, weight, y)
        return y

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        num_parts, rank = len(adapters.ends), adapters.max_rank
        step = instructions.Step(num_tokens=x_tk.shape[0], adapters=places_t.data_ptr())
        shrunk = self._new(x_tk.shape[0], num_parts * rank)
        self._emit(
            instructions.AdapterShrink,
            step,
            x=x_tk,
            a=adapters.a,
            ranks=adapters.ranks,
            y=shrunk,
            width=x_tk.shape[1],
            max_rank=rank,
            num_parts=num_parts,
        )
        ends = (ctypes.c_int32 * instructions.AdapterParts.MAX)(*adapters.ends)
        self._emit(
            instructions.AdapterExpand,
            step,
            x=shrunk,
            b=adapters.b,
            ranks=adapters.ranks,
            y=y_tn,
            width=y_tn.shape[1],
            max_rank=rank,
            parts=instructions.AdapterParts(num_parts, ends),
        )
        return y_tn

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        if not isinstance(table, PackedLinear):
            return self._reference.embedding(self._eager(token_ids_t, "an embedding in a format"), table, scale)
        assert token_ids_t.dtype == torch.int32 and token_ids_t.is_contiguous()
        y = self._new(token_ids_t.shape[0], table.in_features)
        step = instructions.Step(num_tokens=token_ids_t.shape[0], token_ids=token_ids_t.data_ptr())
        self._emit(instructions.Embedding, step, table=table, y=y, scale=scale)
        return y

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        return self._norm(x_th, None, weight_h, eps)

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._norm(x_th, residual_th, weight_h, eps), residual_th

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        self._emit(instructions.Add, _rows(x_th), x=x_th, residual=residual_th, width=x_th.shape[1])
        return residual_th

    def rotary_store(
        self,
        qkv_tw: Tensor,
        batch: Batch,
        cache: LayerCache,
        spec: AttentionSpec,
        rope: RopeTable | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        if not self.supports(cache):
            self._eager(qkv_tw, _described(cache))
            return self._reference.rotary_store(qkv_tw, batch, cache, spec, rope, q_norm, k_norm, eps)
        self._emit(
            instructions.RotaryStore,
            step_of(batch),
            cache=cache,
            qkv=qkv_tw,
            cos=0 if rope is None else rope.cos,
            sin=0 if rope is None else rope.sin,
            q_norm=0 if q_norm is None else q_norm,
            k_norm=0 if k_norm is None else k_norm,
            pool=_pool(cache),
            shape=_heads(spec),
            rotary_dim=0 if rope is None else rope.rotary_dim,
            is_interleaved=rope is not None and rope.interleaved,
            eps=eps,
        )
        return qkv_tw

    def attention(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        if not self.supports(cache):
            return self._reference.attention(self._eager(qkv_tw, _described(cache)), batch, cache, spec)
        y = self._new(qkv_tw.shape[0], spec.num_heads * spec.v_head_dim)
        shape = _heads(spec)
        max_context = batch.max_context
        num_bytes = self._dll.turbolm_attention_workspace(ctypes.byref(shape), max_context, self.team.num_threads)
        self._emit(
            instructions.Attention,
            step_of(batch),
            cache=cache,
            rotary=0,
            qkv=qkv_tw,
            y=y,
            workspace=self._workspace(num_bytes),
            max_context=max_context,
            pool=_pool(cache),
            shape=shape,
            window=spec.window or 0,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
        )
        return y

    def activate_multiply(self, gate_up_t2f: Tensor, activation: Activation) -> Tensor:
        width = gate_up_t2f.shape[1] // 2
        y = self._new(gate_up_t2f.shape[0], width)
        kind = instructions.ACTIVATIONS[activation]
        self._emit(
            instructions.ActivateMultiply, _rows(gate_up_t2f), gate_up=gate_up_t2f, y=y, width=width, activation=kind
        )
        return y

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        if not isinstance(weight, PackedLinear):
            return self._reference.logits(self._eager(x_th, "a head in a format"), batch, weight, softcap)
        num_rows, width = batch.logit_rows.shape[0], x_th.shape[1]
        logits = self._new(num_rows, weight.out_features)
        step = step_of(batch, None if self._recorder else logits)
        rows = x_th
        if self._recorder is not None or x_th.shape[0] != num_rows:
            rows = self._new(num_rows, width)
            self._emit(instructions.Gather, step, x=x_th, y=rows, width=width)
        self._multiply(rows, weight, None, step)
        if softcap is not None:
            self._emit(instructions.Softcap, step, writes_logits=True, width=weight.out_features, cap=softcap)
        return logits

    # --- instructions ---

    def _norm(self, x_th: Tensor, residual_th: Tensor | None, weight_h: Tensor, eps: float) -> Tensor:
        y = self._new(x_th.shape[0], x_th.shape[1])
        residual = 0 if residual_th is None else residual_th
        width = x_th.shape[1]
        self._emit(
            instructions.RmsNorm, _rows(x_th), x=x_th, residual=residual, weight=weight_h, y=y, width=width, eps=eps
        )
        return y

    def _multiply(
        self, x_tk: Tensor, weight: PackedLinear, y: Tensor | None, step: instructions.Step | None = None
    ) -> None:
        """x @ weight.T + bias into y, or, where y is None, into the step's logits."""
        assert x_tk.shape[1] == weight.in_features
        num_bytes = workspace_bytes(weight.in_features, x_tk.shape[0], self.team.num_threads)
        self._emit(
            instructions.Linear,
            step or _rows(x_tk),
            writes_logits=y is None,
            linear=weight,
            x=x_tk,
            y=0 if y is None else y,
            workspace=self._workspace(num_bytes),
        )

    def _new(self, num_rows: int, width: int) -> Tensor:
        """A float32 tensor [num_rows, width], or the buffer that stands for it in a plan."""
        if self._recorder is None:
            return torch.empty(num_rows, width)
        return cast(Tensor, self._recorder.buffer(num_rows, width))

    def _workspace(self, num_bytes: int) -> Operand:
        if self._recorder is not None:
            return self._recorder.workspace(num_bytes)
        if self._eager_workspace.numel() < num_bytes + ALIGNMENT:
            self._eager_workspace = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
        return -(-self._eager_workspace.data_ptr() // ALIGNMENT) * ALIGNMENT

    def _emit(
        self,
        kind: type[instructions.Instruction],
        step: instructions.Step,
        *,
        writes_logits: bool = False,
        cache: LayerCache | None = None,
        **operands: Operand,
    ) -> None:
        """Run the instruction, or record it."""
        for operand in operands.values():
            if isinstance(operand, Tensor):
                kinds = (torch.float32, torch.int32)
                assert operand.dtype in kinds and operand.is_contiguous(), "activations are float32 rows"
        if self._recorder is not None:
            self._recorder.recorded.append(Recorded(kind, operands, writes_logits, cache))
            return
        instruction = encode(kind, operands)
        addresses = (ctypes.c_void_p * 1)(ctypes.addressof(instruction))
        self._dll.turbolm_run(self.team.handle, addresses, 1, ctypes.byref(step))

    def _eager(self, x: Tensor, what: str) -> Tensor:
        """x, for an op of the reference."""
        if isinstance(x, Buffer) or self._recorder is not None:
            raise NotRecordableError(f"{what} without native kernels")
        return x


def _rows(x: Tensor) -> instructions.Step:
    """A step of as many tokens as x has rows."""
    return instructions.Step(num_tokens=x.shape[0])


def _pool(cache: LayerCache) -> instructions.KvPool:
    tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales, cache.k_range, cache.v_range)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    kinds = (instructions.CACHE_TYPES[kind] for kind in (cache.kind_k, cache.kind_v))
    return instructions.KvPool(*addresses, *kinds, cache.block_size)


def _described(cache: LayerCache) -> str:
    kinds = cache.kind_k if cache.kind_k == cache.kind_v else f"{cache.kind_k} keys and {cache.kind_v} values"
    return f"a KV cache of {kinds} in blocks of {cache.block_size}"


def _heads(spec: AttentionSpec) -> instructions.HeadShape:
    assert spec.num_heads % spec.num_kv_heads == 0, "query heads share kv heads evenly"
    return instructions.HeadShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim)
