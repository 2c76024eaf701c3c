"""The tensors of another library's checkpoint, checked, and the parts of a layout that several importers share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...formats import num_groups
from ...formats.codes import unpack_bits

__all__ = ["as_tensor", "check_bias", "code_groups", "column_order", "take", "unpack_words"]


def as_tensor(where: str, name: str, value: Tensor | np.ndarray) -> Tensor:
    """Return a tensor as it is, and a numpy array as a tensor.

    Raises:
        ValueError: another type, or an array whose dtype torch does not have.
    """
    if isinstance(value, Tensor):
        return value
    rule = f"{where}: {name} must be a tensor or a numpy array of a type that torch has"
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{rule}, got {type(value).__name__}; load it as the library stored it")
    array = np.array(value, order="C", copy=None if value.flags.writeable else True)
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ValueError(
            f"{rule}, got a numpy array of {array.dtype}; load the file with safetensors.torch, or use astype"
        ) from None


def take(
    where: str, tensors: Mapping[str, Tensor | np.ndarray], key: str, dtypes: tuple[torch.dtype, ...], dims: int
) -> Tensor:
    """The tensor, or numpy array, under a key, as a tensor.

    Raises:
        ValueError: it is missing, has another dtype or number of dimensions, or no values.
    """
    if key not in tensors:
        raise ValueError(f"{where}: {key} must be in the state dict, got none; check the prefix and the layout")
    tensor = as_tensor(where, key, tensors[key])
    if tensor.dtype not in dtypes or tensor.dim() != dims or tensor.is_meta:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{where}: {key} must be {names} with {dims} dimensions and values, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}; load it as the library stored it"
        )
    return tensor


def check_bias(where: str, bias: Tensor | np.ndarray | None, out_features: int) -> Tensor | None:
    """The bias of a layer as a tensor, or None.

    Raises:
        ValueError: the bias is not floating point [out_features], or has no values.
    """
    if bias is None:
        return None
    tensor = as_tensor(where, "bias", bias)
    if not tensor.is_floating_point() or tuple(tensor.shape) != (out_features,) or tensor.is_meta:
        raise ValueError(
            f"{where}: bias must be floating point of shape ({out_features},) with values, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}; remove it if it is not the bias of this layer"
        )
    return tensor


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a dense stream of 32-bit words: code k is at bits ``[k * bits, (k + 1) * bits)``, lowest first.

    Args:
        words: int32 [rows, at least ceil(count * bits / 32)].
        bits: 2, 3 or 4.
        count: codes in a row.

    Returns:
        uint8 [rows, count].
    """
    return unpack_bits(words.clone(memory_format=torch.contiguous_format).view(torch.uint8), count, bits)


def code_groups(where: str, group_size: int | None, in_features: int, groups: int) -> int:
    """Columns of a group; None and -1 mean a whole row.

    Raises:
        ValueError: a row of in_features columns has another number of such groups.
    """
    if group_size is None or group_size == -1:
        group_size = in_features
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"{where}: group_size must be a positive int, or -1 for a whole row, got {group_size!r}")
    if num_groups(in_features, group_size) != groups:
        raise ValueError(
            f"{where}: a row of {in_features} columns must have {num_groups(in_features, group_size)} groups of "
            f"{group_size}, got scales of {groups}; take group_size from the checkpoint's quantization_config"
        )
    return group_size


def column_order(where: str, g_idx: Tensor, group_size: int) -> Tensor | None:
    """The permutation that brings the columns of each group together, or None if they are neighbours already.

    Args:
        where: the caller; begins an error message.
        g_idx: integer [K], the group of each column. All -1 means that g_idx was never set: columns are neighbours.
        group_size: columns of each group but the last, which has the rest.

    Raises:
        ValueError: a group has another number of columns.
    """
    group = g_idx.to(torch.int64)
    wanted = torch.arange(len(group), device=group.device) // group_size
    if torch.equal(group, wanted) or bool((group == -1).all()):
        return None
    order = torch.sort(group, stable=True).indices
    wrong = group[order] != wanted
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}: each group of g_idx must have {group_size} columns, got {int(group[order][first])} as the group "
            f"of column {first} in sorted order; the format has no groups of mixed size: requantize the "
            f"dequantized weight with quantize_weight"
        )
    return order
