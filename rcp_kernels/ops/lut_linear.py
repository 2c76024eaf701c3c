"""The linear layer on a packed weight: y = x W^T + bias with integer activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import Geometry, PackedWeight, num_groups
from .checks import check_devices, check_float, check_one_of, check_tensor
from .pack_weight import dequantize
from .quantize_activation import quantize_activation_reference
from .walsh_transform import transform_blocks

__all__ = [
    "ACT_BITS",
    "NO_ROTATION",
    "Rotation",
    "lut_linear",
    "lut_linear_group_sums_reference",
    "lut_linear_reference",
]

ACT_BITS = (4, 8, 16)
"""Bits of an activation. 16 means that activations are not quantized."""


class Rotation(NamedTuple):
    """The orthonormal Walsh transform of every run of ``group`` inputs, inside the operator.

    Attributes:
        base, permutation: of :func:`rcp_kernels.ops.walsh_transform.transform_tables`.
        group: inputs in a run; 0 for no rotation.
    """

    base: Tensor | None
    permutation: Tensor | None
    group: int


NO_ROTATION = Rotation(None, None, 0)


def fuses_on_cuda(rotation: Rotation, act_bits: int) -> bool:
    """Whether the CUDA kernel rotates x itself: runs of 32, 64 or 128, and quantized activations.

    Any other rotation is :func:`rcp_kernels.ops.walsh_transform` before the operator, which refuses it
    (csrc/cuda/lut_linear.cu). CPU kernels take every rotation.
    """
    return act_bits != 16 and rotation.base is None and rotation.group in (32, 64, 128)


def lut_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    act_bits: int,
    clip: float = 1.0,
    rotation: Rotation = NO_ROTATION,
    input_order: Tensor | None = None,
) -> Tensor:
    """``x @ dequantize(weight).T + bias`` with x quantized per token inside the operator.

    The sum inside a group is exact in int32, and the outer sum is float32 in a fixed order (docs/numerics.md). Two runs
    agree bit for bit, and so do any two instruction sets. Differentiable in x and bias, straight through the
    quantization of x: ``grad_x = grad_y @ dequantize(weight)``.

    Args:
        x: float32, float16 or bfloat16 [..., in_features], any strides.
        weight: uint8, the result of :func:`rcp_kernels.ops.pack_weight`.
        bias: float32, float16 or bfloat16 [out_features], or None.
        geometry: of the weight, ``PackedWeight.geometry``: (out_features, in_features, bits, group_size).
        act_bits: 4 or 8 quantize x per token as :func:`rcp_kernels.ops.quantize_activation` does; 16 does not.
        clip: of the activation quantization, in (0, 1].
        rotation: applied to x first; bit-equal to :func:`rcp_kernels.ops.walsh_transform` before the call.
        input_order: int64 [in_features], or None. Column k of the weight then belongs to ``x[..., input_order[k]]``.
            The result is bit-equal to that of ``x[..., input_order]``. Not together with a rotation.

    Returns:
        x.dtype [..., out_features].

    Raises:
        ValueError: a wrong dtype, shape or argument; a weight packed for another geometry; an input_order outside 0 to
            in_features - 1 or beside a rotation; NaN or Inf in an x to quantize. CUDA cannot look into x or the weight
            without waiting for the device. There a token with NaN or Inf gives NaN in all its outputs, a weight with a
            wrong header and the right size gives NaN in all outputs, and an entry outside input_order's range is
            CUDA's own error, as in torch.index_select.
        RuntimeError: on CUDA, the CUDA kernels are missing.
    """
    differentiable = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    base, permutation, group = rotation
    if group and (differentiable or (x.is_cuda and not fuses_on_cuda(rotation, act_bits))):
        if input_order is not None:
            raise ValueError(
                f"lut_linear: input_order must be left out where rotation_group is not 0, got both with "
                f"rotation_group {group}; reorder x before the call"
            )
        x = transform_blocks(x, base, permutation, group, group**-0.5, inverse=False)
        rotation = NO_ROTATION
    if differentiable:
        return _LutLinear.apply(x, weight, bias, *geometry, act_bits, clip, input_order)
    # The overload, not the packet: that saves the overload resolution of every call.
    return torch.ops.rcp_kernels.lut_linear.default(x, weight, bias, *geometry, act_bits, clip, *rotation, input_order)


class _LutLinear(torch.autograd.Function):
    """Straight-through gradient. torch.library.register_autograd would cost 10 us a call, training or not."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        *settings, input_order = rest
        return torch.ops.rcp_kernels.lut_linear.default(x, weight, bias, *settings, input_order=input_order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *rest = inputs
        ctx.save_for_backward(weight, rest[-1])
        ctx.geometry = Geometry(*rest[:4])
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        grad = grad_y.to(torch.float32)
        if ctx.needs_input_grad[0]:
            weight, input_order = ctx.saved_tensors
            grad_x = grad @ dequantize(weight, ctx.geometry)
            if input_order is not None:
                grad_x = torch.zeros_like(grad_x).index_add(-1, input_order, grad_x)
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, grad_bias, *[None] * 7


def _check_x(x: Tensor, in_features: int) -> None:
    check_float("lut_linear", "x", x)
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"lut_linear: x must have {in_features} features in its last dimension (in_features), got shape "
            f"{tuple(x.shape)}; pass activations of the layer that this weight belongs to"
        )


@torch.library.register_fake("rcp_kernels::lut_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    act_bits: int,
    clip: float = 1.0,
    rotation_base: Tensor | None = None,
    rotation_permutation: Tensor | None = None,
    rotation_group: int = 0,
    input_order: Tensor | None = None,
) -> Tensor:
    _check_x(x, in_features)
    check_devices("lut_linear", x, weight=weight, bias=bias, input_order=input_order)
    return x.new_empty((*x.shape[:-1], out_features))


def _levels_of_weights(weight: PackedWeight) -> Tensor:
    """int8 [N, groups * group_size]: the level of every weight; padding is 0."""
    codes = weight.unpack().to(torch.int64)
    groups = num_groups(weight.in_features, weight.group_size)
    padding = groups * weight.group_size - weight.in_features
    codes = torch.nn.functional.pad(codes, (0, padding)).view(weight.out_features, groups, weight.group_size)
    levels = torch.gather(weight.as_table().levels, 2, codes).flatten(1)
    if padding:
        levels[:, -padding:] = 0
    return levels


def lut_linear_group_sums_reference(q: Tensor, weight: PackedWeight) -> Tensor:
    """The exact inner sums (docs/numerics.md): ``I[m, n, g] = sum over k in g of q[m, k] * level[n, k]``.

    Args:
        q: int8 [M, in_features].
        weight: the packed weight.

    Returns:
        int64 [M, out_features, groups].
    """
    groups = num_groups(weight.in_features, weight.group_size)
    q = torch.nn.functional.pad(q, (0, groups * weight.group_size - weight.in_features))
    # float64 products of int8 are exact, and so are their sums below 2**53.
    left = q.to(torch.float64).view(-1, groups, weight.group_size).transpose(0, 1)
    right = _levels_of_weights(weight).to(torch.float64)
    right = right.view(weight.out_features, groups, weight.group_size).permute(1, 2, 0)
    return torch.bmm(left, right).permute(1, 2, 0).to(torch.int64)


def lut_linear_reference(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    act_bits: int = 4,
    clip: float = 1.0,
    input_order: Tensor | None = None,
) -> Tensor:
    """:func:`lut_linear` in plain torch: exact integers inside a group, float64 outside, no rounding to x.dtype.

    Args:
        x: float32, float16 or bfloat16 [..., in_features].
        weight: the packed weight.
        bias: floating point [out_features], or None.
        act_bits: 4, 8 or 16.
        clip: of the activation quantization, in (0, 1].
        input_order: int64 [in_features], or None: column k of the weight belongs to ``x[..., input_order[k]]``.

    Returns:
        float64 [..., out_features].

    Raises:
        ValueError: as the operator does.
    """
    _check_x(x, weight.in_features)
    check_one_of("lut_linear", "act_bits", act_bits, ACT_BITS, "16 leaves x unquantized")
    tokens = x.detach().reshape(-1, weight.in_features)
    if input_order is not None:
        check_tensor("lut_linear", "input_order", input_order, torch.int64, (weight.in_features,))
        tokens = tokens[:, input_order]
    if act_bits == 16:
        y = tokens.to(torch.float64) @ weight.dequantize().to(torch.float64).T
    else:
        q, scale = quantize_activation_reference(tokens, act_bits, clip)
        sums = lut_linear_group_sums_reference(q, weight).to(torch.float64)
        y = (sums * weight.scales.to(torch.float64)).sum(dim=-1)
        y = y * scale.to(torch.float64)[:, None] * weight.tensor_scale.to(torch.float64)
    if bias is not None:
        y = y + bias.detach().to(torch.float64)
    return y.view(*x.shape[:-1], weight.out_features)
