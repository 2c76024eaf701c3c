"""The prologues of :func:`lut_linear_fused`, RMS norm and gated activation, in plain torch operators.

The compiled operator does the same float32 steps in the same order (docs/numerics.md). Both are equal bit for bit,
except for subnormal numbers, which the operator flushes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_float, check_one_of

__all__ = ["ACTIVATIONS", "gated_activation_reference", "rms_norm_reference"]

ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}
"""The operator's number of each gated activation."""


def _check_x(caller: str, x: Tensor) -> None:
    check_float(caller, "x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(
            f"{caller}: x must have features in its last dimension, got shape {tuple(x.shape)}; pass tokens"
        )


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * (offset + weight)`` of each token, in float32.

    With offset 0 the normalized token is rounded to x.dtype before the product with the weight, as LLaMA's norm does.
    With another offset it is not rounded, as in Gemma's norm. Differentiable.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        weight: floating point [K].
        eps: added to the mean.
        offset: added to the weight.

    Returns:
        x.dtype [..., K].

    Raises:
        ValueError: another dtype, or a weight of another shape.
    """
    _check_x("rms_norm", x)
    size = x.shape[-1]
    if tuple(weight.shape) != (size,):
        raise ValueError(
            f"rms_norm: weight must have shape ({size},), got {tuple(weight.shape)}; pass the weight of the norm"
        )
    values = x.to(torch.float32)
    half = 16
    while 2 * half < size:
        half *= 2
    total = torch.nn.functional.pad(values * values, (0, 2 * half - size))
    while half:
        total = total[..., :half] + total[..., half:]
        half //= 2
    # As float32 tensors: every step then rounds as in the compiled operator.
    mean = total * torch.tensor(1.0 / size, dtype=torch.float32, device=x.device)
    mean = mean + torch.tensor(eps, dtype=torch.float32, device=x.device)
    # torch's float32 square root is not always rounded to nearest; float64 rounded to float32 is.
    inverse = torch.reciprocal(torch.sqrt(mean.to(torch.float64)).to(torch.float32))
    values = values * inverse
    if offset == 0.0:
        values = values.to(x.dtype).to(torch.float32)
    return (values * (weight.to(torch.float32) + offset)).to(x.dtype)


def _exp(x: Tensor) -> Tensor:
    """e**x within 2 units in the last place: Cephes' polynomial, every step rounded to float32."""

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=x.device)

    x = x.clamp(-87.0, 89.0)
    n = torch.round(x * number(1.4426950408889634)).detach()
    r = (x - n * number(0.693359375)) - n * number(-2.12194440e-4)
    p = number(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + number(factor)
    p = (p * (r * r) + r) + number(1.0)
    half = torch.round(n * number(0.5))
    return (p * _power_of_two(half)) * _power_of_two(n - half)


def _power_of_two(n: Tensor) -> Tensor:
    return ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def gated_activation_reference(x: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of tokens that hold gate and up side by side, in float32.

    As in separate operators, the activation is rounded to x.dtype before the product. Differentiable.

    Args:
        x: float32, float16 or bfloat16 [..., 2 K]: gate, then up.
        activation: ``"silu"``, or ``"gelu_tanh"`` for torch's GELU with ``approximate="tanh"``.

    Returns:
        x.dtype [..., K].

    Raises:
        ValueError: another dtype or activation, or an odd number of features.
    """
    _check_x("gated_activation", x)
    check_one_of("gated_activation", "activation", activation, ("silu", "gelu_tanh"))
    if x.shape[-1] % 2:
        raise ValueError(f"gated_activation: x must hold gate and up, got {x.shape[-1]} features; pass both")
    gate, up = (part.to(torch.float32) for part in x.chunk(2, -1))
    t = gate
    if activation == "gelu_tanh":
        c1, c0 = (torch.tensor(c, device=x.device) for c in (0.07135481627260025, 1.5957691216057308))
        t = gate * ((gate * gate) * c1 + c0)
    value = gate / (_exp(0.0 - t) + 1.0)
    return (value.to(x.dtype).to(torch.float32) * up).to(x.dtype)
