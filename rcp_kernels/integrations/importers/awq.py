"""AWQ checkpoints in the GEMM layout: ``qweight``, ``qzeros``, ``scales`` as AutoAWQ writes them, 4 bits.

A 32-bit word holds eight neighbours along N. Its nibble i is column ``(0, 2, 4, 6, 1, 3, 5, 7)[i]``. ``qweight`` is
int32 [K, N / 8], ``qzeros`` int32 [groups, N / 8]. A weight is ``scale * (code - zero)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...formats import ImportedWeight
from ...ops.checks import FLOAT_DTYPES
from .inputs import check_bias, code_groups, take, unpack_words
from .tables import pack_levels

__all__ = ["import_awq"]

_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def import_awq(
    tensors: Mapping[str, Tensor | np.ndarray], prefix: str = "", *, group_size: int, exact: bool = True
) -> ImportedWeight:
    """Read one layer of an AWQ checkpoint of ``version: gemm``.

    Exact for float16 scales, which are usual. AutoAWQ rounds ``scale * (code - zero)`` to float16 when it dequantizes.
    The imported weight is the unrounded product.

    Args:
        tensors: ``qweight`` int32 [K, N/8], ``qzeros`` int32 [groups, N/8] and ``scales`` [groups, N] float16, bfloat16
            or float32 and, optional, ``bias`` [N], each under ``prefix``; tensors or numpy arrays.
        prefix: of the layer, for example ``"model.layers.0.mlp.up_proj."``.
        group_size: of the checkpoint's quantization_config; -1 for a whole row.
        exact: refuse scales that float16 cannot hold; False rounds them.

    Raises:
        ValueError: a tensor is missing or misshapen; a group size that the format does not have; scales that are not
            finite or, if exact, not held.
    """
    where = f"import_awq: {prefix}" if prefix else "import_awq"
    qweight = take(where, tensors, prefix + "qweight", (torch.int32,), 2)
    qzeros = take(where, tensors, prefix + "qzeros", (torch.int32,), 2)
    scales = take(where, tensors, prefix + "scales", FLOAT_DTYPES, 2)
    in_features = qweight.shape[0]
    groups, out_features = scales.shape
    for name, shape, wanted in (
        ("qweight", tuple(qweight.shape), (in_features, out_features // 8)),
        ("qzeros", tuple(qzeros.shape), (groups, out_features // 8)),
    ):
        if shape != wanted or out_features % 8:
            raise ValueError(
                f"{where}: {name} must have shape {wanted} for scales of shape {tuple(scales.shape)}, got {shape}; "
                f"only the GEMM layout is read, not GEMV, and only 4 bits"
            )
    group_size = code_groups(where, group_size, in_features, groups)
    codes = _columns(qweight)
    zeros = _columns(qzeros).to(torch.int16)
    levels = torch.arange(16, dtype=torch.int16, device=zeros.device) - zeros[..., None]
    bias = check_bias(where, tensors.get(prefix + "bias"), out_features)
    return pack_levels(where, codes, levels, scales.t(), bits=4, group_size=group_size, exact=exact, bias=bias)


def _columns(words: Tensor) -> Tensor:
    """int32 [rows, N/8] -> uint8 [N, rows]."""
    nibbles = unpack_words(words, 4, words.shape[1] * 8).view(words.shape[0], -1, 8)
    return nibbles[:, :, list(_NIBBLE_OF_COLUMN)].reshape(words.shape[0], -1).t().contiguous()
