"""The tile of each size: what one block of threads works on, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..runtime import INTERPRETED

LARGEST = 32768
"""The largest size of a transform."""
_LARGEST_EXCHANGE = 16384  # values to exchange at once: 64 KiB of shared memory, which every architecture has


@dataclass(frozen=True)
class Tile:
    """What one block of threads works on. A compile-time constant of the kernels.

    Attributes:
        n: size of the transform, m * c.
        m: order of the dense factor. A tile has all its rows.
        columns: how many of the c columns are in the tile.
        rows: transforms in the tile; 1 if it does not have all columns.
        chunks: bits of c per chunk of butterflies, lowest first. None in a tile that has not all columns.
        carried: low bits that the last chunk of a natural-order transform carries along.
        halves: parts of a row that pass through shared memory one after the other.
        step: columns of the dense factor per step of its product.
        vector: consecutive values in a thread when it stores.
        max_registers: per thread; None leaves it to the compiler.
    """

    n: int
    m: int
    columns: int
    rows: int
    sequency: bool
    inverse: bool
    chunks: tuple[int, ...]
    carried: int
    halves: int
    step: int
    vector: int
    tensor_cores: bool
    interpreted: bool
    warps: int
    max_registers: int | None

    @property
    def options(self) -> dict[str, Any]:
        """Options of Triton's compiler."""
        return {"num_warps": self.warps, "num_stages": 2, "maxnreg": self.max_registers}

    @property
    def c(self) -> int:
        return self.n // self.m

    @property
    def blocks(self) -> int:
        """Tiles that share a transform."""
        return self.c // self.columns

    @property
    def padded_m(self) -> int:
        return triton.next_power_of_2(self.m)

    @property
    def interleaved(self) -> bool:
        """Whether :func:`output_place` gives the output order, which otherwise is that of the tile."""
        return self.m > 1 and self.c > 1 and self.sequency and not self.inverse


def fits_one_tile(n: int, m: int) -> bool:
    """Whether one kernel does both factors. Otherwise each takes one kernel, with a float32 tensor between them.

    The product's operands pass through shared memory too, in at least 16 rows of c columns: 512 columns take 32 KiB.
    """
    return m == 1 or (triton.next_power_of_2(m) * (n // m) <= _LARGEST_EXCHANGE and n // m <= 512)


def _even_chunks(bits: int, largest: int) -> tuple[int, ...]:
    count = -(-bits // largest)
    return tuple(bits // count + (i < bits % count) for i in range(count))


def _chunks(bits: int, vector: int, registers: int, sequency: bool, one_row: bool) -> tuple[tuple[int, ...], int]:
    """Bits per chunk, and carried bits, for threads that load vectors of 2^vector and hold 2^registers values.

    The first chunk is what a vector load brings into a thread. In sequency order the last chunk is what a vector store
    takes. In natural order a thread that stores holds a vector of low bits and the top bits of the tile, because a
    tile's registers are its top bits once its threads are used up. If the tile is one row, the last chunk is these top
    bits, and it carries the low bits along. If it is several rows, Triton adds one exchange before the store.
    """
    if bits <= vector:
        return (bits,), 0
    if sequency:
        first = min(vector, bits - vector)
        return (first, *_even_chunks(bits - first - vector, registers), vector), 0
    if one_row:
        last = registers - vector
        return (vector, *_even_chunks(bits - vector - last, registers), last), vector
    return (vector, *_even_chunks(bits - vector, registers)), 0


# Longer than 60 lines: half are the reasons for the numbers.
@cache
def tile_config(
    n: int,
    dtype: torch.dtype,
    m: int = 1,
    groups: int = 0,
    sequency: bool = True,
    inverse: bool = False,
    tensor_cores: bool = True,
) -> Tile:
    """The tile for transforms of size n = m * 2^k, or for tokens of `groups` of them.

    Args:
        n: size of the transform.
        dtype: of x.
        m: order of the dense factor. With m > 1 the tile does not depend on groups: the transform and the quantized
            transform then are the same instructions and give the same bits. Where one tile cannot do both factors, the
            tile is for the dense factor alone.
        groups: transforms in a token to quantize; 0 for a transform without quantization.
        sequency: sequency order, else natural order.
        inverse: the transpose.
        tensor_cores: whether the GPU has tensor cores that Triton uses.
    """
    c = n // m
    one_tile = fits_one_tile(n, m)
    # A dense factor alone: 4096 values.
    columns = c if one_tile else max(16, 4096 // triton.next_power_of_2(m))
    width = triton.next_power_of_2(m) * columns
    if not one_tile:
        rows = 1
    elif groups and m == 1:
        # At least a warp of threads with two values each.
        rows = max(min(triton.next_power_of_2(groups), _LARGEST_EXCHANGE // width), 64 // width, 1)
    else:
        # 2048 values are 4 warps with 16 values a thread. That is small enough to fill a GPU with few rows. It is large
        # enough for 4 KiB of loads in flight per block. Up to 16 blocks fit on a multiprocessor, so that some load
        # while others compute.
        rows = max(1, 2048 // width)
    tile = rows * width
    # 16 values a thread make chunks of 4 bits. Above 4096 values a thread has 32, for chunks of 5 bits and fewer
    # exchanges. 32768 values would need 1024 threads, whose 64 registers spill with 32 values: there 512 threads hold
    # 64 values each, in two halves.
    halves = 2 if width == LARGEST else 1
    warps = max(1, min(16, tile // (32 * (16 if tile <= 4096 else 32))))
    bits = c.bit_length() - halves
    registers = (tile // (32 * warps)).bit_length() - halves
    vector = min(registers, 2 if dtype == torch.float32 else 3)
    chunks: tuple[int, ...]
    if m > 1:
        chunks, carried = _even_chunks(bits, registers) if one_tile else (), 0
    elif halves == 2 and sequency:
        # Outputs of the two halves alternate: half a vector of each makes a vector to store. 5-bit chunks spill.
        chunks, carried = (vector, *_even_chunks(bits - 2 * vector + 1, 4), vector - 1), 0
    else:
        chunks, carried = _chunks(bits, vector, registers, sequency, rows == 1)
    tensor_cores = tensor_cores and dtype != torch.float32 and not (INTERPRETED and dtype == torch.bfloat16)
    return Tile(
        n=n,
        m=m,
        columns=columns,
        rows=rows,
        sequency=sequency,
        inverse=inverse,
        chunks=chunks,
        carried=carried,
        halves=halves,
        # Triton takes no less than 16. On tensor cores 32 halves the steps and pads m little. Multiply-adds would spill
        # 32 operands.
        step=32 if tensor_cores and m > 16 else 16,
        vector=2**vector,
        tensor_cores=tensor_cores,
        interpreted=INTERPRETED,
        warps=warps,
        # Without a limit ptxas keeps 512 threads to 64 registers, so that two blocks fit, and spills a word for it.
        max_registers=128 if groups and warps == 16 and (m > 1 or groups > rows) else None,
    )
