"""Sizes of a packed weight, and its codes as a bit stream (docs/format.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "MAX_GROUP_SIZE",
    "Geometry",
    "check_bits",
    "check_group_size",
    "num_groups",
    "pack_codes",
    "row_bytes",
    "unpack_codes",
]

BITS = (2, 3, 4)
GROUP_SIZES = (32, 64, 128)
MAX_GROUP_SIZE = 2**17 - 1
"""128 * 128 * 131071 is the largest sum of 8-bit activations times levels in int32."""

# Packing needs a temporary int64 for eight codes, unpacking an index for each code. This bounds the rows of a step.
_CHUNK_WEIGHTS = 1 << 22


class Geometry(NamedTuple):
    """The sizes of a packed weight [N, K].

    Attributes:
        out_features: N.
        in_features: K.
        bits: bits a code: 2, 3 or 4.
        group_size: weights along K that share a table: 32, 64, 128 or K.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int


def check_bits(bits: int) -> int:
    """Return ``bits`` if the format has it, else raise ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits!r}; choose 2, 3 or 4 bits a code")
    return bits


def check_group_size(group_size: int, in_features: int) -> int:
    """Return ``group_size`` if the format has it for a row of ``in_features`` weights, else raise ValueError."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size not in (*GROUP_SIZES, in_features):
        raise ValueError(
            f"group_size must be one of {GROUP_SIZES} or in_features ({in_features}), got {group_size!r}; "
            f"pass in_features for one group a row"
        )
    if group_size > MAX_GROUP_SIZE:
        raise ValueError(
            f"group_size must be at most {MAX_GROUP_SIZE}, as a group's integer sum must fit int32, got {group_size}; "
            f"use {GROUP_SIZES[-1]}"
        )
    return group_size


def num_groups(in_features: int, group_size: int) -> int:
    """Groups in a row of ``in_features`` weights. The last group may be padded."""
    return -(-in_features // group_size)


def row_bytes(in_features: int, bits: int, group_size: int) -> int:
    """Bytes of codes in one row: ``in_features`` rounded up to whole groups, then to whole bytes."""
    return -(-num_groups(in_features, group_size) * group_size * bits // 8)


def row_chunks(rows: int, weights_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_WEIGHTS // max(1, weights_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pack_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Pack codes into the little-endian bit stream of the format.

    Code ``k`` of a row occupies bits ``[k * bits, (k + 1) * bits)`` of the row's stream; bit ``i`` of the stream is bit
    ``i % 8`` of byte ``i // 8``. A row is padded with code 0 to whole groups and then with zero bits to whole bytes.

    Args:
        codes: uint8 [N, K], each below ``2**bits``.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.

    Returns:
        uint8 [N, ceil(ceil(K / group_size) * group_size * bits / 8)].

    Raises:
        TypeError: codes are not uint8.
        ValueError: wrong shape, bits or group size, or a code of ``2**bits`` or more.
    """
    check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(
            f"pack_codes: codes must be uint8, one code a byte, got {codes.dtype}; convert with .to(torch.uint8)"
        )
    if codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(
            f"pack_codes: codes must be [N, K] with K >= 1, got shape {tuple(codes.shape)}; reshape to two dims"
        )
    rows, in_features = codes.shape
    check_group_size(group_size, in_features)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(
            f"pack_codes: codes of {bits} bits must be below {2**bits}, got {int(codes.max())}; use more bits or fewer "
            f"levels"
        )
    width = row_bytes(in_features, bits, group_size)
    packed = torch.empty((rows, width), dtype=torch.uint8, device=codes.device)
    # Eight codes are `bits` whole bytes for every width of the format.
    blocks = -(-width // bits)
    for chunk in row_chunks(rows, in_features):
        part = torch.nn.functional.pad(codes[chunk], (0, blocks * 8 - in_features)).view(-1, blocks, 8)
        word = torch.zeros(part.shape[:2], dtype=torch.int64, device=codes.device)
        for k in range(8):
            word |= part[:, :, k].to(torch.int64) << (bits * k)
        stream = torch.stack([(word >> (8 * j)).to(torch.uint8) for j in range(bits)], dim=-1)
        packed[chunk] = stream.view(-1, blocks * bits)[:, :width]
    return packed


def unpack_codes(packed: Tensor, in_features: int, bits: int, group_size: int) -> Tensor:
    """Undo :func:`pack_codes`; padding is dropped.

    Args:
        packed: uint8 [N, ceil(ceil(K / group_size) * group_size * bits / 8)].
        in_features: K.
        bits: 2, 3 or 4.
        group_size: 32, 64, 128 or K.

    Returns:
        uint8 [N, K], one code a byte.

    Raises:
        TypeError: packed is not uint8.
        ValueError: wrong shape, bits or group size.
    """
    check_bits(bits)
    check_group_size(group_size, in_features)
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack_codes: packed codes must be uint8, got {packed.dtype}; pass the output of pack_codes")
    width = row_bytes(in_features, bits, group_size)
    if packed.dim() != 2 or packed.shape[1] != width:
        raise ValueError(
            f"unpack_codes: {in_features} codes of {bits} bits in groups of {group_size} take {width} bytes a row, got "
            f"shape {tuple(packed.shape)}; the codes are truncated or belong to other bits, group_size or in_features"
        )
    codes = torch.empty((packed.shape[0], in_features), dtype=torch.uint8, device=packed.device)
    for chunk in row_chunks(packed.shape[0], in_features):
        codes[chunk] = unpack_bits(packed[chunk], in_features, bits)
    return codes


def unpack_bits(packed: Tensor, in_features: int, bits: int) -> Tensor:
    rows, width = packed.shape
    blocks = -(-width // bits)
    stream = torch.nn.functional.pad(packed, (0, blocks * bits - width)).view(rows, blocks, bits).to(torch.int32)
    codes = []
    for k in range(8):
        byte, shift = divmod(bits * k, 8)
        code = stream[:, :, byte] >> shift
        if shift + bits > 8:  # a 3-bit code may straddle two bytes
            code = code | (stream[:, :, byte + 1] << (8 - shift))
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=-1).view(rows, blocks * 8)[:, :in_features]
