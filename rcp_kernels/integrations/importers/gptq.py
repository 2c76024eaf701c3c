"""GPTQ checkpoints: ``qweight``, ``qzeros``, ``scales``, ``g_idx`` as AutoGPTQ 0.7 and GPTQModel write them.

Both streams of codes are dense, lowest bits of a 32-bit word first, 3-bit codes straddling words: ``qweight`` int32
[K * bits / 32, N] runs along K, ``qzeros`` int32 [groups, N * bits / 32] along N. With ``scales`` [groups, N] a weight
is ``scale * (code - zero)``. Version 1 (``checkpoint_format: gptq``) stores ``zero - 1``, version 2 (``gptq_v2``) the
zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...formats import check_bits
from .tables import ImportedWeight, code_groups, column_order, pack_grid, take, unpack_words

__all__ = ["import_gptq"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def import_gptq(
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    *,
    bits: int,
    group_size: int,
    version: int = 1,
    zero_of_all_ones: int | None = None,
    exact: bool = True,
) -> ImportedWeight:
    """Read one layer of a GPTQ checkpoint.

    Exact for float16 scales, the usual ones. The libraries round ``scale * (code - zero)`` to float16 when they
    dequantize; the imported weight is the unrounded product.

    Args:
        tensors: ``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [groups, ceil(N*bits/32)], ``scales`` [groups, N]
            float16, bfloat16 or float32 and, optional, ``g_idx`` int32 or int64 [K], each under ``prefix``.
        prefix: of the layer, ``"model.layers.0.mlp.up_proj."`` say.
        bits: 2, 3 or 4.
        group_size: of the checkpoint's quantization_config; -1 for a whole row.
        version: 1 (``gptq``) or 2 (``gptq_v2``).
        zero_of_all_ones: what a version 1 zero of all ones means: ``2**bits`` (AutoGPTQ's qlinear_cuda adds 1) or 0
            (its qlinear_cuda_old adds 1 and wraps). Refused without, since the libraries disagree; symmetric
            checkpoints have none.
        exact: refuse scales that float16 cannot hold, instead of rounding them.

    Returns:
        The weight; with a ``permutation`` where g_idx is in act-order.

    Raises:
        ValueError: a tensor is missing or misshapen; an ambiguous zero; g_idx with groups of mixed size; a group size
            that the format cannot express; scales that are not finite or, if exact, not held.
    """
    where = f"import_gptq: {prefix}" if prefix else "import_gptq"
    check_bits(bits)
    if version not in (1, 2):
        raise ValueError(f"{where}: version must be 1 (gptq) or 2 (gptq_v2), got {version!r}; see checkpoint_format")
    if zero_of_all_ones not in (None, 0, 2**bits):
        raise ValueError(
            f"{where}: zero_of_all_ones must be None, 0 or {2**bits}, got {zero_of_all_ones!r}; choose one"
        )
    qweight = take(where, tensors, prefix + "qweight", (torch.int32,), 2)
    qzeros = take(where, tensors, prefix + "qzeros", (torch.int32,), 2)
    scales = take(where, tensors, prefix + "scales", _FLOATS, 2)
    groups, out_features = scales.shape
    in_features = qweight.shape[0] * 32 // bits
    g_idx = None
    if prefix + "g_idx" in tensors:
        g_idx = take(where, tensors, prefix + "g_idx", (torch.int32, torch.int64), 1)
        if -(-len(g_idx) * bits // 32) == qweight.shape[0]:  # the last word may hold padding
            in_features = len(g_idx)
    rules = {
        "qweight": (tuple(qweight.shape), (-(-in_features * bits // 32), out_features)),
        "qzeros": (tuple(qzeros.shape), (groups, -(-out_features * bits // 32))),
        "g_idx": ((in_features,) if g_idx is None else tuple(g_idx.shape), (in_features,)),
    }
    for name, (shape, wanted) in rules.items():
        if shape != wanted:
            raise ValueError(
                f"{where}: {name} must have shape {wanted} for {bits} bits and scales of shape {tuple(scales.shape)}, "
                f"got {shape}; check bits, and that the tensors belong to one layer"
            )
    group_size = code_groups(where, group_size, in_features, groups)
    codes = unpack_words(qweight.t(), bits, in_features)
    zeros = unpack_words(qzeros, bits, out_features).t().to(torch.int16)
    if version == 1:
        zeros = zeros + 1
        wrapped = zeros == 2**bits
        if zero_of_all_ones is None and bool(wrapped.any()):
            raise ValueError(
                f"{where}: a stored zero of version 1 must be below {2**bits - 1}, got {2**bits - 1} in row, group "
                f"{wrapped.nonzero()[0].tolist()}, which libraries read as {2**bits} or as 0; say which by "
                f"zero_of_all_ones, or pass version=2 if the checkpoint is gptq_v2"
            )
        if zero_of_all_ones == 0:
            zeros = torch.where(wrapped, 0, zeros)
    levels = torch.arange(2**bits, dtype=torch.int16, device=zeros.device) - zeros[..., None]
    order = None if g_idx is None else column_order(where, g_idx, group_size)
    return pack_grid(where, codes, levels, scales.t(), bits=bits, group_size=group_size, exact=exact, permutation=order)
