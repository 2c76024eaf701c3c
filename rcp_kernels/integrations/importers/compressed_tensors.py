"""compressed-tensors (llm-compressor, vLLM): ``pack-quantized`` integers of 2 to 4 bits and ``mxfp4-pack-quantized``.

pack-quantized: ``weight_packed`` int32 [N, ceil(K * bits / 32)] is a dense stream along K of ``q + 2**(bits - 1)``. A
weight is ``weight_scale * (q - zero)``. Asymmetric checkpoints have zeros, ``weight_zero_point``: int32
[ceil(N * bits / 32), groups], a dense stream of ``zero + 2**(bits - 1)`` along N, or plain integers of the scale's
shape, as for the strategy ``tensor``.

mxfp4-pack-quantized: ``weight_packed`` uint8 [N, K / 2] holds codes of E2M1 numbers, the even column in the low nibble.
``weight_scale`` uint8 [N, K / 32] is the exponent of a power of two with bias 127 (OCP Microscaling 1.0).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...formats import ImportedWeight, check_bits
from ...ops.checks import FLOAT_DTYPES
from .inputs import as_tensor, check_bias, code_groups, column_order, take, unpack_words
from .tables import pack_levels

__all__ = ["E2M1_DOUBLED", "import_compressed_tensors", "import_compressed_tensors_mxfp4", "mx_scales"]

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the value of each E2M1 code: the sign is the high bit."""


def import_compressed_tensors(
    tensors: Mapping[str, Tensor | np.ndarray],
    prefix: str = "",
    *,
    bits: int,
    group_size: int | None = None,
    exact: bool = True,
) -> ImportedWeight:
    """Read one layer of a ``pack-quantized`` checkpoint.

    Exact for float16 and bfloat16 scales, and for float32 scales of at most 11 significant bits. The library rounds
    ``scale * (q - zero)`` to the scale's dtype when it decompresses. The imported weight is the unrounded product.

    Args:
        tensors: ``weight_packed`` int32 [N, ceil(K*bits/32)], ``weight_scale`` [N, groups], [N, 1] or [1],
            ``weight_shape`` integer [2] and, optional, ``weight_zero_point`` int32 [ceil(N*bits/32), groups] or
            plain integers of the scale's shape, ``weight_g_idx`` integer [K] (-1 in all of them: never set) and
            ``bias`` [N], each under ``prefix``; tensors or numpy arrays.
        prefix: of the layer, for example ``"model.layers.0.mlp.up_proj."``.
        bits: ``num_bits`` of the checkpoint: 2, 3 or 4.
        group_size: of the checkpoint; None or -1 for the strategies ``channel`` and ``tensor``.
        exact: refuse scales that float16 cannot hold; False rounds them.

    Returns:
        The weight, with a ``permutation`` if weight_g_idx is in act-order.

    Raises:
        ValueError: a tensor is missing or misshapen; groups that the format does not have; scales that are not finite
            or, if exact, not held.
    """
    where = f"import_compressed_tensors: {prefix}" if prefix else "import_compressed_tensors"
    check_bits(bits)
    packed = take(where, tensors, prefix + "weight_packed", (torch.int32,), 2)
    shape = take(where, tensors, prefix + "weight_shape", (torch.int64, torch.int32), 1)
    dims = getattr(tensors.get(prefix + "weight_scale"), "ndim", 2)
    per_tensor = dims == 1
    scales = take(where, tensors, prefix + "weight_scale", FLOAT_DTYPES, 1 if per_tensor else 2)
    out_features, in_features = (int(size) for size in shape)
    if per_tensor:
        _check(where, "weight_scale", scales, (1,))
        scales = scales.expand(out_features)[:, None]
    groups = scales.shape[1]
    _check(where, "weight_packed", packed, (out_features, -(-in_features * bits // 32)))
    _check(where, "weight_scale", scales, (out_features, groups))
    group_size = code_groups(where, group_size, in_features, groups)
    codes = unpack_words(packed, bits, in_features)
    zeros = _zeros(where, tensors, prefix + "weight_zero_point", bits, scales, per_tensor)
    levels = torch.arange(2**bits, dtype=torch.int16, device=codes.device) - zeros[..., None]
    order = None
    if prefix + "weight_g_idx" in tensors:
        g_idx = take(where, tensors, prefix + "weight_g_idx", (torch.int32, torch.int64), 1)
        _check(where, "weight_g_idx", g_idx, (in_features,))
        order = column_order(where, g_idx, group_size)
    bias = check_bias(where, tensors.get(prefix + "bias"), out_features)
    return pack_levels(
        where, codes, levels, scales, bits=bits, group_size=group_size, exact=exact, permutation=order, bias=bias
    )


def _zeros(
    where: str,
    tensors: Mapping[str, Tensor | np.ndarray],
    key: str,
    bits: int,
    scales: Tensor,
    per_tensor: bool,
) -> Tensor:
    """The code of the value 0 in each group, int16 [N, groups]."""
    middle = 2 ** (bits - 1)
    zeros = torch.full(tuple(scales.shape), middle, dtype=torch.int16, device=scales.device)
    if key not in tensors:
        return zeros
    stored = as_tensor(where, key, tensors[key])
    if not per_tensor and stored.dtype == torch.int32:
        rows = scales.shape[0]
        stored = take(where, tensors, key, (torch.int32,), 2)
        _check(where, "weight_zero_point", stored, (-(-rows * bits // 32), scales.shape[1]))
        return unpack_words(stored.t(), bits, rows).t().to(torch.int16)
    stored = take(where, tensors, key, _INTEGERS, 1 if per_tensor else 2)
    _check(where, "weight_zero_point", stored, (1,) if per_tensor else tuple(scales.shape))
    outside = stored[(stored < -middle) | (stored >= middle)]
    if outside.numel():
        raise ValueError(
            f"{where}: weight_zero_point must be {-middle} to {middle - 1} for {bits} bits, got {int(outside[0])}; "
            f"check bits"
        )
    return zeros + stored.to(torch.int16)


def import_compressed_tensors_mxfp4(
    tensors: Mapping[str, Tensor | np.ndarray], prefix: str = "", *, exact: bool = True
) -> ImportedWeight:
    """Read one layer of an ``mxfp4-pack-quantized`` checkpoint: E2M1 codes, a power of two for each 32 columns.

    Exact where a tensor's scales span less than 2**39.

    Args:
        tensors: ``weight_packed`` uint8 [N, K/2], ``weight_scale`` uint8 [N, K/32] and, optional, ``bias`` [N], each
            under ``prefix``; tensors or numpy arrays.
        prefix: of the layer.
        exact: refuse scales that float16 cannot hold; False rounds them.

    Raises:
        ValueError: a tensor is missing or misshapen (as nvfp4's, whose groups of 16 the format does not have); a scale
            of 255, which is NaN; with exact, scales that are not held.
    """
    where = f"import_compressed_tensors_mxfp4: {prefix}" if prefix else "import_compressed_tensors_mxfp4"
    packed = take(where, tensors, prefix + "weight_packed", (torch.uint8,), 2)
    stored = take(where, tensors, prefix + "weight_scale", (torch.uint8,), 2)
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    _check(where, "weight_scale", stored, (out_features, -(-in_features // 32)))
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    scales = mx_scales(stored)
    levels = torch.tensor(E2M1_DOUBLED, dtype=torch.int16, device=codes.device).expand(*scales.shape, 16)
    bias = check_bias(where, tensors.get(prefix + "bias"), out_features)
    return pack_levels(where, codes, levels, scales, bits=4, group_size=32, exact=exact, bias=bias)


def mx_scales(exponents: Tensor) -> Tensor:
    """Half the E8M0 scales uint8, as float64: the factors of :data:`E2M1_DOUBLED`. 255 is NaN."""
    powers = np.ldexp(1.0, np.arange(256) - 128)  # torch's exp2 need not be exact
    powers[255] = np.nan
    return torch.from_numpy(powers).to(exponents.device)[exponents.to(torch.int64)]


def _check(where: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{where}: {name} must have shape {shape}, got {tuple(tensor.shape)}; check bits and the format of the "
            f"checkpoint (releases of the library that put ten 3-bit codes into a word are not read)"
        )
