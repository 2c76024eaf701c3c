"""The linear layer on a packed weight with what a decoder does before and after it, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .lut_linear import _check_act_bits, _check_input_order, lut_linear
from .token_prologue import ACTIVATIONS, gated_activation_reference, rms_norm_reference

__all__ = ["lut_linear_fused", "prologue_reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def lut_linear_fused(
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
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + lut_linear(prologue(x), ...)``, where prologue is an RMS norm, a gated activation, or nothing.

    The prologue runs once for each token. The result has the bits of the separate steps
    (:func:`rcp_kernels.ops.reference.rms_norm`, :func:`~rcp_kernels.ops.reference.gated_activation`,
    :func:`rcp_kernels.ops.lut_linear`, and an addition), on every instruction set and with any number of threads
    (docs/numerics.md). On CUDA, and where a gradient is wanted, those separate steps are what runs.

    Args:
        x: float32, float16 or bfloat16 [..., in_features], any strides; [..., 2 * in_features] with an activation:
            gate, then up.
        weight, bias, out_features, in_features, bits, group_size, act_bits, clip: as :func:`lut_linear`.
        rotation_base, rotation_permutation, rotation_group, input_order: as :func:`lut_linear`, after the prologue.
        norm_weight: float32, float16 or bfloat16 [in_features], or None for no norm.
        norm_eps: of the norm: ``x / sqrt(mean(x**2) + norm_eps) * (norm_offset + norm_weight)``.
        norm_offset: 0, or 1 for Gemma's norms.
        activation: ``"silu"`` or ``"gelu_tanh"``: ``activation(gate) * up``. None for none. Not together with a norm.
        residual: x.dtype [..., out_features], added to the output after this was rounded to x.dtype. None for none.

    Returns:
        x.dtype [..., out_features].

    Raises:
        ValueError: as :func:`lut_linear`; a norm and an activation together, another activation, or a norm_weight or
            residual of another dtype or shape.
    """
    number = ACTIVATIONS.get(activation, -1)
    tensors = (x, bias, norm_weight, residual)
    if x.is_cuda or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        _check(x, out_features, in_features, norm_weight, number, residual)
        y = lut_linear(
            prologue_reference(x, norm_weight, norm_eps, norm_offset, activation),
            weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
            rotation_base, rotation_permutation, rotation_group, input_order,
        )  # fmt: skip
        return y if residual is None else residual + y
    return torch.ops.rcp_kernels.lut_linear_fused.default(
        x, weight, bias, out_features, in_features, bits, group_size, act_bits, clip,
        rotation_base, rotation_permutation, rotation_group, input_order,
        norm_weight, norm_eps, norm_offset, number, residual,
    )  # fmt: skip


def prologue_reference(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """What :func:`lut_linear_fused` does to x before its rotation or order: the separate steps, bit for bit.

    Args:
        x, norm_weight, norm_eps, norm_offset, activation: as :func:`lut_linear_fused`.

    Returns:
        x.dtype [..., in_features].

    Raises:
        ValueError: as :func:`lut_linear_fused`.
    """
    if activation is not None:
        return gated_activation_reference(x, activation)
    return x if norm_weight is None else rms_norm_reference(x, norm_weight, norm_eps, norm_offset)


def _check(
    x: Tensor,
    out_features: int,
    in_features: int,
    norm_weight: Tensor | None,
    activation: int,
    residual: Tensor | None,
) -> None:
    where = "lut_linear_fused"
    if x.dtype not in _DTYPES:
        raise ValueError(f"{where}: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first")
    if activation not in (0, 1, 2):
        raise ValueError(
            f"{where}: activation must be 0 (none), 1 (silu) or 2 (gelu_tanh), got {activation}; apply another one "
            f"before the call"
        )
    if activation and norm_weight is not None:
        raise ValueError(
            f"{where}: activation must be 0 (none) beside a norm_weight, got {activation}; apply one of the two before "
            f"the call"
        )
    wanted = 2 * in_features if activation else in_features
    if x.dim() < 1 or x.shape[-1] != wanted:
        raise ValueError(
            f"{where}: x must have {wanted} features in its last dimension "
            f"({'twice ' if activation else ''}in_features), got shape {tuple(x.shape)}; pass activations of the layer "
            f"that this weight belongs to"
        )
    if norm_weight is not None and (norm_weight.dtype not in _DTYPES or tuple(norm_weight.shape) != (in_features,)):
        raise ValueError(
            f"{where}: norm_weight must be float32, float16 or bfloat16 of shape ({in_features},) (in_features), got "
            f"{norm_weight.dtype} of shape {tuple(norm_weight.shape)}; pass that of the norm before the layer"
        )
    shape = (*x.shape[:-1], out_features)
    if residual is not None and (residual.dtype != x.dtype or tuple(residual.shape) != shape):
        raise ValueError(
            f"{where}: residual must be {x.dtype} of shape {shape}, got {residual.dtype} of shape "
            f"{tuple(residual.shape)}; pass what the layer's output is added to"
        )


@torch.library.register_fake("rcp_kernels::lut_linear_fused")
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
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, out_features, in_features, norm_weight, activation, residual)
    _check_act_bits(act_bits)
    if input_order is not None:
        _check_input_order(x[..., :in_features], in_features, input_order, rotation_group)
    named = {"weight": weight, "bias": bias, "input_order": input_order, "norm_weight": norm_weight}
    # A meta tensor among real ones would otherwise bring us here and back with memory nobody wrote.
    for name, tensor in {**named, "residual": residual}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"lut_linear_fused: {name} must be on the device of x ({x.device}), got {tensor.device}; move them "
                f"together"
            )
    return x.new_empty((*x.shape[:-1], out_features))
