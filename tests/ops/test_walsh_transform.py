"""walsh_transform and walsh_quantize: against the dense matrices, against the reference, and as operators."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels import hadamard_matrix, ops, quantize_activation, sequency_permutation, walsh_quantize, walsh_transform
from rcp_kernels.ops.walsh_matrices import BASE_ORDERS, factor_size

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("sequency", "natural")
ISAS = range(torch.ops.rcp_kernels.cpu_isa_supported() + 1)
POWERS = [2**k for k in range(1, 16)]
# Every base order alone and doubled, what real models have, and the largest of each kind.
OTHERS = sorted(
    {m * 2**k for m in BASE_ORDERS[1:] for k in (0, 1, 4)} | {576, 1536, 3072, 8960, 11008, 13824, 14336, 24576}
)


@pytest.fixture
def restore_isa():
    before = torch.ops.rcp_kernels.cpu_isa()
    yield
    torch.ops.rcp_kernels.set_cpu_isa(before)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(x: torch.Tensor, order: str, inverse: bool = False) -> torch.Tensor:
    """The orthonormal transform of the last dimension as float64 products with dense matrices.

    A matrix of 32768 columns would take 8 GB, so it is taken as the Kronecker product that it is, of a left and a right
    factor of a few hundred columns.
    """
    size = x.shape[-1]
    _, power = factor_size(size)
    right = 2 ** (power.bit_length() // 2)
    left = hadamard_matrix(size // right).double()
    permutation = sequency_permutation(size) if order == "sequency" else torch.arange(size)
    x = x.double()
    if inverse:
        x = torch.empty_like(x).index_copy_(-1, permutation, x)
        left = left.T
    y = (left @ x.unflatten(-1, (-1, right)) @ hadamard_matrix(right).double()).flatten(-2) / math.sqrt(size)
    return y if inverse else y[..., permutation]


def assert_as_good_as_torch(found: torch.Tensor, x: torch.Tensor, order: str, inverse: bool) -> None:
    """Within twice the error of the same butterflies in torch, in the dtype of x, plus one rounding of the result."""
    expected = dense(x, order, inverse)
    plain = ops.reference.walsh_transform(x, order, inverse=inverse, dtype=x.dtype)
    limit = 2 * float((plain.double() - expected).abs().max()) + torch.finfo(x.dtype).eps * float(expected.abs().max())
    assert found.dtype == x.dtype
    assert float((found.double() - expected).abs().max()) <= limit


@pytest.mark.parametrize("size", [12, 64, 96, 576])
@pytest.mark.parametrize("order", ORDERS)
def test_the_dense_product_is_one_with_the_matrix(size: int, order: str) -> None:
    matrix = hadamard_matrix(size).double()
    matrix = matrix[sequency_permutation(size)] if order == "sequency" else matrix
    x = random(3, size)
    torch.testing.assert_close(dense(x, order), x.double() @ matrix.T / math.sqrt(size), rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(x, order, True), x.double() @ matrix / math.sqrt(size), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", POWERS + OTHERS)
def test_transform(size: int, order: str, inverse: bool) -> None:
    for dtype in DTYPES:
        x = random(3, size, dtype=dtype)
        found = walsh_transform(x, order, inverse=inverse)
        assert_as_good_as_torch(found, x, order, inverse)
        steps = ops.reference.walsh_transform(x, order, inverse=inverse, dtype=torch.float32)
        assert torch.equal(found, steps.to(dtype)), "the contract gives every bit"
        assert torch.equal(walsh_transform(x, order, inverse=inverse), found)
        torch.testing.assert_close(
            ops.reference.walsh_transform(x, order, inverse=inverse), dense(x, order, inverse), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("group_size", [2, 4, 12, 16, 64, 128, 192, 512, 1536])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inverse", [False, True])
def test_groups_are_transformed_by_themselves(group_size: int, order: str, inverse: bool) -> None:
    for dtype in DTYPES:
        x = random(2, 1536, dtype=dtype)
        found = walsh_transform(x, order, group_size, inverse=inverse)
        blocks = walsh_transform(x.view(2, -1, group_size), order, inverse=inverse)
        assert torch.equal(found, blocks.flatten(1))
        assert_as_good_as_torch(blocks, x.view(2, -1, group_size), order, inverse)


def test_groups_of_a_size_without_a_matrix() -> None:
    x = random(2, 5 * 64)
    assert torch.equal(walsh_transform(x, group_size=64), walsh_transform(x.view(2, 5, 64)).flatten(1))
    x = random(2, 900)
    assert torch.equal(walsh_transform(x, group_size=4), walsh_transform(x.view(2, 225, 4)).flatten(1))


@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    groups=st.integers(1, 5),
    size=st.sampled_from([1, 2, 8, 12, 16, 40, 64, 96, 128, 256]),
    order=st.sampled_from(ORDERS),
    inverse=st.booleans(),
    scale=st.sampled_from([None, 1.0, -0.3, 2.0**-7]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded", "offset"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_layout(leading, groups, size, order, inverse, scale, dtype, layout, seed) -> None:
    x = random(*leading, groups * size, dtype=dtype, seed=seed)
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        x = torch.stack((x, x + 1), -1)[..., 0]
    elif layout == "expanded":
        x = x.expand(2, *x.shape)
    elif layout == "offset":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    before = x.clone()
    found = walsh_transform(x, order, size, scale, inverse)
    expected = ops.reference.walsh_transform(x, order, size, scale, inverse, torch.float32).to(dtype)
    assert torch.equal(found, expected)
    assert found.shape == x.shape
    assert found.is_contiguous()
    assert torch.equal(x, before)
    for bits, packed in ((4, False), (4, True), (8, False)):
        q, q_scale = walsh_quantize(x, bits, 0.9, packed, order, size, scale, inverse)
        expected_q, expected_scale = quantize_activation(found, bits, 0.9, packed)
        assert torch.equal(q, expected_q)
        assert q.dtype == expected_q.dtype
        assert torch.equal(q_scale, expected_scale)


@pytest.mark.parametrize("size", [2, 64, 1536, 4096, 11008])
def test_quantize_equals_the_pair_and_the_reference(size: int) -> None:
    for dtype in DTYPES:
        x = random(5, size, dtype=dtype)
        x[1] = 0
        for order, inverse in (("sequency", False), ("natural", False), ("sequency", True)):
            q, scale = walsh_quantize(x, 8, order=order, inverse=inverse)
            for expected_q, expected_scale in (
                quantize_activation(walsh_transform(x, order, inverse=inverse), 8),
                ops.reference.walsh_quantize(x, 8, order=order, inverse=inverse),
            ):
                assert torch.equal(q, expected_q)
                assert torch.equal(scale, expected_scale)
        assert scale[1] == 0


@pytest.mark.parametrize("size", [2, 16, 128, 4096, 32768])
@pytest.mark.parametrize("order", ORDERS)
def test_powers_of_two_are_their_own_inverse(size: int, order: str) -> None:
    x = random(2, size)
    once = walsh_transform(x, order)
    torch.testing.assert_close(walsh_transform(once, order), x, rtol=0, atol=1e-5)
    assert torch.equal(walsh_transform(x, order, inverse=True), once)


@pytest.mark.parametrize("size", [12, 40, 576, 1536, 11008])
@pytest.mark.parametrize("order", ORDERS)
def test_inverse_undoes_the_others(size: int, order: str) -> None:
    x = random(2, size)
    for first, second in ((False, True), (True, False)):
        back = walsh_transform(walsh_transform(x, order, inverse=first), order, inverse=second)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-5)


def test_lengths_are_kept() -> None:
    x = random(4, 14336)
    torch.testing.assert_close(walsh_transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


def test_a_square_wave_has_one_coefficient() -> None:
    wave = hadamard_matrix(256)[sequency_permutation(256)][37].float()
    expected = torch.zeros(256)
    expected[37] = 16
    assert torch.equal(walsh_transform(wave), expected)


@pytest.mark.parametrize("size", [2, 8, 64, 96, 576, 1024, 4096, 11008, 32768])
def test_instruction_sets_agree(size: int, restore_isa) -> None:
    for dtype in DTYPES:
        x = random(3, size, dtype=dtype)
        for order in ORDERS:
            results = []
            for isa in ISAS:
                torch.ops.rcp_kernels.set_cpu_isa(isa)
                results.append((walsh_transform(x, order), *walsh_quantize(x, 4, 1.0, True, order)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_agree(restore_threads) -> None:
    x = random(300, 1536)
    torch.set_num_threads(1)
    one, (q, scale) = walsh_transform(x), walsh_quantize(x)
    torch.set_num_threads(2)
    assert torch.equal(walsh_transform(x), one)
    assert all(torch.equal(a, b) for a, b in zip(walsh_quantize(x), (q, scale), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 96, 128, 4096])
def test_in_place(dtype: torch.dtype, size: int) -> None:
    for order in ORDERS:
        for inverse in (False, True):
            x = random(3, size, dtype=dtype)
            expected = walsh_transform(x, order, inverse=inverse)
            version = x._version
            assert walsh_transform(x, order, inverse=inverse, inplace=True) is x
            assert torch.equal(x, expected)
            assert x._version > version, "autograd must see that a saved tensor has changed"
    x = random(3, 5, 64)
    expected = walsh_transform(x, group_size=16)
    walsh_transform(x[1], group_size=16, inplace=True)
    assert torch.equal(x[1], expected[1])
    x[:0] = walsh_transform(x[:0], inplace=True)
    with torch.inference_mode():
        x = random(3, 64)
        expected = walsh_transform(x)
        assert torch.equal(walsh_transform(x, inplace=True), expected)


def test_in_place_change_of_a_saved_tensor_is_noticed() -> None:
    x, weight = random(64), random(64, seed=1).requires_grad_()
    y = (x * weight).sum()
    walsh_transform(x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_in_place_refuses_what_it_cannot_do() -> None:
    x = random(4, 64)
    with pytest.raises(ValueError, match=r"walsh_transform_?: .*contiguous"):
        walsh_transform(x.T.contiguous().T, inplace=True)
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"inplace needs an x that does not require grad.*pass inplace=False"):
        walsh_transform(x, inplace=True)
    with torch.no_grad():
        walsh_transform(x, inplace=True)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        x = torch.empty(shape, dtype=dtype)
        y = walsh_transform(x, group_size=64)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        q, scale = walsh_quantize(x, 4, packed=True, group_size=64)
        assert q.shape == (*shape[:-1], shape[-1] // 2)
        assert scale.shape == shape[:-1]


def arguments(size: int, order: str) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """Base, permutation and group_size as the operators take them."""
    m, _ = factor_size(size)
    base = hadamard_matrix(m).float() if m > 1 else None
    return base, sequency_permutation(size).int() if order == "sequency" else None, size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), [((64,), 64), ((3, 96), 96), ((2, 3, 96), 24), ((0, 16), 16)])
@pytest.mark.parametrize("order", ORDERS)
def test_opcheck(dtype: torch.dtype, shape: tuple[int, ...], size: int, order: str) -> None:
    x = random(*shape, dtype=dtype)
    tables = arguments(size, order)
    namespace = torch.ops.rcp_kernels
    torch.library.opcheck(namespace.walsh_transform.default, (x, *tables, 0.5, False))
    torch.library.opcheck(namespace.walsh_transform.default, (x, *tables, 0.5, True))
    torch.library.opcheck(namespace.walsh_transform_.default, (x, *tables, 0.5, False))
    for bits, packed in ((4, True), (8, False)):
        torch.library.opcheck(namespace.walsh_quantize.default, (x, *tables, 0.5, False, bits, 0.9, packed))


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_is_the_transpose(size: int, order: str, inverse: bool) -> None:
    x = random(3, 2 * size).requires_grad_()
    y = walsh_transform(x, order, size, 0.7, inverse)
    grad_y = random(3, 2 * size, seed=1)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    assert torch.equal(grad, walsh_transform(grad_y, order, size, 0.7, not inverse))
    matrix = hadamard_matrix(size).double() * 0.7
    matrix = matrix[sequency_permutation(size)] if order == "sequency" else matrix
    matrix = torch.block_diag(matrix, matrix)
    expected = grad_y.double() @ (matrix.T if inverse else matrix)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_agrees_with_finite_differences() -> None:
    weight = random(24, seed=1).double()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (walsh_transform(x.float()).double().tanh() * weight).sum()

    x = random(24).requires_grad_()
    loss(x).backward()
    step = 1e-2 * torch.eye(24)
    slopes = torch.stack([(loss(x.detach() + row) - loss(x.detach() - row)) / 2e-2 for row in step])
    torch.testing.assert_close(x.grad.double(), slopes, rtol=1e-2, atol=1e-3)


def test_gradient_of_the_gradient() -> None:
    x = random(2, 24).requires_grad_()
    (grad,) = torch.autograd.grad(walsh_transform(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    expected = torch.autograd.functional.hessian(
        lambda x: (x @ (hadamard_matrix(24)[sequency_permutation(24)].float() / 24**0.5).T).pow(3).sum(), x.detach()
    )
    torch.testing.assert_close(second, expected.sum((0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = random(3, 64, dtype=dtype).requires_grad_()
    walsh_transform(x).sum().backward()
    assert x.grad.dtype == dtype


def test_gradient_only_where_it_is_asked_for() -> None:
    x = random(3, 64)
    assert walsh_transform(x).grad_fn is None
    with torch.no_grad():
        assert walsh_transform(x.requires_grad_()).grad_fn is None


def test_what_inference_mode_made_serves_training() -> None:
    with torch.inference_mode():
        walsh_transform(random(2, 208))  # 52 * 4, a size that no other test uses
    x = random(2, 208).requires_grad_()
    walsh_transform(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend: str) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = walsh_transform(x) + walsh_transform(x, "natural", 16, 0.5, True)
        return y, *walsh_quantize(y.detach(), packed=True), walsh_transform(y.detach().clone(), inplace=True)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for rows in (2, 5, 7):
        x = random(rows, 96)
        for found, expected in zip(compiled(x), function(x), strict=True):
            assert torch.equal(found, expected)
    x = random(3, 96).requires_grad_()
    (expected,) = torch.autograd.grad(function(x)[0].square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_compiled_in_place_changes_its_argument() -> None:
    compiled = torch.compile(lambda x: walsh_transform(x, inplace=True).sum(), fullgraph=True, backend="aot_eager")
    x = random(3, 96)
    expected = walsh_transform(x)
    compiled(x)
    assert torch.equal(x, expected)
