"""The packed weight in the order in which a backend's kernels read it: a blob of bytes that is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Geometry, PackedWeight, num_groups, row_bytes
from .checks import check_float

__all__ = ["dequantize", "pack_weight", "unpack_weight"]


def pack_weight(weight: PackedWeight) -> Tensor:
    """Reorder a packed weight for :func:`rcp_kernels.ops.lut_linear`.

    On the CPU a uniform group stays its first level, and the kernels make the table of a group in registers. CUDA's
    layout holds tables only. A weight of kind "uniform" and the same weight of kind "table" give the same bits.

    Shapes and dtypes are checked. Values are not, as :meth:`PackedWeight.validate` checks them.

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


def unpack_weight(blob: Tensor, geometry: Geometry) -> PackedWeight:
    """The exact inverse of :func:`pack_weight`, of kind "table". Padding codes are 0.

    CUDA's blobs do not store the kind of a weight: :meth:`PackedWeight.as_uniform` restores it.

    Args:
        blob: the result of :func:`pack_weight`.
        geometry: of the weight, ``PackedWeight.geometry``.

    Raises:
        ValueError: the blob is damaged or was packed for another geometry.
    """
    out_features, in_features, bits, group_size = geometry
    codes, levels, scales, tensor_scale = torch.ops.rcp_kernels.unpack_weight.default(blob, *geometry)
    return PackedWeight(codes, levels, scales, tensor_scale, bits, group_size, in_features, out_features)


def dequantize(blob: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of a blob as a matrix: ``level * scale * tensor_scale`` in float32, then rounded to ``dtype``.

    Args:
        blob: the result of :func:`pack_weight`.
        geometry: of the weight, ``PackedWeight.geometry``.
        dtype: float32, which is exact (docs/format.md), float16 or bfloat16.

    Returns:
        dtype [out_features, in_features], on the device of blob.

    Raises:
        ValueError: another dtype, or a blob that is damaged or was packed for another geometry.
    """
    return torch.ops.rcp_kernels.dequantize.default(blob, *geometry, dtype)


@torch.library.register_fake("rcp_kernels::pack_weight")
def _fake_pack(
    codes: Tensor, levels: Tensor, scales: Tensor, tensor_scale: Tensor, in_features: int, bits: int, group_size: int
) -> Tensor:
    # The size depends on the backend's layout.
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
    check_float("dequantize", "dtype", dtype, "convert the result with .to()")
    return weight.new_empty((out_features, in_features), dtype=dtype)
