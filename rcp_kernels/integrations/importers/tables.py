"""Tables of levels from elsewhere into :class:`PackedWeight`, exactly where int8 levels and float16 scales allow it.

An importer reads a layout into codes, one a byte, and either integer levels with a scale a group (a grid) or real
levels (a table). A group is held exactly if integers L in [-127, 127] and a number s of at most 11 significant bits
exist with ``level = s * L``, and float16 reaches from the smallest to the largest such s of the tensor. That is decided
here, not assumed; what does not fit is refused, or rounded with the error measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...formats import GROUP_SIZES, LEVEL_MAX, PackedWeight, check_bits, num_groups

__all__ = [
    "ImportedWeight",
    "as_tensor",
    "check_bias",
    "code_groups",
    "column_order",
    "pack_grid",
    "pack_tables",
    "take",
    "take_bias",
    "unpack_words",
]

# Rows are done a few at a time: a table entry takes some 60 bytes of temporaries.
_CHUNK_ENTRIES = 1 << 18
_SIGNIFICANT_BITS = 11  # of a float16
_LARGEST_SCALE_EXPONENT = 7  # as formats.snap_levels: the largest scale lies in [2**7, 2**8) where that is exact


@dataclass(frozen=True)
class ImportedWeight:
    """A weight read from another library's layout.

    Attributes:
        weight: in format version 1.
        error: largest distance of a weight from its source, relative to the largest one of its group (of an integer
            grid: the largest level). 0.0: every value is the source's.
        permutation: int64 [K] or None. With one, the groups of the source are no neighbours (act-order): ``weight`` is
            for reordered inputs, ``x[..., permutation]``. :meth:`rcp_kernels.QuantLinear.from_imported` makes a layer
            that reorders its input.
        bias: floating point [N] or None.
    """

    weight: PackedWeight
    error: float
    permutation: Tensor | None = None
    bias: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weight as float32 [N, K], its columns in the order of the source."""
        weight = self.weight.dequantize()
        if self.permutation is None:
            return weight
        source = torch.empty_like(weight)
        source[:, self.permutation] = weight
        return source


# torch.load(weights_only=True), the default, builds only classes that it was told of.
torch.serialization.add_safe_globals([ImportedWeight])


def as_tensor(where: str, name: str, value: Tensor | np.ndarray) -> Tensor:
    """A tensor as it is, or a numpy array as a tensor.

    Raises:
        ValueError: neither, or an array whose dtype torch does not have.
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
    """The tensor under a key, or the numpy array as a tensor.

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


def take_bias(where: str, tensors: Mapping[str, Tensor | np.ndarray], prefix: str, out_features: int) -> Tensor | None:
    """``bias`` beside a layer's tensors, as :func:`check_bias` wants it; None where there is none."""
    return check_bias(where, tensors.get(prefix + "bias"), out_features)


def check_bias(where: str, bias: Tensor | np.ndarray | None, out_features: int) -> Tensor | None:
    """A bias as a tensor, or None.

    Raises:
        ValueError: it is not floating point [out_features], or has no values.
    """
    if bias is None:
        return None
    tensor = as_tensor(where, "bias", bias)
    if not tensor.is_floating_point() or tuple(tensor.shape) != (out_features,) or tensor.is_meta:
        raise ValueError(
            f"{where}: bias must be floating point of shape ({out_features},) with values, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} on {tensor.device}; take the bias of the same layer out if it is none"
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
    blocks = -(-count // 32)  # 32 codes are `bits` whole words
    stream = words.to(torch.int64) & 0xFFFFFFFF
    stream = torch.nn.functional.pad(stream[:, : blocks * bits], (0, max(0, blocks * bits - words.shape[1])))
    stream = stream.view(-1, blocks, bits)
    codes = torch.empty((words.shape[0], blocks, 32), dtype=torch.uint8, device=words.device)
    for k in range(32):
        word, shift = divmod(k * bits, 32)
        code = stream[:, :, word] >> shift
        if shift + bits > 32:
            code = code | (stream[:, :, word + 1] << (32 - shift))
        codes[:, :, k] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.view(-1, blocks * 32)[:, :count]


def code_groups(where: str, group_size: int | None, in_features: int, groups: int) -> int:
    """Columns of a group, where None or -1 stand for a whole row.

    Raises:
        ValueError: rows of in_features columns have another number of such groups.
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
    """The order of the columns in which the groups of ``g_idx`` are neighbours; None where they are already.

    Args:
        g_idx: integer [K], the group of each column. -1 in all of them stands for a g_idx that was never set: the
            groups are neighbours.

    Raises:
        ValueError: a group has not group_size columns (the last one: what is left).
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
            f"of column {first} in sorted order; groups of mixed size have no place in the format: requantize the "
            f"dequantized weight with quantize_weight"
        )
    return order


def pack_grid(
    where: str,
    codes: Tensor,
    levels: Tensor,
    scales: Tensor,
    *,
    bits: int,
    group_size: int,
    exact: bool,
    permutation: Tensor | None = None,
    bias: Tensor | None = None,
) -> ImportedWeight:
    """Integer levels times a scale a group: ``value = scales[n, g] * levels[n, g, code]``.

    Args:
        where: what an error message begins with.
        codes: uint8 [N, K], each below 2**bits.
        levels: integer [N, groups, 2**bits] in [-127, 127], in any order.
        scales: floating point [N, groups], of any sign.
        bits: 2, 3 or 4.
        group_size: of the source: 32, K, or a multiple of 32 (stored as groups of 128, 64 or 32 then).
        exact: refuse scales that float16 cannot hold; else round them.
        permutation, bias: handed on.

    Raises:
        ValueError: scales that are not finite or, if exact, not held; a group size that the format cannot express.
    """
    return _pack(where, codes, levels, scales, bits, group_size, exact, permutation, bias)


def pack_tables(
    where: str,
    codes: Tensor,
    values: Tensor,
    *,
    bits: int,
    group_size: int,
    exact: bool,
    bias: Tensor | None = None,
) -> ImportedWeight:
    """Real levels: ``value = values[n, g, code]``.

    A group is stored exactly where that is possible, else (exact=False) as ``formats.snap_levels`` would: an error of
    at most 1/254 + 2**-11 of the group's largest level.

    Args:
        values: floating point [N, groups, 2**bits], in any order. The others: as :func:`pack_grid`.

    Raises:
        ValueError: values that are not finite or, if exact, not held; a group size that the format cannot express.
    """
    return _pack(where, codes, values, None, bits, group_size, exact, None, bias)


def _pack(
    where: str,
    codes: Tensor,
    levels: Tensor,
    scales: Tensor | None,
    bits: int,
    group_size: int,
    exact: bool,
    permutation: Tensor | None,
    bias: Tensor | None,
) -> ImportedWeight:
    check_bits(bits)
    rows, in_features = codes.shape
    stored_size = _stored_group_size(where, group_size, in_features)
    for name, tensor in (("levels", levels), ("scales", scales)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ValueError(
                f"{where}: {name} must be finite, got {tensor[tuple(index)]} at {index}; the file is damaged"
            )
    if stored_size != group_size:  # a long group becomes several with the same table
        source = torch.arange(num_groups(in_features, stored_size), device=levels.device) * stored_size // group_size
        levels, scales = levels[:, source], None if scales is None else scales[:, source]
    table = _Table(levels, scales)
    entries = table.shape[2]
    if permutation is not None:
        codes = codes[:, permutation.to(codes.device)]
    first_entry = (torch.arange(in_features, device=codes.device) // stored_size * entries).to(torch.int64)
    out_codes = torch.empty_like(codes)
    out_levels = np.empty(table.shape, np.int8)
    out_scales = np.empty(table.shape[:2], np.float64)
    tables: list[np.ndarray] = []  # the levels that are to be met, where they are not integers times a scale
    chunks = [slice(start, start + table.step) for start in range(0, rows, table.step)]
    for chunk in chunks:
        values, integers, factors = table.read(chunk)
        order = np.argsort(values, axis=-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(entries), order.shape), axis=-1)
        lookup = torch.from_numpy(rank.reshape(len(rank), -1)).to(codes.device)
        out_codes[chunk] = lookup.gather(1, codes[chunk].to(torch.int64) + first_entry).to(torch.uint8)
        entry = out_codes[chunk].to(torch.int64) + first_entry
        used = torch.zeros_like(lookup).scatter_(1, entry, 1).cpu().numpy().astype(bool).reshape(order.shape)
        values = np.take_along_axis(values, order, axis=-1)
        if integers is None or factors is None:
            values = _only_used(values, used)
            integers, factors = _integer_levels(values)
            tables.append(values)
        else:
            # A group of nothing but zeros may have any scale: MXFP4's is 2**-127, which would leave no room for others.
            zero = ~(used & (values != 0)).any(axis=-1)
            integers = np.where(zero[..., None], 0.0, np.take_along_axis(integers, order, axis=-1))
            factors = np.where(zero, 0.0, factors)
        out_levels[chunk], out_scales[chunk] = integers, factors
    exponent = _tensor_exponent(out_scales)
    # Clamped: a scale that is to be rounded may round to more than float16 has.
    stored = np.ldexp(out_scales, -exponent).clip(max=65504.0).astype(np.float16)
    worst, place = 0.0, (0, 0)
    for i, chunk in enumerate(chunks):
        values = tables[i] if tables else out_levels[chunk] * out_scales[chunk, :, None]
        held = np.ldexp(stored[chunk].astype(np.float64), exponent)[..., None] * out_levels[chunk]
        largest = np.abs(values).max(axis=-1)
        error = np.abs(held - values).max(axis=-1) / np.where(largest > 0, largest, 1.0)
        if error.size and float(error.max()) > worst:
            worst = float(error.max())
            row, group = np.unravel_index(int(error.argmax()), error.shape)
            place = (chunk.start + int(row), int(group))
    if exact and worst > 0.0:
        raise ValueError(
            f"{where}: every level must be an integer in [-127, 127] times a float16 scale to be held exactly, got an "
            f"error of {worst:.2g} of the group's largest level in row, group {place}; pass exact=False to round"
        )
    weight = PackedWeight.pack(
        out_codes,
        torch.from_numpy(out_levels).to(codes.device),
        torch.from_numpy(stored).to(codes.device),
        math.ldexp(1.0, exponent),
        bits=bits,
        group_size=stored_size,
    )
    return ImportedWeight(weight, worst, permutation, bias)


class _Table:
    """Levels and scales in float64, a few rows at a time."""

    def __init__(self, levels: Tensor, scales: Tensor | None) -> None:
        self.levels, self.scales = levels, scales
        self.shape: tuple[int, int, int] = (levels.shape[0], levels.shape[1], levels.shape[2])
        self.step = max(1, _CHUNK_ENTRIES // max(1, levels.shape[1] * levels.shape[2]))

    def read(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Values, and for a grid its integers and its scales, which are made positive."""
        levels = self.levels[rows].to(torch.float64).cpu().numpy()
        if self.scales is None:
            return levels, None, None
        scales = self.scales[rows].to(torch.float64).cpu().numpy()
        levels = np.where(scales[..., None] < 0, -levels, levels)
        scales = np.abs(scales)
        # A scale of 0 leaves the table without an order of its own: zeros are as good, and ascending.
        levels = np.where(scales[..., None] == 0, 0.0, levels)
        return levels * scales[..., None], levels, scales


def _stored_group_size(where: str, group_size: int, in_features: int) -> int:
    if group_size in GROUP_SIZES or group_size == in_features:
        return group_size
    for size in reversed(GROUP_SIZES):
        if group_size % size == 0:
            return size
    raise ValueError(
        f"{where}: group_size must be in_features ({in_features}) or a multiple of {GROUP_SIZES[0]}, got {group_size}; "
        f"the format has no smaller groups: requantize the dequantized weight with quantize_weight"
    )


def _only_used(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Sorted levels, those that no weight uses replaced by a neighbour: they need not be held."""
    source = np.maximum.accumulate(np.where(used, np.arange(values.shape[-1]), -1), axis=-1)
    source = np.where(source < 0, used.argmax(axis=-1)[..., None], source)
    return np.take_along_axis(values, source, axis=-1)


def _integer_levels(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and a scale for sorted levels [R, groups, L]: without error where that is possible, else nearest.

    With the levels as integers m in units of a common power of two and g their greatest common divisor, the possible
    scales are g / d for the divisors d of g: the fewest d is searched that leaves 11 significant bits.
    """
    largest = np.abs(values).max(axis=-1)
    unit = np.frexp(largest)[1] - 53  # |m| < 2**53
    m = np.ldexp(values, -unit[..., None])
    # Not an integer: the levels span more than float64 can put on one lattice.
    open_ = (m == np.rint(m)).all(axis=-1) & (largest > 0)
    whole = np.where(open_[..., None], m, 0.0).astype(np.int64)
    divisor = np.gcd.reduce(np.abs(whole), axis=-1)
    ratio = whole // np.maximum(divisor, 1)[..., None]
    span = np.abs(ratio).max(axis=-1)
    scales = largest / LEVEL_MAX
    levels = np.rint(values / np.where(largest > 0, largest, 1.0)[..., None] * LEVEL_MAX)
    for d in range(1, LEVEL_MAX + 1):
        open_ &= span * d <= LEVEL_MAX
        if not open_.any():
            break
        factor = divisor // d
        odd = factor // np.maximum(factor & -factor, 1)
        fits = open_ & (divisor % d == 0) & (odd < 2**_SIGNIFICANT_BITS)
        scales = np.where(fits, np.ldexp(factor.astype(np.float64), unit), scales)
        levels = np.where(fits[..., None], ratio * d, levels)
        open_ &= ~fits
    return levels, scales


def _tensor_exponent(scales: np.ndarray) -> int:
    """The power of two that leaves in float16 all the scales that fit there, with the largest one in [128, 256) if it
    may be."""
    positive = scales[scales > 0]
    if not positive.size:
        return 0
    mantissa, exponent = np.frexp(positive)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    lowest_bit = np.frexp((whole & -whole).astype(np.float64))[1] - 1 + exponent - 53
    short = exponent - lowest_bit <= _SIGNIFICANT_BITS
    largest = int(exponent.max()) - 1
    wanted = largest - _LARGEST_SCALE_EXPONENT
    if short.any():  # float16's lowest bit is 2**-24, its largest exponent 15
        wanted = min(wanted, int(lowest_bit[short].min()) + 24)
    return min(max(wanted, largest - 15, -126), 127)
