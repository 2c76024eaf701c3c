"""The matrices: integers only, and the published numbers about their order."""

import hashlib

import numpy as np
import pytest
import torch

from rcp_kernels import gsr_matrix, hadamard_matrix, sequency_permutation, walsh_matrix
from rcp_kernels.ops.walsh_matrices import BASE_ORDERS, base_matrix, factor_size, sequency


def sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones((1, 1), dtype=torch.int8)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def gram(matrix: torch.Tensor) -> torch.Tensor:
    wide = matrix.to(torch.float64)  # exact: the sums stay far below 2**53
    return wide @ wide.T


@pytest.mark.parametrize("size", [2**k for k in range(14)])
def test_walsh_matrix_is_sylvester_s_sorted_by_sign_changes(size: int) -> None:
    natural = sylvester(size)
    assert torch.equal(hadamard_matrix(size), natural)
    walsh = walsh_matrix(size)
    assert walsh.dtype == torch.int8
    assert torch.equal(walsh, natural[torch.argsort(sequency(natural))])
    assert torch.equal(sequency(walsh), torch.arange(size))
    assert torch.equal(walsh, walsh.T)


def test_the_rows_of_eight() -> None:
    assert sequency_permutation(8).tolist() == [0, 4, 6, 2, 3, 7, 5, 1]


def test_sequency_counts_sign_changes() -> None:
    rows = torch.tensor([[1.0, 2.0, -1.0, -3.0, 5.0], [1.0] * 5, [-1.0, 1.0, -1.0, 1.0, -1.0]])
    assert sequency(rows).tolist() == [2, 0, 4]


@pytest.mark.parametrize("doublings", [0, 1, 2, 4])
@pytest.mark.parametrize("order", BASE_ORDERS)
def test_rows_are_orthogonal(order: int, doublings: int) -> None:
    size = order * 2**doublings
    matrix = hadamard_matrix(size)
    assert matrix.dtype == torch.int8
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(gram(matrix), size * torch.eye(size, dtype=torch.float64))
    assert torch.equal(gram(walsh_matrix(size)), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("order", BASE_ORDERS)
def test_base_matrix(order: int) -> None:
    matrix = base_matrix(order)
    assert torch.equal(gram(matrix), order * torch.eye(order, dtype=torch.float64))
    assert bool((matrix[0] == 1).all())
    assert bool((matrix[:, 0] == 1).all())
    matrix.zero_()
    assert bool(base_matrix(order).all()), "a caller's changes stay the caller's"


def test_matrices_never_change() -> None:
    """Weights are stored rotated. Another Hadamard matrix would be as good, and would break every such checkpoint."""
    digest = hashlib.sha256(b"".join(base_matrix(order).numpy().tobytes() for order in BASE_ORDERS)).hexdigest()
    assert digest == "758313910a42c5828b53a64eeb29964907de1d5b43c5d3653eb97577ccb8990c"
    sizes = (8, 576, 1536, 11008, 14336)
    entries = b"".join(sequency_permutation(size).numpy().astype("<i8").tobytes() for size in sizes)
    assert hashlib.sha256(entries).hexdigest() == "c9fc7bc331141fb3648b459bf31085d52a569425ca763ddcaa0e0743915ef17a"


@pytest.mark.parametrize("order", BASE_ORDERS[1:])
@pytest.mark.parametrize("doublings", [0, 1, 3])
def test_sequency_order_of_other_sizes(order: int, doublings: int) -> None:
    size = order * 2**doublings
    natural = hadamard_matrix(size)
    changes = sequency(natural)
    permutation = sequency_permutation(size)
    assert torch.equal(permutation, torch.argsort(changes, stable=True))
    assert torch.equal(walsh_matrix(size), natural[permutation])


@pytest.mark.parametrize("size", [4096, 11008, 13824, 14336, 32768])
def test_sequency_permutation_of_large_sizes(size: int) -> None:
    assert torch.equal(sequency_permutation(size).sort().values, torch.arange(size))


def test_natural_order_is_a_kronecker_product() -> None:
    assert torch.equal(hadamard_matrix(96), torch.kron(base_matrix(12), sylvester(8)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, (1, 1)),
        (2, (1, 2)),
        (32768, (1, 32768)),
        (12, (12, 1)),
        (24, (12, 2)),
        (40, (20, 2)),
        (80, (20, 4)),
        (576, (36, 16)),
        (1536, (12, 128)),
        (3072, (12, 256)),
        (4608, (36, 128)),
        (8960, (140, 64)),
        (11008, (172, 64)),
        (13824, (108, 128)),
        (14336, (28, 512)),
    ],
)
def test_factor_size(size: int, expected: tuple[int, int]) -> None:
    assert factor_size(size) == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (100, r"got 100 = 25 \* 4, .*; the largest group_size that works is 20 \(100 = 5 groups of 20\)"),
        (672, r"got 672 = 21 \* 32, .* is 224 \(672 = 3 groups of 224\)"),
        (14, r"got 14 = 7 \* 2, .* is 2 \(14 = 7 groups of 2\)"),
        (4095, r"got 4095 = 4095 \* 1, .*; no group_size above 1 that works divides it"),
        (0, r"size must be at least 1, got 0"),
        (-8, r"size must be at least 1, got -8"),
    ],
)
@pytest.mark.parametrize("function", [hadamard_matrix, walsh_matrix, sequency_permutation, factor_size])
def test_sizes_without_a_matrix(function, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(size)


def test_every_remedy_works() -> None:
    for size in range(1, 700):
        try:
            factor_size(size)
        except ValueError as error:
            _, found, rest = str(error).partition("the largest group_size that works is ")
            if found:
                group = int(rest.split()[0])
                assert size % group == 0
                factor_size(group)
            else:
                assert size % 2 == 1


def test_base_matrix_of_another_order() -> None:
    with pytest.raises(ValueError, match=r"order must be one of .*, got 92; hadamard_matrix"):
        base_matrix(92)


def test_gsr_matrix() -> None:
    matrix = gsr_matrix(96, 32)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix[32:64, 32:64], walsh_matrix(32).double() / 32**0.5)
    assert int((matrix != 0).sum()) == 3 * 32 * 32
    assert gsr_matrix(256).shape == (256, 256)
    assert torch.equal(gsr_matrix(96, 32, torch.int8, normalized=False)[:32, :32], walsh_matrix(32))
    for make in (hadamard_matrix, walsh_matrix):
        assert torch.equal(make(24, normalized=True), make(24).double() / 24**0.5)
    assert gsr_matrix(24, 12, torch.float32).dtype == torch.float32
    for size, group in ((100, 32), (0, 32), (64, 0)):
        with pytest.raises(ValueError, match=rf"group_size must divide size, got size {size} and group_size {group}"):
            gsr_matrix(size, group)
    with pytest.raises(ValueError, match=r"got 9 = 9 \* 1"):
        gsr_matrix(18, 9)


def test_sequency_spread_inside_a_quantization_group() -> None:
    """What GSR is about: n = 4096 in groups of 128, standard deviation of the sequencies that share a group."""

    def spread(matrix: torch.Tensor) -> float:
        return float(np.std(sequency(matrix).numpy().reshape(-1, 128), axis=1).mean())

    assert spread(hadamard_matrix(4096)) == pytest.approx(1182.4, abs=0.1)
    assert spread(walsh_matrix(4096)) == pytest.approx(36.95, abs=0.01)
