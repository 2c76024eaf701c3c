"""The linear layer on a packed weight with the norm, activation and residual sum of a decoder, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Geometry
from .checks import check_devices, check_float, check_one_of, check_tensor
from .lut_linear import NO_ROTATION, Rotation, lut_linear
from .token_prologue import ACTIVATIONS, gated_activation_reference, rms_norm_reference

__all__ = ["lut_linear_fused", "prologue_reference"]


def lut_linear_fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    act_bits: int,
    clip: float = 1.0,
    rotation: Rotation = NO_ROTATION,
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
    (docs/numerics.md). On CUDA, and where a gradient is wanted, the separate steps run.

    Args:
        x: float32, float16 or bfloat16 [..., in_features], any strides. With an activation [..., 2 * in_features]:
            gate, then up.
        weight, bias, geometry, act_bits, clip: as :func:`lut_linear`.
        rotation, input_order: as :func:`lut_linear`, after the prologue.
        norm_weight: float32, float16 or bfloat16 [in_features], or None for no norm.
        norm_eps: of the norm: ``x / sqrt(mean(x**2) + norm_eps) * (norm_offset + norm_weight)``.
        norm_offset: 0, or 1 for Gemma's norms.
        activation: ``"silu"`` or ``"gelu_tanh"``: ``activation(gate) * up``. None for none. Not together with a norm.
        residual: x.dtype [..., out_features], or None. It is added to the output after the output is rounded to
            x.dtype.

    Returns:
        x.dtype [..., out_features].

    Raises:
        ValueError: as :func:`lut_linear`; a norm and an activation together, another activation, or a norm_weight or
            residual of another dtype or shape.
    """
    tensors = (x, bias, norm_weight, residual)
    if x.is_cuda or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        _check(x, geometry, norm_weight, activation, residual)
        x = prologue_reference(x, norm_weight, norm_eps, norm_offset, activation)
        y = lut_linear(x, weight, bias, geometry, act_bits, clip, rotation, input_order)
        return y if residual is None else residual + y
    number = ACTIVATIONS.get(activation, -1)
    return torch.ops.rcp_kernels.lut_linear_fused.default(
        x, weight, bias, *geometry, act_bits, clip, *rotation, input_order,
        norm_weight, norm_eps, norm_offset, number, residual,
    )  # fmt: skip


def prologue_reference(
    x: Tensor,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    activation: str | None = None,
) -> Tensor:
    """The first step of :func:`lut_linear_fused`, before the rotation or the order, bit for bit.

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
    x: Tensor, geometry: Geometry, norm_weight: Tensor | None, activation: str | None, residual: Tensor | None
) -> None:
    """Refuse arguments that the separate steps would take and the operator does not."""
    where = "lut_linear_fused"
    check_float(where, "x", x)
    check_one_of(where, "activation", activation, ACTIVATIONS, "apply another activation before the call")
    if activation is not None and norm_weight is not None:
        raise ValueError(
            f"{where}: activation must be None beside a norm_weight, got {activation!r}; apply one of the two before "
            f"the call"
        )
    wanted = geometry.in_features if activation is None else 2 * geometry.in_features
    if x.dim() < 1 or x.shape[-1] != wanted:
        raise ValueError(
            f"{where}: x must have {wanted} features in its last dimension ({'twice ' if activation else ''}"
            f"in_features), got shape {tuple(x.shape)}; pass activations of the layer that this weight belongs to"
        )
    if residual is not None:
        check_tensor(where, "residual", residual, x.dtype, (*x.shape[:-1], geometry.out_features))


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
    named = {"weight": weight, "bias": bias, "input_order": input_order, "norm_weight": norm_weight}
    check_devices("lut_linear_fused", x, **named, residual=residual)
    return x.new_empty((*x.shape[:-1], out_features))
