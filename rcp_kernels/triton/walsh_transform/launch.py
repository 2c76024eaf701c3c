"""The two kernels, the checks of their arguments, and the operators."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.checks import check_clip, check_float, check_one_of
from ..runtime import has_tensor_cores, on_device_of
from .butterflies import power_of_two_tile
from .dense_factor import dense_tile, output_place
from .quantize import largest_magnitude, scale_and_inverse, store_quantized
from .tile_choice import LARGEST, Tile, fits_one_tile, tile_config


@triton.jit
def _rounded(y, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and DTYPE == tl.bfloat16:
        # GPUs round to nearest even. Triton's interpreter truncates.
        bits = y.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(y == y, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = y.to(DTYPE)
    return y


@triton.jit
def _transformed_tile(x_ptr, base_ptr, permutation_ptr, block, rows, scale, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """The transform of the first `rows` rows at x_ptr, in the tile's order: see :func:`output_place`."""
    if TILE.m == 1:
        y = power_of_two_tile(x_ptr, rows, TILE)
    else:
        y = dense_tile(x_ptr, base_ptr, permutation_ptr, block, rows, TILE)
    return _rounded(y * scale, DTYPE, TILE.interpreted)


@triton.jit(do_not_specialize=["rows"])
def _transform_kernel(x_ptr, y_ptr, base_ptr, permutation_ptr, rows, scale, TILE: tl.constexpr):
    """Transforms one tile: some rows, or some columns of a row."""
    first = (tl.program_id(0) // TILE.blocks).to(tl.int64) * TILE.rows
    block = tl.program_id(0) % TILE.blocks
    left = tl.minimum(rows - first, TILE.rows).to(tl.int32)
    x_ptr += first * TILE.n
    y = _transformed_tile(x_ptr, base_ptr, permutation_ptr, block, left, scale, y_ptr.dtype.element_ty, TILE)
    row = tl.arange(0, TILE.rows)[:, None, None]
    place, exists = output_place(permutation_ptr, block, TILE)
    target = row * TILE.n + place[None, :, :]
    tl.store(y_ptr + first * TILE.n + target, y, mask=(row < left) & exists[None, :, :])


@triton.jit
def _quantize_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    base_ptr,
    permutation_ptr,
    scale,
    clip,
    GROUPS: tl.constexpr,
    QMAX: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Transforms and quantizes one token of GROUPS transforms. Each is transformed twice if they need several tiles."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(0)
    x_ptr += token.to(tl.int64) * (GROUPS * TILE.n)
    start = token.to(tl.int64) * ((GROUPS * TILE.n + PACKED) // (1 + PACKED))
    if TILE.rows >= GROUPS:
        y = _transformed_tile(x_ptr, base_ptr, permutation_ptr, 0, GROUPS, scale, DTYPE, TILE)
        token_scale, inverse = scale_and_inverse(largest_magnitude(y, TILE), clip, QMAX)
        store_quantized(y, inverse, q_ptr, start, permutation_ptr, GROUPS, GROUPS, QMAX, PACKED, TILE)
    else:
        largest = tl.full((), 0, tl.int32)
        for first in range(0, GROUPS, TILE.rows):
            y = _transformed_tile(
                x_ptr + first * TILE.n, base_ptr, permutation_ptr, 0, GROUPS - first, scale, DTYPE, TILE
            )
            largest = tl.maximum(largest, largest_magnitude(y, TILE))
        token_scale, inverse = scale_and_inverse(largest, clip, QMAX)
        for first in range(0, GROUPS, TILE.rows):
            y = _transformed_tile(
                x_ptr + first * TILE.n, base_ptr, permutation_ptr, 0, GROUPS - first, scale, DTYPE, TILE
            )
            there = start + first * TILE.n // (1 + PACKED)
            store_quantized(y, inverse, q_ptr, there, permutation_ptr, GROUPS - first, GROUPS, QMAX, PACKED, TILE)
    tl.store(scale_ptr + token, token_scale)


def _checked(
    name: str, x: Tensor, base: Tensor | None, permutation: Tensor | None, group_size: int
) -> tuple[int, Tensor, Tensor]:
    """The order m of the dense factor, base and permutation. x stands for a base or permutation that is None."""
    check_float(name, "x", x)
    if x.dim() < 1 or group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(
            f"{name}: group_size must divide the last dimension of x, got group_size {group_size} and shape "
            f"{tuple(x.shape)}; choose a divisor"
        )
    if base is not None and (
        base.dtype != torch.float32 or base.dim() != 2 or base.shape[0] != base.shape[1] or base.device != x.device
    ):
        raise ValueError(
            f"{name}: base must be a square float32 matrix on {x.device}, got {base.dtype} {tuple(base.shape)} on "
            f"{base.device}; convert it first"
        )
    m = 1 if base is None else base.shape[0]
    c = group_size // m
    if group_size != m * c or c & (c - 1) or group_size > LARGEST:
        raise ValueError(
            f"{name}: group_size must be a power of two times {m}, the order of base, and at most {LARGEST}, got "
            f"{group_size}; choose a smaller one"
        )
    if permutation is not None and (
        permutation.dtype != torch.int32 or permutation.shape != (group_size,) or permutation.device != x.device
    ):
        raise ValueError(
            f"{name}: permutation must be int32 [{group_size}] on {x.device}, got {permutation.dtype} "
            f"{tuple(permutation.shape)} on {permutation.device}; convert it first"
        )
    return m, x if base is None else base.contiguous(), x if permutation is None else permutation.contiguous()


def _launch(x: Tensor, y: Tensor, base: Tensor, permutation: Tensor, rows: int, scale: float, tile: Tile) -> None:
    with on_device_of(x):
        _transform_kernel[(triton.cdiv(rows, tile.rows) * tile.blocks,)](
            x, y, base, permutation, rows, scale, TILE=tile, **tile.options
        )


def _transform_into(
    y: Tensor, x: Tensor, base: Tensor | None, permutation: Tensor | None, n: int, scale: float, inverse: bool
) -> None:
    m, base_argument, permutation_argument = _checked("walsh_transform", x, base, permutation, n)
    if x.numel() == 0:
        return
    sequency = permutation is not None
    rows = x.numel() // n
    arguments = (base_argument, permutation_argument)
    cores = has_tensor_cores(x.device)
    if fits_one_tile(n, m):
        _launch(x, y, *arguments, rows, scale, tile_config(n, x.dtype, m, 0, sequency, inverse, cores))
        return
    between = torch.empty_like(x, dtype=torch.float32)
    # The butterflies' sequency order is the order of columns that the dense factor's tile expects.
    butterflies = tile_config(n // m, torch.float32, sequency=sequency)
    dense = tile_config(n, torch.float32 if not inverse else x.dtype, m, 0, sequency, inverse, cores)
    if inverse:
        _launch(x, between, *arguments, rows, 1.0, dense)
        _launch(between, y, *arguments, rows * m, scale, butterflies)
    else:
        _launch(x, between, *arguments, rows * m, 1.0, butterflies)
        _launch(between, y, *arguments, rows, scale, dense)


def walsh_transform(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
) -> Tensor:
    """``rcp_kernels::walsh_transform`` on CUDA: the transform of every group_size values along the last dimension.

    Args:
        x: float32, float16 or bfloat16 [..., K], any strides. group_size divides K.
        base: float32 [m, m] of +-1 for group_size = m * 2^k, or None for m = 1.
        permutation: None for natural order. For sequency order the int32 [group_size] of ``sequency_permutation``; no
            other permutation works, because powers of two do not read it and m * 2^k reads its first 2 m entries.
        group_size: at most 32768. One kernel reads and writes x once if 2^k is at most 512 and 2^k times m, rounded up
            to a power of two, is at most 16384. Other sizes with m > 1, all above 8192, take two kernels with a float32
            tensor between them.
        scale: multiplies the float32 result before it is rounded.
        inverse: the transpose instead. The transform of a power of two is symmetric.

    Returns:
        [..., K], contiguous, in the dtype of x.

    Raises:
        ValueError: another dtype, group_size, base or permutation.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    _transform_into(y, x, base, permutation, group_size, scale, inverse)
    return y


def walsh_transform_(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
) -> None:
    """``rcp_kernels::walsh_transform_`` on CUDA: :func:`walsh_transform` into x itself, which must be contiguous.

    A block of threads reads everything that it will overwrite before it writes, so there is no second tensor.
    """
    if not x.is_contiguous():
        raise ValueError(
            f"walsh_transform_: x must be contiguous to be overwritten, got strides {x.stride()}; pass inplace=False"
        )
    _transform_into(x, x, base, permutation, group_size, scale, inverse)


def walsh_quantize(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
    bits: int,
    clip: float = 1.0,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """``rcp_kernels::walsh_quantize`` on CUDA: quantize_activation of :func:`walsh_transform`, bit for bit.

    It is one kernel, with three exceptions for m > 1: the transform takes two kernels, a token has more transforms than
    a tile, or values are packed in sequency order, where neighbours do not meet in a thread. The quantization then is
    one more kernel.

    Args:
        x, base, permutation, group_size, scale, inverse: as for :func:`walsh_transform`. A token is a vector along the
            last dimension with all its groups.
        bits, clip, packed: as for ``quantize_activation``.

    Returns:
        q, int8 [..., K] or, packed, uint8 [..., ceil(K / 2)]; and scale, float32 [...]. A token that holds NaN or Inf,
        or whose transform overflows the dtype of x, has scale NaN and q = 0, where the CPU raises.

    Raises:
        ValueError: as :func:`walsh_transform`; or other bits or clip, or packed with 8 bits.
    """
    check_one_of("walsh_quantize", "bits", bits, (4, 8))
    check_clip("walsh_quantize", clip)
    if packed and bits != 4:
        raise ValueError(f"walsh_quantize: packed storage is for 4 bits, got bits={bits}; pass packed=False")
    m, base_argument, permutation_argument = _checked("walsh_quantize", x, base, permutation, group_size)
    size = x.shape[-1]
    groups = size // group_size
    cores = has_tensor_cores(x.device)
    tile = tile_config(group_size, x.dtype, m, groups, permutation is not None, inverse, cores)
    if m > 1 and (groups > tile.rows or not tile.chunks or (packed and tile.interleaved)):
        x = walsh_transform(x, base, permutation, group_size, scale, inverse)
        # Transforms of size 1 remain, to be quantized.
        groups, scale = size, 1.0
        tile = tile_config(1, x.dtype, 1, groups, sequency=False)
    x = x.contiguous()
    if packed:
        q = x.new_empty((*x.shape[:-1], (size + 1) // 2), dtype=torch.uint8)
    else:
        q = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel() == 0:
        return q, scales.zero_()
    with on_device_of(x):
        _quantize_kernel[(x.numel() // size,)](
            x,
            q,
            scales,
            base_argument,
            permutation_argument,
            scale,
            clip,
            GROUPS=groups,
            QMAX=2 ** (bits - 1) - 1,
            PACKED=packed,
            TILE=tile,
            **tile.options,
        )
    return q, scales
