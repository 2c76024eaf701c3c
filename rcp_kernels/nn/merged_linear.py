"""Several packed layers of the same input as one: their rows in one weight, so that a token is quantized once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..formats import PackedWeight, merge_rows
from ..ops.lut_linear_fused import lut_linear_fused, prologue_reference
from ..ops.walsh_transform import transform_tables
from .quant_linear import QuantLinear, autocast_input

__all__ = ["MergedPart", "Norm", "apply_linear", "apply_merged", "merge_linears", "split_linears"]

_Part = TypeVar("_Part", bound="MergedPart")


class Norm(NamedTuple):
    """An RMS norm as :func:`rcp_kernels.ops.lut_linear_fused` takes it."""

    weight: Tensor
    eps: float
    offset: float


class MergedPart(QuantLinear):
    """A layer whose weight is some rows of a larger one, which it shares with its neighbours.

    :func:`merge_linears` makes one of a :class:`QuantLinear`, in place. It is still that layer to everyone who looks:
    ``state_dict``, ``packed_weight`` and the attributes give what they gave before, and calling it computes its own
    outputs, at the price of the whole product. It does not take a state_dict.

    Attributes:
        whole: the layer with the rows of all parts, without bias; no submodule.
        rows: which of its rows are this layer's.
    """

    whole: QuantLinear
    rows: slice
    _first: bool
    _tensor_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if self.bias is None:
            return self.whole(x)[..., self.rows]
        bias = functional.pad(self.bias, (self.rows.start, self.whole.out_features - self.rows.stop))
        return apply_linear(self.whole, autocast_input(x), bias)[..., self.rows]

    def packed_weight(self) -> PackedWeight:
        """This layer's rows in the canonical format, with the scales that they had before they were merged."""
        merged = self.whole.packed_weight()
        # A power of two: what merge_rows did is undone exactly.
        factor = float(merged.tensor_scale) / self._tensor_scale
        scales = (merged.scales[self.rows].to(torch.float64) * factor).to(torch.float16)
        return replace(
            merged,
            codes=merged.codes[self.rows].contiguous(),
            levels=merged.levels[self.rows].contiguous(),
            scales=scales.contiguous(),
            tensor_scale=torch.full_like(merged.tensor_scale, self._tensor_scale),
            out_features=self.out_features,
        )

    def dequantize(self) -> Tensor:
        """The weight as float32 [out_features, in_features], its columns in the order of x."""
        return self.whole.dequantize()[self.rows]

    def _apply(self: _Part, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Part:
        if self._first:
            self.whole._apply(fn, recurse)
        return nn.Module._apply(self, fn, recurse)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error_msgs.append(
            f"{prefix.rstrip('.') or type(self).__name__}: a layer that is merged with others must not be loaded into, "
            f"got a MergedPart; call rcp_kernels.nn.unfuse_decoder(model) before load_state_dict"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # the weight is in `whole`, which has a format of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


def merge_linears(layers: Sequence[QuantLinear]) -> bool:
    """Store the weights of layers with the same input as one, if one weight gives the same bits.

    Each layer becomes a :class:`MergedPart`, in place.

    Args:
        layers: two or more, of the same in_features.

    Returns:
        Whether they were merged. They are left as they are where bits, group_size, kind, the treatment of the input
        or the presence of a bias differ, or no common tensor_scale exists (:func:`rcp_kernels.formats.merge_rows`).
    """
    first = layers[0]
    if any(_treatment(layer) != _treatment(first) for layer in layers):
        return False
    orders = [layer.input_order for layer in layers]
    if any((order is None) != (orders[0] is None) for order in orders):
        return False
    if first.input_order is not None and not all(torch.equal(first.input_order, order) for order in orders):  # type: ignore[arg-type]
        return False
    weights = [layer.packed_weight() for layer in layers]
    merged = merge_rows(weights)
    if merged is None:
        return False
    whole = QuantLinear.from_packed(
        merged, None, first.act_bits, first.act_clip, first.input_rotation, first.input_order
    ).train(first.training)
    start = 0
    for layer, weight in zip(layers, weights, strict=True):
        layer.__class__ = MergedPart
        stop = start + layer.out_features
        # Straight into __dict__: a registered submodule would be a packed layer that the model's class does not know.
        layer.__dict__.update(
            whole=whole, rows=slice(start, stop), _first=start == 0, _tensor_scale=float(weight.tensor_scale)
        )
        layer.packed = layer.packed.new_empty(0)
        start = stop
    return True


def split_linears(layers: Sequence[nn.Module]) -> None:
    """Undo :func:`merge_linears`; layers that are not merged are left as they are."""
    weights = [layer.packed_weight() if isinstance(layer, MergedPart) else None for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        if isinstance(layer, MergedPart) and weight is not None:
            layer.__class__ = QuantLinear  # type: ignore[assignment]
            for name in ("whole", "rows", "_first", "_tensor_scale"):
                del layer.__dict__[name]
            layer._hold(weight, layer.input_order)


def _treatment(layer: QuantLinear) -> tuple[Any, ...]:
    """All but the rows that two layers must have in common."""
    rotation = layer.input_rotation
    signs = None if rotation is None or rotation.signs is None else rotation.signs.tolist()
    return (
        layer.in_features, layer.bits, layer.group_size, layer.kind, layer.act_bits, layer.act_clip,
        layer.bias is None, None if layer.bias is None else layer.bias.dtype, layer.packed.device,
        None if rotation is None else rotation.state().tolist(), signs,
    )  # fmt: skip


def apply_linear(
    layer: QuantLinear,
    x: Tensor,
    bias: Tensor | None,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + layer(prologue(x))`` in one operator, with another bias than the layer's.

    Args:
        layer: its weight, its treatment of the input, and its rotation.
        x: float32, float16 or bfloat16 [..., in_features], or twice as many with an activation.
        bias: [out_features] or None.
        norm, activation, residual: as :func:`rcp_kernels.ops.lut_linear_fused`.

    Returns:
        x.dtype [..., out_features].
    """
    weight, eps, offset = (None, 0.0, 0.0) if norm is None else norm
    base = permutation = None
    rotation_group = 0
    rotation: Any = layer._modules.get("input_rotation")
    if rotation is not None:
        if rotation.heads is None and rotation.signs is None:
            rotation_group = rotation.group_size
            base, permutation = transform_tables("apply_linear", x, rotation_group, rotation.order)
        else:
            x = rotation(prologue_reference(x, weight, eps, offset, activation))
            weight = activation = None
    buffers = layer._buffers
    return lut_linear_fused(
        x, buffers["packed"], bias, layer.out_features, layer.in_features, layer.bits, layer.group_size,  # type: ignore[arg-type]
        layer.act_bits, layer.act_clip, base, permutation, rotation_group, buffers["input_order"],
        weight, eps, offset, activation, residual,
    )  # fmt: skip


def apply_merged(layers: Sequence[QuantLinear], x: Tensor, norm: Norm | None = None) -> Tensor:
    """The outputs of layers with the same input side by side: one product if they are merged, else one each.

    Args:
        layers: those that :func:`merge_linears` was called with.
        x: float32, float16 or bfloat16 [..., in_features].
        norm: before the layers, or None.

    Returns:
        x.dtype [..., sum of out_features].
    """
    first = layers[0]
    if not isinstance(first, MergedPart):
        return torch.cat([apply_linear(layer, x, layer.bias, norm) for layer in layers], -1)
    bias = None
    if first._parameters["bias"] is not None:
        bias = torch.cat([layer._parameters["bias"] for layer in layers])  # type: ignore[misc]
    return apply_linear(first.whole, x, bias, norm)
