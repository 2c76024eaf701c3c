"""GGUF block formats that are a table of at most 16 levels for 32 or more columns.

The format holds Q4_0, IQ4_NL and MXFP4 (groups of 32) exactly, and TQ1_0 and TQ2_0 (ternary, 256 columns: two groups of
128). Q4_1 and Q4_K have a real minimum, IQ4_XS a scale of 17 significant bits. They are refused, or rounded with
exact=False. The other types have more levels, groups of 16 columns or codebooks of vectors, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...formats import ImportedWeight
from .compressed_tensors import E2M1_DOUBLED, mx_scales
from .inputs import check_bias
from .tables import pack_levels

__all__ = ["import_gguf", "undo_llama_permutation"]

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _Blocks(NamedTuple):
    """Codes [blocks, columns], then integer levels with a scale, or real levels, of each group in a block."""

    codes: np.ndarray
    levels: tuple[int, ...] | np.ndarray
    scales: np.ndarray | None


class _Layout(NamedTuple):
    bytes: int
    bits: int
    group_size: int
    read: Callable[[np.ndarray], _Blocks]


def import_gguf(
    data: np.ndarray | Tensor, qtype: Any, *, exact: bool = True, bias: np.ndarray | Tensor | None = None
) -> ImportedWeight:
    """Read one tensor of a GGUF file.

    Args:
        data: uint8 [N, bytes of a row], as ``gguf.GGUFReader`` gives it (``tensor.data``).
        qtype: ``tensor.tensor_type``, or the type's name: ``"Q4_0"``, ``"IQ4_NL"``, ``"MXFP4"``, ``"TQ1_0"``,
            ``"TQ2_0"``, ``"Q4_1"``, ``"Q4_K"`` or ``"IQ4_XS"``.
        exact: refuse levels that int8 times a float16 scale cannot hold (the last three types); False rounds them.
        bias: floating point [N], the data of the layer's ``.bias`` tensor, or None.

    Returns:
        The weight, its rows in the order of the file. For some architectures llama.cpp permutes the rows of q and k:
        see :func:`undo_llama_permutation`.

    Raises:
        ValueError: another type; a row that is no whole number of blocks; scales that are not finite; with exact,
            levels that are not held.
    """
    name = getattr(qtype, "name", qtype)
    where = f"import_gguf: {name}"
    if not isinstance(name, str) or name not in _LAYOUTS:
        found = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise ValueError(
            f"import_gguf: qtype must be one of {', '.join(_LAYOUTS)}, got {found}, which has more than 16 levels, "
            f"groups of 16 or vectors; dequantize it with gguf.quants.dequantize and requantize with quantize_weight"
        )
    layout = _LAYOUTS[name]
    raw = data.cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.size == 0 or raw.shape[1] % layout.bytes:
        raise ValueError(
            f"{where}: data must be uint8 [N, a multiple of {layout.bytes} bytes], got {raw.dtype} of shape "
            f"{raw.shape}; pass tensor.data of a gguf.GGUFReader"
        )
    rows = raw.shape[0]
    offset = check_bias(where, bias, rows)
    codes, levels, scales = layout.read(np.ascontiguousarray(raw).reshape(-1, layout.bytes))
    columns = torch.from_numpy(codes.astype(np.uint8).reshape(rows, -1))
    factors = None if scales is None else torch.from_numpy(scales.reshape(rows, -1))
    if factors is None:
        table = torch.from_numpy(np.asarray(levels).reshape(rows, -1, 2**layout.bits))
    else:
        table = torch.tensor(levels, dtype=torch.int16).expand(*factors.shape, 2**layout.bits)
    return pack_levels(
        where, columns, table, factors, bits=layout.bits, group_size=layout.group_size, exact=exact, bias=offset
    )


def undo_llama_permutation(imported: ImportedWeight, heads: int) -> ImportedWeight:
    """Reorder the rows of a q or k projection from the order of llama.cpp to that of transformers.

    RoPE rotates neighbouring entries of a head in llama.cpp, and the two halves of a head in transformers. The
    converter of llama.cpp therefore interleaves the halves of each head in ``attn_q`` and ``attn_k``, weight and bias.
    It does so for LLaMA, Mistral and similar architectures. For others (Qwen2, Gemma, Phi) llama.cpp's RoPE works on
    halves too, and the rows keep their order.

    Args:
        imported: of ``blk.*.attn_q.weight`` or ``blk.*.attn_k.weight``.
        heads: of this projection: the file's ``attention.head_count`` for q, ``attention.head_count_kv`` for k.

    Returns:
        The same weight and bias with the rows reordered, as copies.

    Raises:
        ValueError: rows that are not heads of an even number of entries.
    """
    rows = imported.weight.out_features
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise ValueError(
            f"undo_llama_permutation: heads must be an int that divides the {rows} rows into heads of an even size, "
            f"got {heads!r}; use attention.head_count of the file for q and attention.head_count_kv for k"
        )
    weight = imported.weight
    order = torch.arange(rows, device=weight.codes.device).view(heads, -1, 2).transpose(1, 2).reshape(-1)
    rows_of = {name: getattr(weight, name)[order] for name in ("codes", "levels", "scales")}
    bias = None if imported.bias is None else imported.bias[order.to(imported.bias.device)]
    return replace(imported, weight=replace(weight, **rows_of), bias=bias)


def _half(raw: np.ndarray) -> np.ndarray:
    """Two bytes a number, little-endian, as float64."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float64)


def _nibbles(raw: np.ndarray, half_group: int) -> np.ndarray:
    """Low nibbles of each half_group bytes, then their high nibbles."""
    parts = raw.reshape(len(raw), -1, 1, half_group)
    return np.concatenate((parts & 15, parts >> 4), axis=2).reshape(len(raw), -1)


def _q4_0(raw: np.ndarray) -> _Blocks:
    return _Blocks(_nibbles(raw[:, 2:], 16), tuple(range(-8, 8)), _half(raw[:, :2]))


def _iq4_nl(raw: np.ndarray) -> _Blocks:
    return _Blocks(_nibbles(raw[:, 2:], 16), _IQ4_LEVELS, _half(raw[:, :2]))


def _mxfp4(raw: np.ndarray) -> _Blocks:
    # ggml has no NaN: exponent 255 is 2**128 there.
    scales = np.where(raw[:, :1] == 255, 2.0**127, mx_scales(torch.from_numpy(raw[:, :1].copy())).numpy())
    return _Blocks(_nibbles(raw[:, 1:], 16), E2M1_DOUBLED, scales)


def _q4_1(raw: np.ndarray) -> _Blocks:
    scale, low = _half(raw[:, :2])[..., None], _half(raw[:, 2:4])[..., None]
    return _Blocks(_nibbles(raw[:, 4:], 16), scale * np.arange(16) + low, None)


def _q4_k(raw: np.ndarray) -> _Blocks:
    scale, low = _half(raw[:, :2])[..., None], _half(raw[:, 2:4])[..., None]
    # Eight pairs of 6 bits. The first four are the low bits of bytes 0..3 (scales) and 4..7 (minima). The last four
    # have their low nibbles in bytes 8..11, and their two high bits in the high bits of bytes 0..7.
    first, second, third = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1).astype(np.float64)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1).astype(np.float64)
    levels = scale * scales[..., None] * np.arange(16) - low * minima[..., None]
    return _Blocks(_nibbles(raw[:, 16:], 32), levels, None)


def _iq4_xs(raw: np.ndarray) -> _Blocks:
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2") >> np.arange(0, 16, 2) & 3
    low = (raw[:, 4:8, None] >> np.array((0, 4), np.uint8) & 15).reshape(len(raw), 8)
    return _Blocks(
        _nibbles(raw[:, 8:], 16), _IQ4_LEVELS, _half(raw[:, :2]) * ((low | high << 4).astype(np.float64) - 32)
    )


def _tq1_0(raw: np.ndarray) -> _Blocks:
    # A byte holds five ternary digits: 0 <= q < 243, stored as ceil(q * 256 / 243). Digit i is the high part of three
    # times the low byte of byte * 3**i.
    powers = np.array((1, 3, 9, 27, 81), np.uint8)[:, None]
    parts = ((raw[:, :32], 5), (raw[:, 32:48], 5), (raw[:, 48:52], 4))
    digits = [(part[:, None] * powers[:count]).reshape(len(raw), -1) for part, count in parts]
    codes = np.concatenate(digits, axis=1).astype(np.uint16) * 3 >> 8
    return _Blocks(codes, (-1, 0, 1, 2), _half(raw[:, 52:]))


def _tq2_0(raw: np.ndarray) -> _Blocks:
    shifts = np.array((0, 2, 4, 6), np.uint8)[:, None]
    codes = raw[:, :64].reshape(-1, 2, 1, 32) >> shifts & 3
    return _Blocks(codes.reshape(len(raw), -1), (-1, 0, 1, 2), _half(raw[:, 64:]))


_LAYOUTS = {
    "Q4_0": _Layout(18, 4, 32, _q4_0),
    "IQ4_NL": _Layout(18, 4, 32, _iq4_nl),
    "MXFP4": _Layout(17, 4, 32, _mxfp4),
    "TQ1_0": _Layout(54, 2, 256, _tq1_0),
    "TQ2_0": _Layout(66, 2, 256, _tq2_0),
    "Q4_1": _Layout(20, 4, 32, _q4_1),
    "Q4_K": _Layout(144, 4, 32, _q4_k),
    "IQ4_XS": _Layout(136, 4, 32, _iq4_xs),
}
