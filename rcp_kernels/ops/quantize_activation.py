"""Per-token symmetric quantization of activations to 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["quantize_activation", "quantize_activation_reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Below this scale a token is all zeros: 1 / scale would leave float32's range for subnormal scales.
_SMALLEST_SCALE = 2.0**-120


def quantize_activation(x: Tensor, bits: int = 4, clip: float = 1.0, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize each token (a vector along the last dimension) to symmetric integers with a scale of its own.

    ``scale = max|x| * clip / qmax`` with qmax 7 or 127, ``q = clamp(rint(x / scale), -qmax - 1, qmax)``, half to even,
    in float32 (docs/numerics.md gives every step). A token that is zero, or whose scale is below 2**-120, gives q = 0
    and scale = 0. QuaRot (Ashkboos et al. 2024) uses the same scheme with clip 0.9. Not differentiable.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides.
        bits: 4 or 8.
        clip: in (0, 1]; below 1 the largest values saturate and the others get finer steps.
        packed: for 4 bits, two values a byte: even k in the low nibble, two's complement, a missing last one is 0.

    Returns:
        q, int8 [..., K] or, packed, uint8 [..., ceil(K / 2)]; and scale, float32 [...].

    Raises:
        ValueError: another dtype, bits, clip or packed, or NaN or Inf in x. CUDA cannot look at x without waiting for
            the device: there such a token gets scale NaN and q = 0.
        RuntimeError: on CUDA, the CUDA kernels are missing.
    """
    return torch.ops.rcp_kernels.quantize_activation.default(x, bits, clip, packed)


def _check_arguments(x: Tensor, bits: int, clip: float, packed: bool) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"quantize_activation: x must be float32, float16 or bfloat16, got {x.dtype}; convert it first"
        )
    if x.dim() < 1:
        raise ValueError("quantize_activation: x must have at least one dimension, got a scalar; use x[None]")
    if bits not in (4, 8):
        raise ValueError(f"quantize_activation: bits must be 4 or 8, got {bits}; choose one of them")
    if not 0.0 < clip <= 1.0:
        raise ValueError(f"quantize_activation: clip must be in (0, 1], got {clip}; 1.0 keeps the largest value")
    if packed and bits != 4:
        raise ValueError(f"quantize_activation: packed storage is for 4 bits, got bits={bits}; pass packed=False")


@torch.library.register_fake("rcp_kernels::quantize_activation")
def _fake(x: Tensor, bits: int, clip: float = 1.0, packed: bool = False) -> tuple[Tensor, Tensor]:
    _check_arguments(x, bits, clip, packed)
    leading, last = x.shape[:-1], x.shape[-1]
    if packed:
        q = x.new_empty((*leading, (last + 1) // 2), dtype=torch.uint8)
    else:
        q = x.new_empty(x.shape, dtype=torch.int8)
    return q, x.new_empty(leading, dtype=torch.float32)


def quantize_activation_reference(
    x: Tensor, bits: int = 4, clip: float = 1.0, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """:func:`quantize_activation` in plain torch: the same float32 steps, so both results are equal bit for bit.

    Raises:
        ValueError: as the operator does, NaN and Inf included, on every device.
    """
    _check_arguments(x, bits, clip, packed)
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
