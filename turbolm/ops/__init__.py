"""The ops that a model is made of: one class per backend, one method per op.

    t  tokens of a step        h  hidden size             n, k  out and in features of a matrix
    w  width of a qkv row = (num_heads + num_kv_heads) * head_dim + num_kv_heads * v_head_dim

`Ops` is the contract; `reference.py` is it in plain torch (the oracle, and the portable CPU
backend). A model's layers ask their backend to `prepare` weights once and then call nothing but
these ops on activations, never a tensor method: so a backend may hand around its own handles
instead of tensors (the CPU's recorded plan does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from turbolm.kv import KINDS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from turbolm.kv import KvKind
    from turbolm.ops.adjustments import Adjustments
    from turbolm.types import Batch
    from turbolm.weights import Weight

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. Shapes in elements."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # of q and k
    v_head_dim: int
    scale: float  # multiplies q·k
    window: int | None = None  # a token sees itself and the window-1 tokens before it
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        return self.q_width + self.num_kv_heads * (self.head_dim + self.v_head_dim)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Rotation angles by position. `interleaved`: pairs (0,1),(2,3)… instead of (i, i + r/2)."""

    cos: Tensor  # [max_context, r/2] float32
    sin: Tensor  # [max_context, r/2] float32
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        """r: the leading dimensions of a head that are rotated."""
        return 2 * int(self.cos.shape[1])


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part of the KV pool, [num_blocks, num_kv_heads, block_size, ·] each. What a block's memory
    means is the backend's business (the native one keeps keys by dimension): blocks are copied whole or not
    at all. In its plain meaning, that of the reference:

    int8, int4: value = code * scale + minimum, where of a head's dims, scale = float16((max - min) / 255 or 15),
    minimum = float16(min), code = round((x - minimum) / scale), half to even, in 0 … 255 or 15; 0 if scale is 0.
    int4: a byte's low nibble is dimension d, its high nibble dimension d + dim / 2. fp8: saturated to ±448.
    With `k_range`, `v_range` scale and minimum are a head's for all tokens, found by calibration, instead.
    """

    k: Tensor  # head_dim floats, or uint8 codes (int4: head_dim / 2 bytes), or float8_e4m3fn
    v: Tensor  # the same of v_head_dim
    k_scales: Tensor | None = None  # float16 (scale, minimum) of int8 and int4: the last dimension is 2
    v_scales: Tensor | None = None
    kind_k: KvKind = ""  # type: ignore[assignment]  # if not given, as the dtype says
    kind_v: KvKind = ""  # type: ignore[assignment]
    k_range: Tensor | None = None  # float16 [num_kv_heads, 2]: scale, minimum; int8 and int4 alone
    v_range: Tensor | None = None

    def __post_init__(self) -> None:
        for name, pool in (("kind_k", self.k), ("kind_v", self.v)):
            if not getattr(self, name):
                object.__setattr__(self, name, str(pool.dtype).removeprefix("torch."))
            assert getattr(self, name) in KINDS, "codes need a kind"

    @property
    def block_size(self) -> int:
        return int(self.k.shape[2])


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Of one matrix [n, k] the low-rank additions of as many adapters as there are places. Its rows may be p matrices
    one after the other (q, k and v, say), each with an addition of its own, of rank r at most:
    adapter i adds b_i[:, part].T @ (a_i[part] @ x) to the rows of each part."""

    a: Tensor  # [places, p * r, k], in the dtype of activations
    b: Tensor  # [places, r, n], scaled
    ranks: Tensor  # int32 [places]: rows of each part of `a` that aren't padding; 0: nothing is added
    ends: tuple[int, ...]  # the row of the matrix at which each part ends

    @property
    def max_rank(self) -> int:
        """r."""
        return int(self.b.shape[1])


class PreparedLinear(Protocol):
    """A weight matrix in the layout of the backend that made it."""

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Ops(Protocol):
    """A backend. Activations are [t, ·] row-major in the backend's dtype. No op changes its inputs
    except where it says so; `out of place` results may be reused buffers, valid until the next step."""

    name: str
    device: torch.device
    dtype: torch.dtype  # of activations

    def prepare_linear(self, weights: list[Weight], bias: Tensor | None) -> PreparedLinear:
        """Lay out matrices (stacked by output rows, possibly of different formats) for `linear`.
        May keep, convert or release the given tensors. bias: [n] or None."""

    def linear(self, x_tk: Tensor, weight: PreparedLinear) -> Tensor:
        """x @ weight.T + bias → [t, n]."""

    def add_adapters(self, y_tn: Tensor, x_tk: Tensor, adapters: AdapterWeights, places_t: Tensor) -> Tensor:
        """To each row of y, which is what `linear` made of x, what its adapter adds → [t, n]; may change y.
        places_t: int32, the place of each row's adapter; -1: none."""

    def prepare_embedding(self, weight: Weight) -> PreparedLinear:
        """Lay out a [vocabulary, h] table for `embedding` (and, tied, for `logits`)."""

    def embedding(self, token_ids_t: Tensor, table: PreparedLinear, scale: float = 1.0) -> Tensor:
        """Rows of the table, times `scale` → [t, h]."""

    def rms_norm(self, x_th: Tensor, weight_h: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight, computed in float32 → [t, h]."""

    def add_rms_norm(self, x_th: Tensor, residual_th: Tensor, weight_h: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """residual += x (in place); → (rms_norm(residual), residual)."""

    def add(self, x_th: Tensor, residual_th: Tensor) -> Tensor:
        """residual += x (in place); → residual."""

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
        """The step between the qkv projection and attention, in place on qkv [t, w] laid out as all
        q heads, all k heads, all v heads: per-head RMSNorm of q and k (weights [head_dim], if
        given), then rotation by position, then k and v into `cache` at `batch.slots`. → qkv."""

    def attention(self, qkv_tw: Tensor, batch: Batch, cache: LayerCache, spec: AttentionSpec) -> Tensor:
        """Causal attention of the q part of qkv over each sequence's cached context (which includes
        this step's tokens) → [t, num_heads * v_head_dim]."""

    def activate_multiply(self, gate_up_t2f: Tensor, activation: Activation) -> Tensor:
        """activation(first half) * second half → [t, f]."""

    def logits(self, x_th: Tensor, batch: Batch, weight: PreparedLinear, softcap: float | None = None) -> Tensor:
        """The rows `batch.logit_rows` of x (which may be these rows alone) through the head → float32
        [r, vocabulary]."""


@runtime_checkable
class DeviceOps(Ops, Protocol):
    """A backend whose ops return before they are computed, and that samples where it computes."""

    def finish_loading(self, num_rows: int, num_logits: int) -> None:
        """All weights are prepared: release what that took, and allocate for the largest step's logits
        (so that graphs may hold on to the memory)."""

    def sample(
        self,
        logits_rv: Tensor,
        temperature_r: Tensor,
        top_k_r: Tensor,
        top_p_r: Tensor,
        min_p_r: Tensor,
        uniform_r: Tensor,
        has_filters: bool,
    ) -> Tensor:
        """int32 [r] token ids, as `ops.sampling.sample` chooses them. `has_filters`: some row has top-k, top-p
        or min-p."""

    def adjust(self, logits_rv: Tensor, counts_sv: Tensor, adjustments: Adjustments, previous_r: Tensor) -> None:
        """See `ops.adjustments.adjust`."""

    def resolve_tokens(self, token_ids_t: Tensor, previous_r: Tensor) -> None:
        """Replace, in place, each id below 0 by the entry -1 - id of what an earlier step sampled (by 0
        where that is below 0)."""
