"""The linear layer on a packed weight: y = x W^T + bias with integer activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import PackedWeight, num_groups
from .pack_weight import dequantize
from .quantize_activation import quantize_activation_reference
from .walsh_transform import transform_blocks

__all__ = ["lut_linear", "lut_linear_group_sums_reference", "lut_linear_reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lut_linear(
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
    """``x @ dequantize(weight).T + bias`` with x quantized per token inside the operator.

    The sum inside a group is exact in int32 and the outer sum is float32 in a fixed order (docs/numerics.md), so two
    runs, and any two instruction sets, agree bit for bit. Differentiable in x and bias, straight through the
    quantization of x: ``grad_x = grad_y @ dequantize(weight)``.

    Args:
        x: float32, float16 or bfloat16 [..., in_features], any strides.
        weight: uint8, what :func:`rcp_kernels.ops.pack_weight` returned.
        bias: float32, float16 or bfloat16 [out_features], or None.
        out_features: N.
        in_features: K.
        bits: bits a weight code: 2, 3 or 4.
        group_size: weights that share a table: 32, 64, 128 or in_features.
        act_bits: 4 or 8 quantize x per token as :func:`rcp_kernels.ops.quantize_activation` does; 16 does not.
        clip: of the activation quantization, in (0, 1].
        rotation_base, rotation_permutation, rotation_group: with a group above 0, first transform every run of so many
            inputs by the orthonormal Walsh transform, inside the operator; bit-equal to
            :func:`rcp_kernels.ops.walsh_transform` before it. Base and permutation as that operator takes them.
        input_order: int64 [in_features], or None. Column k of the weight then belongs to ``x[..., input_order[k]]``,
            and the result is that of ``x[..., input_order]`` without it, bit for bit. Not together with a rotation.

    Returns:
        x.dtype [..., out_features].

    Raises:
        ValueError: a wrong dtype, shape or argument, a weight packed for others, an input_order outside 0 to
            in_features - 1 or beside a rotation, NaN or Inf in an x to quantize. CUDA cannot look into x or the weight
            without waiting for the device: there a token with NaN or Inf gives NaN in all its outputs, and a weight
            with a wrong header and the right size gives NaN in all. An entry outside input_order's range is CUDA's own
            error there, as in torch.index_select.
        RuntimeError: on CUDA, the CUDA kernels are missing.
    """
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        if rotation_group:
            if input_order is not None:
                _check_input_order(x, in_features, input_order, rotation_group)  # refuses the two together
            x = transform_blocks(
                x, rotation_base, rotation_permutation, rotation_group, rotation_group**-0.5, inverse=False
            )
        return _LutLinear.apply(
            x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip, input_order
        )
    if rotation_group or input_order is not None:
        return torch.ops.rcp_kernels.lut_linear.default(
            x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
            rotation_base, rotation_permutation, rotation_group, input_order,
        )  # fmt: skip
    # The overload, not the packet: it saves the overload resolution of every call.
    return torch.ops.rcp_kernels.lut_linear.default(
        x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip
    )


class _LutLinear(torch.autograd.Function):
    """Straight-through gradient. Not torch.library.register_autograd: that costs 10 us a call, training or not."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out_features: int,
        in_features: int,
        bits: int,
        group_size: int,
        act_bits: int,
        clip: float,
        input_order: Tensor | None,
    ) -> Tensor:
        return torch.ops.rcp_kernels.lut_linear.default(
            x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
            input_order=input_order,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, *geometry = inputs
        ctx.save_for_backward(weight, geometry[-1])
        ctx.geometry = geometry[:4]
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        grad = grad_y.to(torch.float32)
        if ctx.needs_input_grad[0]:
            weight, input_order = ctx.saved_tensors
            grad_x = grad @ dequantize(weight, *ctx.geometry)
            if input_order is not None:
                grad_x = torch.zeros_like(grad_x).index_add(-1, input_order, grad_x)
            grad_x = grad_x.to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
            grad_bias = grad_bias.to(ctx.bias_dtype)
        return grad_x, None, grad_bias, None, None, None, None, None, None, None


def _check_x(x: Tensor, in_features: int) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"lut_linear: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"lut_linear: x must have {in_features} features in its last dimension (in_features), got shape "
            f"{tuple(x.shape)}; pass activations of the layer that this weight belongs to"
        )


def _check_input_order(x: Tensor, in_features: int, order: Tensor, rotation_group: int = 0) -> None:
    _check_x(x, in_features)
    if rotation_group:
        raise ValueError(
            f"lut_linear: input_order must be left out where rotation_group is not 0, got both with rotation_group "
            f"{rotation_group}; reorder x before the call"
        )
    if order.dtype != torch.int64 or tuple(order.shape) != (in_features,):
        raise ValueError(
            f"lut_linear: input_order must be int64 of shape ({in_features},) (in_features), got {order.dtype} of "
            f"shape {tuple(order.shape)}; pass the one of the same layer"
        )


def _check_act_bits(act_bits: int) -> None:
    if act_bits not in (4, 8, 16):
        raise ValueError(f"lut_linear: act_bits must be 4, 8 or 16, got {act_bits}; 16 leaves x unquantized")


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
    _check_act_bits(act_bits)
    if input_order is not None:
        _check_input_order(x, in_features, input_order, rotation_group)
    # A meta tensor among real ones would otherwise bring us here and back with memory nobody wrote.
    for name, tensor in (("weight", weight), ("bias", bias), ("input_order", input_order)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"lut_linear: {name} must be on the device of x ({x.device}), got {tensor.device}; move them together, "
                f"or, where it is meta, load the layer's weights with load_state_dict(..., assign=True) first"
            )
    return x.new_empty((*x.shape[:-1], out_features))


def _tables(weight: PackedWeight) -> Tensor:
    """int8 [N, groups * group_size]: the level of every weight, padding as level 0."""
    codes = weight.unpack().to(torch.int64)
    groups = num_groups(weight.in_features, weight.group_size)
    padding = groups * weight.group_size - weight.in_features
    codes = torch.nn.functional.pad(codes, (0, padding)).view(weight.out_features, groups, weight.group_size)
    levels = torch.gather(weight.as_table().levels, 2, codes).flatten(1)
    if padding:
        levels[:, -padding:] = 0
    return levels


def lut_linear_group_sums_reference(q: Tensor, weight: PackedWeight) -> Tensor:
    """The exact inner sums of the numerics contract: ``I[m, n, g] = sum over k in g of q[m, k] * level[n, k]``.

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
    right = _tables(weight).to(torch.float64).view(weight.out_features, groups, weight.group_size).permute(1, 2, 0)
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
    _check_act_bits(act_bits)
    tokens = x.detach().reshape(-1, weight.in_features)
    if input_order is not None:
        _check_input_order(x, weight.in_features, input_order)
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
