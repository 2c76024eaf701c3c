"""The Walsh-Hadamard transform on CUDA, in Triton: alone, in place, and fused with activation quantization.

Read the files in this order: tile_choice (what a block of threads works on), butterflies (powers of two),
dense_factor (sizes m * 2^k), quantize, launch (the kernels and the operators). Nothing is tuned at run time.

**Powers of two.** A tile of whole rows is in registers. The stages are those of the CPU kernel, stride 1, 2, 4, ... in
float32, so both give the same bits. They run in *chunks*: all bits of a chunk are register bits of a thread, so its
butterflies need no other thread. Between two chunks the tile is exchanged once, through shared memory or, inside a
warp, by shuffles. n = 4096 takes four chunks, three exchanges, one read and one write.

Index bits of n = 128, float16, sequency order, chunks of 3, 1 and 3 bits. ``j6 ... j0`` are the bits of the natural
index, highest first. ``c_i = j_0 ^ ... ^ j_i`` is final after stage i. Bits in brackets are register bits of a thread::

    load       j6 j5 j4 j3 [j2 j1 j0]      a thread loads a vector of 8 neighbours
    chunk 0    [c0 c1 c2] j6 j5 j4 j3      stages 0 to 2; the finished bits move to the top, reversed
    exchange   c0 c1 c2 j6 j5 j4 [j3]
    chunk 1    c0 c1 c2 [c3] j6 j5 j4      stage 3; its bit joins below the finished ones
    exchange   c0 c1 c2 c3 [j6 j5 j4]
    chunk 2    c0 c1 c2 c3 [c4 c5 c6]      stages 4 to 6
    store      s6 s5 s4 s3 [s2 s1 s0]      a thread stores a vector of 8 neighbours

Sequency order costs nothing. The bits of the sequency are ``s[k-1-i] = c_i``, a Gray code and a bit reversal:

- The Gray code: stage i writes its results to c_i = j_i ^ c_(i-1) instead of j_i. So a + b and a - b change places
  where c_(i-1) is 1. Inside a chunk that is another register. At the first stage of a chunk it is the sign of b, and
  a + (-1)^c * b is one fused multiply-add, exact like the sum.
- The bit reversal: each chunk takes its bits from the bottom of the index and puts them, reversed, below the finished
  ones at the top, as in an autosort FFT. The exchange before the next chunk is needed anyway. The last chunk has the
  lowest bits of s, so its threads store vectors.

In natural order bits stay where they are. For n = 4096, float16, chunks of 3, 4, 4 and 1 bits::

    chunk 0    j11 ............... j3 [j2 j1 j0]
    chunk 1    j11 ...... j7 [j6 j5 j4 j3] j2 j1 j0
    chunk 2    j11 [j10 j9 j8 j7] j6 ......... j0
    chunk 3    [j11] j10 ............. j3 [j2 j1 j0]     the low bits are carried along, to store vectors

**m * 2^k** (``base`` [m, m]). First ``base @ x`` with x as [m, 2^k], then the butterflies. For float16 and bfloat16 the
product runs on tensor cores with float32 sums, where x and +-1 are exact. For float32 it is float32 multiply-adds. The
two factors commute. The CPU takes the butterflies first, so results differ by rounding only.

In sequency order, row (i, a) of base kron Sylvester has place ``m * sequency(a) + rank``. The rank of i among the rows
of the base depends only on the parity of sequency(a). The rows of the base are loaded by the even rank, and the
butterflies put a in order. The odd half, whose ranks are nearly reversed, is permuted within runs of m by the addresses
of the store: 32 lanes write 32 neighbours, but no vectors.

**Quantized** (:func:`walsh_quantize`). The tile is one token with all its groups, and its largest magnitude is a
reduction over registers. A token of several tiles is transformed twice, the second time mostly from L2. A token that
holds NaN or Inf, or whose transform overflows the dtype of x, gets scale NaN and q = 0: CUDA cannot raise without a
synchronisation.
"""

from .launch import walsh_quantize, walsh_transform, walsh_transform_
from .tile_choice import Tile, tile_config

__all__ = ["Tile", "tile_config", "walsh_quantize", "walsh_transform", "walsh_transform_"]
