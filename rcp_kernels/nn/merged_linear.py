"""Several packed layers with the same input as one weight: each token is then quantized once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..formats import PackedWeight, merge_rows
from ..ops.lut_linear import NO_ROTATION
from ..ops.lut_linear_fused import lut_linear_fused, prologue_reference
from .quant_linear import QuantLinear, autocast_input

__all__ = ["MergedPart", "Norm", "apply_linear", "apply_merged", "merge_linears", "split_linears"]

_Part = TypeVar("_Part", bound="MergedPart")


class Norm(NamedTuple):
    """An RMS norm as :func:`rcp_kernels.ops.lut_linear_fused` takes it."""

    weight: Tensor
    eps: float
    offset: float


class MergedPart(QuantLinear):
    """A layer whose weight is a range of rows of a larger weight, which several layers share.

    :func:`merge_linears` makes it from a :class:`QuantLinear`, in place. ``state_dict``, ``packed_weight`` and the
    attributes do not change. A call computes the outputs of this layer, at the cost of the product with all rows. A
    state_dict cannot be loaded.

    Attributes:
        merged: the layer with the rows of all parts, without bias. It is not a submodule.
        rows: the rows of ``merged`` that are this layer's.
    """

    merged: QuantLinear
    rows: slice
    _first: bool
    _tensor_scale: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype of x."""
        if self.bias is None:
            return self.merged(x)[..., self.rows]
        bias = functional.pad(self.bias, (self.rows.start, self.merged.out_features - self.rows.stop))
        return apply_linear(self.merged, autocast_input(x), bias)[..., self.rows]

    def packed_weight(self) -> PackedWeight:
        """This layer's rows in the canonical format, with their scales from before the merge."""
        merged = self.merged.packed_weight()
        # A power of two: this undoes merge_rows exactly.
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
        return self.merged.dequantize()[self.rows]

    def _apply(self: _Part, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Part:
        if self._first:
            self.merged._apply(fn, recurse)
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
            f"{prefix.rstrip('.') or type(self).__name__}: load_state_dict needs a layer that is not merged with "
            f"others, got a MergedPart; call rcp_kernels.nn.unfuse_decoder(model) first"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # `merged` pickles the weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


def merge_linears(layers: Sequence[QuantLinear]) -> bool:
    """Store the weights of layers with the same input as one weight, if that gives the same bits.

    Each layer becomes a :class:`MergedPart`, in place.

    Args:
        layers: two or more, of the same in_features.

    Returns:
        Whether they were merged. They do not change if they differ in bits, group_size, kind, the treatment of the
        input or the presence of a bias, or have no common tensor_scale (:func:`rcp_kernels.formats.merge_rows`).
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
    layer_of_all = QuantLinear.from_packed(
        merged, None, first.act_bits, first.act_clip, first.input_rotation, first.input_order
    ).train(first.training)
    start = 0
    for layer, weight in zip(layers, weights, strict=True):
        layer.__class__ = MergedPart
        stop = start + layer.out_features
        # Into __dict__: a registered submodule would add keys to the model's state_dict.
        layer.__dict__.update(
            merged=layer_of_all, rows=slice(start, stop), _first=start == 0, _tensor_scale=float(weight.tensor_scale)
        )
        layer.packed = layer.packed.new_empty(0)
        start = stop
    return True


def split_linears(layers: Sequence[nn.Module]) -> None:
    """Undo :func:`merge_linears`. Layers that are not merged do not change."""
    weights = [layer.packed_weight() if isinstance(layer, MergedPart) else None for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        if isinstance(layer, MergedPart) and weight is not None:
            layer.__class__ = QuantLinear  # type: ignore[assignment]
            for name in ("merged", "rows", "_first", "_tensor_scale"):
                del layer.__dict__[name]
            layer._hold(weight, layer.input_order)


def _treatment(layer: QuantLinear) -> tuple[Any, ...]:
    """The properties that two layers must share to be merged."""
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
    """``residual + layer(prologue(x))`` in one operator, with a bias that may differ from the layer's.

    Args:
        layer: its bias is not used.
        x: float32, float16 or bfloat16 [..., in_features], or twice as many with an activation.
        bias: [out_features] or None.
        norm, activation, residual: as :func:`rcp_kernels.ops.lut_linear_fused`.

    Returns:
        x.dtype [..., out_features].
    """
    weight, eps, offset = (None, 0.0, 0.0) if norm is None else norm
    inside = NO_ROTATION
    rotation: Any = layer._modules.get("input_rotation")
    if rotation is not None:
        if rotation.heads is not None or rotation.signs is not None:
            # The operator does not have this rotation, which comes after the prologue.
            x = prologue_reference(x, weight, eps, offset, activation)
            weight = activation = None
        x, inside = rotation.apply_or_defer(x)
    buffers = layer._buffers
    return lut_linear_fused(
        x, buffers["packed"], bias, layer.geometry, layer.act_bits, layer.act_clip, inside, buffers["input_order"],  # type: ignore[arg-type]
        weight, eps, offset, activation, residual,
    )  # fmt: skip


def apply_merged(layers: Sequence[QuantLinear], x: Tensor, norm: Norm | None = None) -> Tensor:
    """The outputs of layers with the same input, side by side: one product for merged layers, else one product each.

    Args:
        layers: those of a call of :func:`merge_linears`.
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
    return apply_linear(first.merged, x, bias, norm)
