"""Per-token symmetric quantization of activations to 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_clip, check_float, check_one_of

__all__ = ["check_quantization", "empty_quantized", "quantize_activation", "quantize_activation_reference"]

# A smaller scale gives a token of zeros: 1 / scale would leave float32's range for subnormal scales.
_SMALLEST_SCALE = 2.0**-120


def quantize_activation(x: Tensor, bits: int = 4, clip: float = 1.0, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize each token (a vector along the last dimension) to symmetric integers with a per-token scale.

    ``scale = max|x| * clip / qmax`` with qmax 7 or 127, ``q = clamp(rint(x / scale), -qmax - 1, qmax)``, half to even,
    in float32 (docs/numerics.md gives every step). A token that is zero, or whose scale is below 2**-120, gives q = 0
    and scale = 0. QuaRot (Ashkboos et al. 2024) uses the same scheme with clip 0.9. Not differentiable.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        bits: 4 or 8.
        clip: in (0, 1]. Below 1 the largest values saturate and the others get finer steps.
        packed: for 4 bits, two values a byte: even k in the low nibble, two's complement, a missing last value is 0.

    Returns:
        q, int8 [..., K] or, packed, uint8 [..., ceil(K / 2)]; and scale, float32 [...].

    Raises:
        ValueError: another dtype, bits, clip or packed, or NaN or Inf in x. CUDA cannot look at x without waiting for
            the device: there such a token gets scale NaN and q = 0.
        RuntimeError: on CUDA, the CUDA kernels are missing.
    """
    return torch.ops.rcp_kernels.quantize_activation.default(x, bits, clip, packed)


def check_quantization(x: Tensor, bits: int, clip: float, packed: bool) -> None:
    """Raise ValueError unless :func:`quantize_activation` takes these arguments."""
    where = "quantize_activation"
    check_float(where, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{where}: x must have at least one dimension, got a scalar; use x[None]")
    check_one_of(where, "bits", bits, (4, 8))
    check_clip(where, clip)
    if packed and bits != 4:
        raise ValueError(f"{where}: packed storage is for 4 bits, got bits={bits}; pass packed=False")


def empty_quantized(x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors of the shapes and dtypes that quantizing x gives."""
    leading, last = x.shape[:-1], x.shape[-1]
    if packed:
        q = x.new_empty((*leading, (last + 1) // 2), dtype=torch.uint8)
    else:
        q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty(leading, dtype=torch.float32)


@torch.library.register_fake("rcp_kernels::quantize_activation")
def _fake(x: Tensor, bits: int, clip: float = 1.0, packed: bool = False) -> tuple[Tensor, Tensor]:
    check_quantization(x, bits, clip, packed)
    return empty_quantized(x, packed)


def quantize_activation_reference(
    x: Tensor, bits: int = 4, clip: float = 1.0, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_activation` in plain torch: the same float32 steps, and so the same bits.

    Raises:
        ValueError: as the operator does on the CPU, on every device.
    """
    check_quantization(x, bits, clip, packed)
    values = x.detach().to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("quantize_activation: x must be finite, got NaN or Inf; check the layer that produced it")
    qmax = 2 ** (bits - 1) - 1
    largest = values.abs().amax(dim=-1) if x.shape[-1] else values.new_zeros(x.shape[:-1])
    # The scalars are float32 tensors: every step rounds once to float32, as in the kernels.
    scale = largest * values.new_tensor(clip) / values.new_tensor(float(qmax))
    scale = torch.where(scale < _SMALLEST_SCALE, 0.0, scale)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    q = torch.round(values * inverse[..., None]).clamp(-qmax - 1, qmax).to(torch.int8)
    if packed:
        pairs = torch.nn.functional.pad(q, (0, q.shape[-1] % 2)).unflatten(-1, (-1, 2))
        nibbles = pairs.view(torch.uint8) & 0xF
        q = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return q, scale
