"""Walsh and Hadamard matrices: +-1 entries and orthogonal rows, from constructions of number theory.

A size must be m * 2^k, where m is one of `BASE_ORDERS`. The matrix is the Kronecker product of a Hadamard matrix of
order m with Sylvester's of order 2^k, whose rows are in *natural order*. *Sequency order* sorts the rows by their
number of sign changes (their sequency, a square wave's counterpart of a frequency; docs/walsh.md). Checkpoints are
rotated with these matrices, which therefore never change between versions.
"""

from __future__ import annotations

import functools
import itertools
import operator

import numpy as np
import torch
from torch import Tensor

from .checks import check_one_of

__all__ = [
    "BASE_ORDERS",
    "base_matrix",
    "factor_size",
    "gsr_matrix",
    "hadamard_matrix",
    "sequency",
    "sequency_permutation",
    "walsh_matrix",
]

BASE_ORDERS = (1, 12, 20, 28, 36, 40, 52, 60, 108, 140, 156, 172)
"""Orders m that have a construction. m * 2^k covers the hidden sizes of language models."""


def factor_size(size: int, caller: str = "factor_size") -> tuple[int, int]:
    """Split a size into m * 2^k, with the smallest m in `BASE_ORDERS` and so the largest power of two.

    Args:
        size: at least 1.
        caller: begins an error message.

    Returns:
        m and 2^k.

    Raises:
        ValueError: there is no such split. The message names the largest divisor of size that has a split.
    """
    size = operator.index(size)
    if size < 1:
        raise ValueError(f"{caller}: size must be at least 1, got {size}; pass the number of entries to transform")
    for order in BASE_ORDERS:
        power = size // order
        if size % order == 0 and power & (power - 1) == 0:
            return order, power
    odd = size
    while odd % 2 == 0:
        odd //= 2
    group = _largest_group(size)
    if group > 1:
        remedy = f"the largest group_size that works is {group} ({size} = {size // group} groups of {group})"
    else:
        remedy = "no group_size above 1 that works divides it"
    raise ValueError(
        f"{caller}: size must be m * 2^k with m one of {BASE_ORDERS}, got {size} = {odd} * {size // odd}, for which no "
        f"Hadamard matrix is built; {remedy}"
    )


def _largest_group(size: int) -> int:
    """The largest divisor of ``size`` that has a matrix; 1 if no other has."""
    largest = 1
    for order in BASE_ORDERS:
        quotient, rest = divmod(size, order)
        if rest == 0:
            largest = max(largest, order * (quotient & -quotient))  # times the power of two in the quotient
    return largest


def base_matrix(order: int) -> Tensor:
    """A Hadamard matrix of one of `BASE_ORDERS`; its first row and its first column are +1.

    - 12, 20, 60, 108 and 140: Paley's first construction, q = order - 1.
    - 28 and 36: Paley's second construction, q = order / 2 - 1.
    - 52, 156 and 172: four circulants in the array of Goethals and Seidel. Those of 172 are symmetric, which is
      Williamson's construction.
    - 40: a Kronecker product.

    Each matrix is checked when it is built: H H^T = order * I in integers.

    Args:
        order: a member of `BASE_ORDERS`.

    Returns:
        int8 [order, order], a new tensor.

    Raises:
        ValueError: another order.
    """
    check_one_of("base_matrix", "order", order, BASE_ORDERS, "hadamard_matrix multiplies them by powers of two")
    return torch.tensor(_base(order))


@functools.cache
def _base(order: int) -> np.ndarray:
    if order == 1:
        return np.ones((1, 1), np.int8)
    if order == 40:
        matrix = np.kron(_base(20), np.array([[1, 1], [1, -1]]))
    elif order in _CIRCULANT_MULTIPLIERS:
        matrix = _goethals_seidel(*_four_sequences(order // 4, _CIRCULANT_MULTIPLIERS[order]))
    elif order in (28, 36):
        matrix = _paley_2(order // 2 - 1)
    else:
        matrix = _paley_1(order - 1)
    matrix = matrix * matrix[0]
    matrix = matrix * matrix[:, :1]
    if not np.array_equal(matrix @ matrix.T, order * np.eye(order)):
        raise AssertionError(f"the Hadamard matrix of order {order} is wrong: this is a bug in rcp_kernels")
    return matrix.astype(np.int8)


def _residues(q: int) -> np.ndarray:
    """Jacobsthal's matrix of a prime q: entry [i, j] is 1, -1 or 0 as i - j is a square, not one, or 0 modulo q."""
    character = -np.ones(q, np.int64)
    character[np.arange(q) ** 2 % q] = 1
    character[0] = 0
    i = np.arange(q)
    return character[(i[:, None] - i) % q]


def _paley_1(q: int) -> np.ndarray:
    """Order q + 1 for a prime q of the form 4a + 3 (Paley 1933)."""
    skew = np.zeros((q + 1, q + 1), np.int64)
    skew[0, 1:] = 1
    skew[1:, 0] = -1
    skew[1:, 1:] = _residues(q)
    return skew + np.eye(q + 1, dtype=np.int64)


def _paley_2(q: int) -> np.ndarray:
    """Order 2 (q + 1) for a prime q of the form 4a + 1 (Paley 1933)."""
    conference = np.zeros((q + 1, q + 1), np.int64)
    conference[0, 1:] = 1
    conference[1:, 0] = 1
    conference[1:, 1:] = _residues(q)
    identity = np.eye(q + 1, dtype=np.int64)
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


# By order, a number g: there are four sequences of length order / 4 that do not change under i -> g * i. With g a few
# hundred sequences remain to be searched, instead of 2^39.
_CIRCULANT_MULTIPLIERS = {52: 12, 156: 29, 172: 7}


def _four_sequences(length: int, multiplier: int) -> list[np.ndarray]:
    """Four +-1 sequences whose periodic autocorrelations sum to 0 at every shift, the first four in a fixed order.

    Only sequences with a[i] = a[multiplier * i mod length] and a[0] = 1 are tried. The multiplier does not change their
    autocorrelation either, which is therefore compared at one shift of each orbit.
    """
    orbits: list[list[int]] = []
    for start in range(1, length):
        if not any(start in orbit for orbit in orbits):
            orbit = [start]
            while (following := orbit[-1] * multiplier % length) != start:
                orbit.append(following)
            orbits.append(orbit)
    shifts = np.array([orbit[0] for orbit in orbits])
    places = (np.arange(length) + shifts[:, None]) % length
    candidates: dict[tuple[int, ...], np.ndarray] = {}
    for signs in itertools.product((1, -1), repeat=len(orbits)):
        sequence = np.ones(length, np.int64)
        for sign, orbit in zip(signs, orbits, strict=True):
            sequence[orbit] = sign
        # The four squared sums add up to 4 * length, so none exceeds it.
        if sequence.sum() ** 2 <= 4 * length:
            candidates.setdefault(tuple((sequence[places] @ sequence).tolist()), sequence)
    correlations = np.array(list(candidates))
    sequences = list(candidates.values())
    pairs: dict[tuple[int, ...], tuple[int, int]] = {}
    for i, j in itertools.combinations_with_replacement(range(len(sequences)), 2):
        total = correlations[i] + correlations[j]
        pairs.setdefault(tuple(total.tolist()), (i, j))
        if (other := pairs.get(tuple((-total).tolist()))) is not None:
            return [sequences[k] for k in (i, j, *other)]
    raise AssertionError(f"no four sequences of length {length} with multiplier {multiplier}")


def _goethals_seidel(*rows: np.ndarray) -> np.ndarray:
    """Order 4n from four rows of length n whose autocorrelations cancel (Goethals and Seidel 1967)."""
    index = np.arange(len(rows[0]))
    a, b, c, d = (row[(index - index[:, None]) % len(index)] for row in rows)
    # x[:, ::-1] is x R with R the back-diagonal matrix, which turns a circulant into a symmetric matrix.
    br, cr, dr = b[:, ::-1], c[:, ::-1], d[:, ::-1]
    bt, ct, dt = b.T[:, ::-1], c.T[:, ::-1], d.T[:, ::-1]
    return np.block([[a, br, cr, dr], [-br, a, dt, -ct], [-cr, -dt, a, bt], [-dr, ct, -bt, a]])


def hadamard_matrix(size: int, normalized: bool = False) -> Tensor:
    """The Hadamard matrix in natural order, ``base_matrix(m)`` kron Sylvester's matrix of order 2^k.

    For a power of two this is Sylvester's matrix, which is symmetric: H[i, j] = (-1)^popcount(i & j).

    Args:
        size: m * 2^k with m in `BASE_ORDERS`.
        normalized: divide by sqrt(size), which makes the matrix orthogonal. Without it H H^T = size * I.

    Returns:
        int8 [size, size], entries +-1; normalized, float64.

    Raises:
        ValueError: a size without a matrix.
    """
    order, power = factor_size(size, "hadamard_matrix")
    matrix = _base(order)
    while power > 1:
        matrix = np.kron(matrix, np.array([[1, 1], [1, -1]], np.int8))
        power //= 2
    result = torch.tensor(matrix)
    return result.to(torch.float64) / size**0.5 if normalized else result


def sequency(matrix: Tensor) -> Tensor:
    """The number of sign changes along each row of a matrix without zeros.

    Args:
        matrix: [..., columns] of nonzero real numbers.

    Returns:
        int64 [...].
    """
    positive = matrix > 0
    return (positive[..., 1:] ^ positive[..., :-1]).sum(-1)


def sequency_permutation(size: int) -> Tensor:
    """The natural index of each row in sequency order: ``walsh_matrix(n) = hadamard_matrix(n)[permutation]``.

    For a power of two, entry s is the bit reversal of the Gray code s ^ (s >> 1), and row s has exactly s sign changes.
    For other sizes several rows may have the same number of sign changes, and ties are sorted by their natural index.
    Takes O(size) steps; no matrix is made.

    Args:
        size: m * 2^k with m in `BASE_ORDERS`.

    Returns:
        int64 [size], a permutation of 0 .. size - 1.

    Raises:
        ValueError: a size without a matrix.
    """
    return torch.tensor(_sequency_permutation(size, "sequency_permutation"))


def _sequency_permutation(size: int, caller: str) -> np.ndarray:
    order, power = factor_size(size, caller)
    gray = np.arange(power) ^ (np.arange(power) >> 1)
    reversed_gray = np.zeros(power, np.int64)
    for _ in range(power.bit_length() - 1):
        reversed_gray = (reversed_gray << 1) | (gray & 1)
        gray >>= 1
    if order == 1:
        return reversed_gray
    # Row i * power + a of the product is m copies of Sylvester's row a, each times an entry of base row i. The copies
    # together have m times the sign changes of row a. If row a has an even number of changes, it ends with the sign of
    # its start. Where two copies meet, the sign then changes exactly where base row i changes. If row a has an odd
    # number of changes, the sign changes exactly where base row i does not.
    within = np.empty(power, np.int64)
    within[reversed_gray] = np.arange(power)
    base = _base(order)
    between = (base[:, 1:] != base[:, :-1]).sum(1)[:, None]
    changes = order * within + np.where(within % 2 == 0, between, order - 1 - between)
    return np.argsort(changes.ravel(), kind="stable")


def walsh_matrix(size: int, normalized: bool = False) -> Tensor:
    """The Walsh matrix: the rows of :func:`hadamard_matrix` in sequency order.

    For a power of two the matrix is symmetric and row s has s sign changes (Walsh 1923). For other sizes it is not
    symmetric; :func:`sequency_permutation` says how ties are sorted. Its inverse is its transpose / size.

    Args:
        size: m * 2^k with m in `BASE_ORDERS`.
        normalized: divide by sqrt(size), which makes the matrix orthogonal.

    Returns:
        int8 [size, size], entries +-1; normalized, float64.

    Raises:
        ValueError: a size without a matrix.
    """
    return hadamard_matrix(size, normalized)[sequency_permutation(size)]


def gsr_matrix(size: int, group_size: int = 128, dtype: torch.dtype = torch.float64, normalized: bool = True) -> Tensor:
    """The grouped sequency-arranged rotation: a block diagonal of ``walsh_matrix(group_size)``.

    With the group of the weight's quantization as block, the rotation stays inside the group, and the rows of a group
    have neighbouring sequencies (GSR, arXiv 2505.03810).

    Args:
        size: a multiple of group_size.
        group_size: m * 2^k with m in `BASE_ORDERS`.
        dtype: of the result.
        normalized: divide by sqrt(group_size), which makes the matrix orthogonal. False gives entries 0 and +-1.

    Returns:
        dtype [size, size].

    Raises:
        ValueError: group_size does not divide size, or has no matrix.
    """
    if size < 1 or group_size < 1 or size % group_size:
        raise ValueError(
            f"gsr_matrix: group_size must divide size, got size {size} and group_size {group_size}; choose a divisor"
        )
    return torch.block_diag(*[walsh_matrix(group_size, normalized).to(dtype)] * (size // group_size))
