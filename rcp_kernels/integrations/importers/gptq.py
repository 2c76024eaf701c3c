"""GPTQ checkpoints: ``qweight``, ``qzeros``, ``scales``, ``g_idx`` as AutoGPTQ 0.7 and GPTQModel write them.

``qweight`` int32 [K * bits / 32, N] is a dense stream of codes along K, ``qzeros`` int32 [groups, N * bits / 32] a
dense stream along N. The lowest bits of a 32-bit word come first; 3-bit codes straddle words. With ``scales`` [groups,
N] a weight is ``scale * (code - zero)``. Version 2 (``checkpoint_format: gptq_v2``) stores the zeros. Version 1
(``gptq``) stores the zeros less 1, and the writers disagree about a zero of 0:

- GPTQModel at 2 and 4 bits, and AutoRound, subtract 1 from all codes of a 32-bit word at once. A zero of 0 becomes all
  ones and borrows from the next code: the pair (0, 8) is stored as (15, 6).
- GPTQModel at 3 bits, since April 2026, subtracts 1 from each code by itself: (0, 4) is stored as (7, 3).
- AutoGPTQ sets all bits from that code to the end of the word. The other zeros there are lost.
- GPTQModel at 3 bits, before April 2026, subtracted other constants than ones from the words.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...formats import ImportedWeight, check_bits
from ...ops.checks import FLOAT_DTYPES, check_one_of
from .inputs import check_bias, code_groups, column_order, take, unpack_words
from .tables import pack_levels

__all__ = ["import_gptq"]

_GPTQMODEL_3_BITS = (0x24924924, 0x92492492, 0x49249249)
"""GPTQModel before April 2026 subtracted these from each three words at 3 bits, instead of :func:`_ones`."""


def import_gptq(
    tensors: Mapping[str, Tensor | np.ndarray],
    prefix: str = "",
    *,
    bits: int,
    group_size: int,
    version: int = 1,
    sym: bool | None = None,
    zero_of_all_ones: int | str | None = None,
    exact: bool = True,
) -> ImportedWeight:
    """Read one layer of a GPTQ checkpoint.

    Exact for float16 scales, which are usual. The libraries round ``scale * (code - zero)`` to float16 when they
    dequantize. The imported weight is the unrounded product.

    Args:
        tensors: ``qweight`` int32 [K*bits/32, N], ``qzeros`` int32 [groups, ceil(N*bits/32)], ``scales`` [groups, N]
            float16, bfloat16 or float32 and, optional, ``g_idx`` int32 or int64 [K] and ``bias`` [N], each under
            ``prefix``; tensors or numpy arrays.
        prefix: of the layer, for example ``"model.layers.0.mlp.up_proj."``.
        bits: 2, 3 or 4.
        group_size: of the checkpoint's quantization_config; -1 for a whole row.
        version: 1 (``gptq``) or 2 (``gptq_v2``).
        sym: of the checkpoint's quantization_config. In some files the version is wrong: all zeros are those of a
            symmetric checkpoint of another version. True then reads them as that version, None refuses them, and False
            reads them as ``version`` says.
        zero_of_all_ones: how version 1 stores a zero whose code is all ones; symmetric checkpoints have none.
            ``"borrow"``: the zero is 0, and 1 is subtracted from whole words. 0: the zero is 0, and 1 is subtracted
            from each code by itself. ``2**bits``: the zero is this number, as AutoGPTQ's qlinear_cuda reads it. None:
            ``"borrow"``, but refused if AutoGPTQ may have written the codes, and with a warning at 3 bits, where
            GPTQModel writes the kind 0.
        exact: refuse scales that float16 cannot hold; False rounds them.

    Returns:
        The weight, with a ``permutation`` if g_idx is in act-order.

    Raises:
        ValueError: a tensor is missing or misshapen; ambiguous zeros, or zeros of another version; g_idx with groups of
            mixed size; a group size that the format does not have; scales that are not finite or, if exact, not held.
    """
    where = f"import_gptq: {prefix}" if prefix else "import_gptq"
    check_bits(bits)
    check_one_of(where, "version", version, (1, 2), "see checkpoint_format: gptq is 1, gptq_v2 is 2")
    check_one_of(where, "zero_of_all_ones", zero_of_all_ones, (None, "borrow", 0, 2**bits))
    qweight = take(where, tensors, prefix + "qweight", (torch.int32,), 2)
    qzeros = take(where, tensors, prefix + "qzeros", (torch.int32,), 2)
    scales = take(where, tensors, prefix + "scales", FLOAT_DTYPES, 2)
    has_order = prefix + "g_idx" in tensors
    g_idx = take(where, tensors, prefix + "g_idx", (torch.int32, torch.int64), 1) if has_order else None
    in_features, (groups, out_features) = _in_features(where, bits, qweight, qzeros, scales, g_idx), scales.shape
    group_size = code_groups(where, group_size, in_features, groups)
    zeros = _zeros(where, qzeros, bits, out_features, version, sym, zero_of_all_ones).t()
    levels = torch.arange(2**bits, dtype=torch.int16, device=zeros.device) - zeros[..., None]
    order = None if g_idx is None else column_order(where, g_idx, group_size)
    bias = check_bias(where, tensors.get(prefix + "bias"), out_features)
    codes = unpack_words(qweight.t(), bits, in_features)
    return pack_levels(
        where, codes, levels, scales.t(), bits=bits, group_size=group_size, exact=exact, permutation=order, bias=bias
    )


def _in_features(where: str, bits: int, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None) -> int:
    """The number of columns, after a check of all shapes."""
    groups, out_features = scales.shape
    in_features = qweight.shape[0] * 32 // bits
    if g_idx is not None and -(-len(g_idx) * bits // 32) == qweight.shape[0]:  # the last word may hold padding
        in_features = len(g_idx)
    for name, tensor, wanted in (
        ("qweight", qweight, (-(-in_features * bits // 32), out_features)),
        ("qzeros", qzeros, (groups, -(-out_features * bits // 32))),
        ("g_idx", g_idx, (in_features,)),
    ):
        shape = wanted if tensor is None else tuple(tensor.shape)
        if shape != wanted:
            raise ValueError(
                f"{where}: {name} must have shape {wanted} for {bits} bits and scales of shape {tuple(scales.shape)}, "
                f"got {shape}; check bits, and that the tensors belong to one layer"
            )
    return in_features


def _zeros(
    where: str,
    words: Tensor,
    bits: int,
    count: int,
    version: int,
    sym: bool | None,
    zero_of_all_ones: int | str | None,
) -> Tensor:
    """The zeros of ``qzeros``, int16 [groups, count]."""
    stored, middle = _codes(words, bits, count), 2 ** (bits - 1)
    readings = {"version=2": stored, "version=1": _codes(_add(words, _ones(bits), carry=bits == 3), bits, count)}
    if bits == 3:
        readings["version=1 of GPTQModel before April 2026"] = _codes(
            _add(words, _GPTQMODEL_3_BITS, carry=False), bits, count
        )
    label = f"version={version}"
    symmetric = [name for name, zeros in readings.items() if bool((zeros == middle).all())]
    if sym is not False and symmetric and label not in symmetric:
        if sym is None:
            raise ValueError(
                f"{where}: qzeros must not look like a symmetric checkpoint of another version, got {label} and zeros "
                f"that are all {middle} if they are read as {symmetric[0]}; pass sym=True to read them so, or "
                f"sym=False to keep to {label}"
            )
        return readings[symmetric[0]]
    if sym and not symmetric:
        raise ValueError(
            f"{where}: the zeros of a symmetric checkpoint must all be {middle}, got others in every version; pass "
            f"sym=False"
        )
    wrapped = stored == 2**bits - 1
    if version == 2 or not bool(wrapped.any()):
        return readings[label]
    if zero_of_all_ones in (0, 2**bits):
        return torch.where(wrapped, 0 if zero_of_all_ones == 0 else 2**bits, stored + 1)
    if zero_of_all_ones is None:
        group, row = (int(index) for index in wrapped.nonzero()[0])
        found = f"{2**bits - 1} in row, group {[row, group]}"
        if _may_be_spilled(words, bits, count):
            raise ValueError(
                f"{where}: a stored zero of version 1 must be below {2**bits - 1}, or have others after it in its "
                f"32-bit word that are not all ones, got {found}, which libraries read as {2**bits} or as 0; pass "
                f'zero_of_all_ones ("borrow" if the zeros after it are 1), or version=2 if the checkpoint is gptq_v2'
            )
        if bits == 3:
            warnings.warn(
                f"{where}: a stored zero of {found} is read as a 0 that borrowed from the next code, as AutoRound "
                f'writes it; pass zero_of_all_ones="borrow" to confirm that, or 0 for a checkpoint that GPTQModel '
                f"wrote since April 2026",
                stacklevel=3,
            )
    return readings[label]


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    return unpack_words(words, bits, count).to(torch.int16)


def _ones(bits: int) -> tuple[int, ...]:
    """The words of 32 codes of 1."""
    stream = sum(1 << (bits * k) for k in range(32))
    return tuple(stream >> (32 * word) & 0xFFFFFFFF for word in range(bits))


def _add(words: Tensor, constants: tuple[int, ...], carry: bool) -> Tensor:
    """int32 words plus constants that repeat along a row, modulo 2**32; ``carry`` adds a carry to the next word."""
    result = words.to(torch.int64) & 0xFFFFFFFF
    before: Tensor | None = None
    for first, constant in enumerate(constants):
        part = result[:, first :: len(constants)]
        part += constant
        if before is not None and carry:
            part += before[:, : part.shape[1]] >> 32
        before = part.clone()
        part &= 0xFFFFFFFF
    return result.to(torch.int32)


def _may_be_spilled(words: Tensor, bits: int, count: int) -> bool:
    """Whether AutoGPTQ may have written the codes of all ones: only ones follow each of them in its word.

    A zero of 0 that borrows, with zeros of 1 after it up to the end of the word, looks the same. A code of all ones
    with another code after it in the word shows that AutoGPTQ did not write the tensor.
    """
    spilled = False
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        if shift + 2 * bits > 32:
            continue  # no other code after it in the word
        rest = words[:, word::bits] >> shift  # -1 where all bits are ones
        rest = rest[:, : max(0, -(-(count - 1 - k) // 32))]  # those with a code after it
        if bool(((rest & (2**bits - 1) == 2**bits - 1) & (rest != -1)).any()):
            return False
        spilled = spilled or bool((rest == -1).any())
    return spilled
