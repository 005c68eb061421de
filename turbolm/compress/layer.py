"""One decoder layer's tensors, in float32, as compression changes them.

n, k  out and in features of a matrix      j  channels of an input before heads share them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from turbolm.errors import CheckpointError
from turbolm.models.decoder import DecoderLayer
from turbolm.models.spec import LayerSpec
from turbolm.ops import PreparedLinear
from turbolm.quant import load_weight
from turbolm.weights import Packing, TensorInfo, WeightSource


@dataclass(frozen=True, slots=True)
class Producer:
    """What makes an input, so that its channels can be scaled: a norm, or rows of a matrix."""

    module: str
    rows: Tensor | None = None  # int64 [j] rows of the matrix `module`; None: it is a norm
    repeats: tuple[int, int, int] = (1, 1, 1)
    """Channels as (key-value heads, query heads for each, head size): query heads share a value head's rows."""

    def reduce(self, values_k: Tensor) -> Tensor:
        """The mean over the channels that a row feeds → [j]."""
        return values_k if self.rows is None else values_k.view(self.repeats).mean(1).flatten()

    def expand(self, values_j: Tensor) -> Tensor:
        """Each row's value at all its channels → [k]."""
        if self.rows is None:
            return values_j
        heads, group, size = self.repeats
        return values_j.view(heads, 1, size).expand(heads, group, size).flatten()


@dataclass(frozen=True, slots=True)
class Point:
    """Matrices that share an input."""

    name: str
    modules: tuple[str, ...]
    producer: Producer
    prepared: Callable[[DecoderLayer], PreparedLinear]  # the stacked matrices in the built layer


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """A layer's matrices by module name, and its norms and biases by tensor name. Changed in place."""

    spec: LayerSpec
    points: tuple[Point, ...]
    matrices: dict[str, Tensor]  # [n, k] float32
    vectors: dict[str, Tensor]  # float32

    @classmethod
    def read(
        cls, spec: LayerSpec, source: WeightSource, device: torch.device, packing: Packing | None = None
    ) -> LayerTensors:
        """Raises CheckpointError naming a tensor that is missing, or holds numbers that are not finite."""
        points = points_of(spec)
        matrices, vectors = {}, {}
        for module in (module for point in points for module in point.modules):
            matrices[module] = load_weight(source, module, packing).dequantize(torch.float32).to(device, copy=True)
            _check_finite(matrices[module], f"{module}.weight")
        for name in _vector_names(spec):
            if name not in source.tensors:
                raise CheckpointError(f"the checkpoint lacks the tensor '{name}'")
            vectors[name] = source.read(name).to(device, torch.float32, copy=True)
            _check_finite(vectors[name], name)
        for name in source.tensors:
            if name in vectors or name.rpartition(".")[0] in matrices:
                source.release(name)
        return cls(spec, points, matrices, vectors)

    def fold(self, point: Point, scales_j: Tensor, dtype: torch.dtype) -> Tensor:
        """Divide the point's input by `scales_j` where it is made, and multiply its matrices' columns: the
        layer computes the same. Norms are rounded to `dtype`, in which they are stored, and the matrices take
        what that rounding changes. → the scales that came to be, [k]."""
        producer = point.producer
        if producer.rows is None:
            norm = self.vectors[f"{producer.module}.weight"]
            rounded = (norm / scales_j).to(dtype).float()
            scales_j = torch.where(rounded == 0, 1.0, norm / rounded)
            norm.copy_(torch.where(rounded == 0, norm, rounded))
        else:
            self.matrices[producer.module][producer.rows] /= scales_j[:, None]
            bias = self.vectors.get(f"{producer.module}.bias")
            if bias is not None:
                bias[producer.rows] /= scales_j
        scales_k = producer.expand(scales_j)
        for module in point.modules:
            self.matrices[module] *= scales_k
        return scales_k


class OverlaySource:
    """A `WeightSource` whose matrices and vectors are `tensors` where these have the name."""

    def __init__(self, base: WeightSource, tensors: Mapping[str, Tensor]) -> None:
        self._base = base
        self._own = tensors
        self.tensors: Mapping[str, TensorInfo] = {**base.tensors, **{n: _info(n, t) for n, t in tensors.items()}}

    def read(self, name: str) -> Tensor:
        return self._own[name] if name in self._own else self._base.read(name)

    def release(self, name: str) -> None:
        """Nothing to do: `base`'s tensors are read again for the next layer's rotation, if at all."""


def points_of(spec: LayerSpec) -> tuple[Point, ...]:
    """The four inputs of a layer that linear layers multiply."""
    names, attention, mlp = spec.attention_names, spec.attention, spec.mlp
    v_width = attention.num_kv_heads * attention.v_head_dim
    if names.qkv_rows is None:
        v_rows = torch.arange(v_width)
    else:
        v_rows = torch.tensor(names.qkv_rows[-v_width:])
    heads = (attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.v_head_dim)
    mlp_rows = Producer(mlp.up, torch.arange(mlp.width), (mlp.width, 1, 1))
    return (
        Point("qkv", names.qkv, Producer(spec.attention_norm), lambda layer: layer.attention.qkv.weight),
        Point(
            "output",
            (names.output,),
            Producer(names.qkv[-1], v_rows, heads),
            lambda layer: layer.attention.output.weight,
        ),
        Point("gate_up", (mlp.gate, mlp.up), Producer(spec.mlp_norm), lambda layer: layer.mlp.gate_up.weight),
        Point("down", (mlp.down,), mlp_rows, lambda layer: layer.mlp.down.weight),
    )


def _vector_names(spec: LayerSpec) -> list[str]:
    names, mlp = spec.attention_names, spec.mlp
    norms = [spec.attention_norm, spec.mlp_norm, names.q_norm, names.k_norm]
    modules = [
        *(names.qkv if names.has_qkv_bias else ()),
        *((names.output,) if names.has_output_bias else ()),
        *((mlp.gate, mlp.up, mlp.down) if mlp.has_bias else ()),
    ]
    return [f"{norm}.weight" for norm in norms if norm is not None] + [f"{module}.bias" for module in modules]


def _check_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is broken, download it again")


def _info(name: str, tensor: Tensor) -> TensorInfo:
    return TensorInfo(name, tuple(tensor.shape), "F32", tensor.numel() * 4)
