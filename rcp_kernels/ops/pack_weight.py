"""The packed weight in the order that the kernels read: a blob of bytes of the running backend, never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import PackedWeight, num_groups, row_bytes

__all__ = ["dequantize", "pack_weight", "unpack_weight"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pack_weight(weight: PackedWeight) -> Tensor:
    """Reorder a packed weight for :func:`rcp_kernels.ops.lut_linear`.

    Uniform groups keep their first level only on the CPU, whose kernels make the table of a group in registers; CUDA's
    layout holds tables of either kind. Results of a weight as uniform groups and as tables are equal bit for bit.

    Shapes and dtypes are checked, values are not: descending levels or a NaN scale are packed as they are.
    :meth:`PackedWeight.validate` looks at the values.

    Args:
        weight: canonical format (docs/format.md).

    Returns:
        uint8, 1-D: a header and the backend's layout, for this process only.

    Raises:
        ValueError: tensors that contradict out_features, in_features, bits or group_size.
        RuntimeError: on CUDA, the CUDA kernels are missing.
    """
    if tuple(weight.codes.shape[:1]) != (weight.out_features,):
        raise ValueError(
            f"pack_weight: codes must have {weight.out_features} rows (out_features), got shape "
            f"{tuple(weight.codes.shape)}; the codes are truncated or the metadata belongs to another weight"
        )
    if weight.codes.is_cuda:
        weight = weight.as_table()
    return torch.ops.rcp_kernels.pack_weight.default(
        weight.codes,
        weight.levels,
        weight.scales,
        weight.tensor_scale,
        weight.in_features,
        weight.bits,
        weight.group_size,
    )


def unpack_weight(blob: Tensor, out_features: int, in_features: int, bits: int, group_size: int) -> PackedWeight:
    """The exact inverse of :func:`pack_weight`, but of kind "table"; padding codes come back as 0.

    A blob does not say on every device of which kind its weight was: :meth:`PackedWeight.as_uniform` undoes it.

    Args:
        blob: what :func:`pack_weight` returned.
        out_features: N.
        in_features: K.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.

    Raises:
        ValueError: the blob is damaged or was packed for other arguments.
    """
    codes, levels, scales, tensor_scale = torch.ops.rcp_kernels.unpack_weight.default(
        blob, out_features, in_features, bits, group_size
    )
    return PackedWeight(codes, levels, scales, tensor_scale, bits, group_size, in_features, out_features)


def dequantize(
    blob: Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of a blob as a matrix: ``level * scale * tensor_scale`` in float32, then rounded to ``dtype``.

    Args:
        blob: what :func:`pack_weight` returned.
        out_features: N.
        in_features: K.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.
        dtype: float32, which is exact (docs/format.md), float16 or bfloat16.

    Returns:
        dtype [out_features, in_features], on the device of blob.

    Raises:
        ValueError: another dtype, or a blob that is damaged or was packed for other arguments.
    """
    return torch.ops.rcp_kernels.dequantize.default(blob, out_features, in_features, bits, group_size, dtype)


@torch.library.register_fake("rcp_kernels::pack_weight")
def _fake_pack(
    codes: Tensor, levels: Tensor, scales: Tensor, tensor_scale: Tensor, in_features: int, bits: int, group_size: int
) -> Tensor:
    # The layout is the backend's own business, and so is its size.
    return codes.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake("rcp_kernels::unpack_weight")
def _fake_unpack(
    weight: Tensor, out_features: int, in_features: int, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = num_groups(in_features, group_size)
    return (
        weight.new_empty((out_features, row_bytes(in_features, bits, group_size))),
        weight.new_empty((out_features, groups, 2**bits), dtype=torch.int8),
        weight.new_empty((out_features, groups), dtype=torch.float16),
        weight.new_empty((), dtype=torch.float32),
    )


@torch.library.register_fake("rcp_kernels::dequantize")
def _fake_dequantize(
    weight: Tensor,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    if dtype not in _DTYPES:
        raise ValueError(
            f"dequantize: dtype must be float32, float16 or bfloat16, got {dtype}; convert the result with .to()"
        )
    return weight.new_empty((out_features, in_features), dtype=dtype)
