"""The Triton kernels of walsh_transform against the reference. test_triton_walsh_transform.py runs this."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcp_kernels.ops.reference import quantize_activation
from rcp_kernels.ops.reference import walsh_transform as reference
from rcp_kernels.ops.walsh_matrices import BASE_ORDERS, factor_size
from rcp_kernels.ops.walsh_transform import transform_tables
from rcp_kernels.triton.walsh_transform import launch as kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = ("sequency", "natural")
POWERS = [2**k for k in range(16)]
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

# Every base order alone and doubled, model sizes, and sizes that take two kernels (the last row).
OTHERS = [m * c for m in BASE_ORDERS[1:] if m != 40 for c in (1, 2)]
OTHERS += [160, 576, 1536, 3072, 5120, 5504, 11008, 13824, 14336]
OTHERS += [12288, 18432, 22016, 24576, 27648, 28672]


@pytest.fixture(autouse=True, scope="module")
def sums_in_order():
    """A dot product that takes k in order, as a GPU's multiply-adds do. numpy's depends on where in b a column is."""
    if DEVICE != "cpu":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        result = total.data
        for k in range(b.data.shape[0]):
            result = result + a.data[:, k : k + 1].astype(np.float32) * b.data[k].astype(np.float32)
        return TensorHandle(result, total.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def arguments(x: torch.Tensor, size: int, order: str) -> tuple[torch.Tensor | None, torch.Tensor | None, int, float]:
    return *transform_tables("test", x, size, order), size, size**-0.5


def transform(x: torch.Tensor, size: int, order: str, inverse: bool = False) -> torch.Tensor:
    """The kernel, into a NaN-filled tensor between guards: it writes every element, and nothing else."""
    guard = 64
    buffer = torch.full((x.numel() + 2 * guard,), float("nan"), dtype=x.dtype, device=x.device)
    y = buffer[guard : guard + x.numel()].view(x.shape)
    base, permutation, size, scale = arguments(x, size, order)
    kernels._transform_into(y, x.contiguous(), base, permutation, size, scale, inverse)
    assert buffer[:guard].isnan().all()
    assert buffer[buffer.numel() - guard :].isnan().all()
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", POWERS)
def test_powers_of_two_are_the_reference_bit_for_bit(size, order, dtype):
    x = random(max(3, 2500 // size), size, dtype=dtype, seed=size)
    expected = reference(x, order, dtype=torch.float32).to(dtype)
    assert torch.equal(transform(x, size, order), expected)
    assert torch.equal(transform(x, size, order, inverse=True), expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", OTHERS)
def test_other_sizes_are_as_good_as_torch(size, order, inverse):
    for dtype in DTYPES:
        x = random(3, size, dtype=dtype, seed=size)[: 3 if size < 2000 else 1]
        exact = reference(x, order, inverse=inverse)
        # A transform in half precision takes torch long, and is far worse than half a unit in the last place.
        allowed = torch.finfo(dtype).eps * exact.abs().max() * 0.51
        if dtype == torch.float32:
            in_torch = reference(x, order, inverse=inverse, dtype=dtype).double()
            allowed = 2 * (in_torch - exact).abs().max() + allowed
        assert (transform(x, size, order, inverse).double() - exact).abs().max() <= allowed, dtype


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 5), (2, 1), (8, 255), (128, 15), (128, 16), (128, 33), (2048, 2), (576, 7)]
)
@pytest.mark.parametrize("order", ORDERS)
def test_any_number_of_rows(size, rows, order):
    x = random(rows, size)
    expected = reference(x, order)
    torch.testing.assert_close(transform(x, size, order).double(), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize(("size", "groups"), [(128, 5), (4, 3), (2048, 3), (12, 7), (576, 2), (28672, 2)])
@pytest.mark.parametrize("order", ORDERS)
def test_groups_are_transformed_one_by_one(size, groups, order):
    x = random(3, groups * size)
    y = transform(x, size, order)
    assert torch.equal(y, transform(x.view(-1, size), size, order).view_as(y))


@pytest.mark.parametrize("size", [8, 128, 4096, 32768, 12, 576, 3072, 11008, 28672])
@pytest.mark.parametrize("order", ORDERS)
def test_inverse_undoes(size, order):
    x = random(3, size)
    torch.testing.assert_close(transform(transform(x, size, order), size, order, True), x, atol=2e-5, rtol=0)


def test_leading_dimensions_strides_and_emptiness():
    x = random(4, 64, 3, 5)
    base, permutation, size, scale = arguments(x, 64, "sequency")
    x = x.movedim(1, -1)
    y = kernels.walsh_transform(x, base, permutation, size, scale, False)
    assert y.is_contiguous()
    assert torch.equal(y, kernels.walsh_transform(x.contiguous(), base, permutation, size, scale, False))
    for shape in ((0, 64), (3, 0)):
        assert kernels.walsh_transform(x.new_empty(shape), base, permutation, size, scale, False).shape == shape
        q, scales = kernels.walsh_quantize(x.new_empty(shape), base, permutation, size, scale, False, 4, 1.0, True)
        assert (q.shape, scales.tolist()) == ((shape[0], shape[1] // 2), [0.0] * shape[0])


@pytest.mark.parametrize("size", [16, 128, 8192, 32768, 576, 14336, 28672])
@pytest.mark.parametrize("order", ORDERS)
def test_in_place(size, order):
    x = random(3, size, dtype=torch.bfloat16)
    for inverse in (False, True):
        expected = transform(x, size, order, inverse)
        overwritten = x.clone()
        assert kernels.walsh_transform_(overwritten, *arguments(x, size, order), inverse) is None
        assert torch.equal(overwritten, expected)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernels.walsh_transform_(x.T, *arguments(x, size, order), False)


def test_subnormal_and_huge_values():
    x = random(3, 256)
    for factor in (2.0**-140, 2.0**100):
        assert torch.equal(transform(x * factor, 256, "sequency"), reference(x * factor, dtype=torch.float32))
    # float16 overflows only where the rounded result does: sums are float32.
    x = torch.full((1, 4096), 60000.0, dtype=torch.float16, device=DEVICE)
    y = kernels.walsh_transform(x, *transform_tables("test", x, 4096, "sequency"), 4096, 2.0**-12, False)
    assert y[0, 0] == 60000
    assert not y[0, 1:].any()


@pytest.mark.parametrize(
    ("size", "groups", "order"),
    [
        (128, 1, "sequency"),
        (128, 32, "sequency"),
        (128, 45, "natural"),
        (128, 300, "sequency"),  # more than one tile holds
        (16384, 3, "natural"),
        (2, 5, "natural"),
        (1, 7, "natural"),
        (64, 1, "natural"),
        (4096, 1, "sequency"),
        (4096, 1, "natural"),
        (32768, 1, "sequency"),
        (576, 1, "sequency"),
        (12, 11, "sequency"),
        (14336, 1, "natural"),
        (11008, 1, "sequency"),
        (5504, 7, "natural"),
        (28672, 1, "sequency"),
        (12288, 3, "natural"),
    ],
)
def test_quantize_is_the_two_in_sequence_bit_for_bit(size, groups, order, monkeypatch):
    # What new_empty gives is not to be found in a result.
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(85))
    for dtype, bits, packed, clip in (
        (torch.float32, 8, False, 1.0),
        (torch.float16, 4, True, 0.9),
        (torch.bfloat16, 4, False, 1.0),
        (torch.bfloat16, 4, True, 1.0),
    ):
        for inverse in (False, True) if size in (576, 128) else (False,):
            x = random(2, size * groups, dtype=dtype, seed=size)
            x[1] *= 2.0**-60
            rotated = kernels.walsh_transform(x, *arguments(x, size, order), inverse)
            expected = quantize_activation(rotated, bits, clip, packed)
            found = kernels.walsh_quantize(x, *arguments(x, size, order), inverse, bits, clip, packed)
            assert [t.dtype for t in found] == [t.dtype for t in expected]
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b), (dtype, bits, packed, inverse)


def test_quantize_vanishing_tokens_and_ties():
    x = torch.zeros(5, 64, device=DEVICE)
    x[1, 0] = 2.0**-119
    x[2, 0] = 2.0**-130
    x[3] = torch.arange(64) - 31.5  # of natural order and size 1 the values themselves: halves
    x[4] = torch.arange(64) * 0.5
    x[4, 63] = 127 * 0.5
    for size in (1, 64):
        for bits in (4, 8):
            rotated = kernels.walsh_transform(x, *arguments(x, size, "natural"), False)
            found = kernels.walsh_quantize(x, *arguments(x, size, "natural"), False, bits)
            for a, b in zip(found, quantize_activation(rotated, bits), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("size", [128, 4096, 576, 28672])
def test_quantize_flags_what_is_not_finite(size):
    x = random(6, size * (3 if size == 128 else 1), dtype=torch.float16)
    x[1, 5] = float("nan")
    x[3, 0] = float("inf")
    x[4] = 60000  # finite, but the sum of all of them is not, times 1/sqrt(size)
    for packed in (False, True):
        q, scale = kernels.walsh_quantize(x, *arguments(x, size, "sequency"), False, 4, 1.0, packed)
        assert scale.isnan().tolist() == [False, True, False, True, True, False]
        assert not q[[1, 3, 4]].any()
        good = x[[0, 2, 5]]
        for a, b in zip(
            (q, scale),
            kernels.walsh_quantize(good, *arguments(good, size, "sequency"), False, 4, 1.0, packed),
            strict=True,
        ):
            assert torch.equal(a[[0, 2, 5]], b)


def test_two_runs_agree():
    for size in (4096, 576, 28672):
        x = random(5, size, dtype=torch.float16)
        first, second = (transform(x, size, "sequency") for _ in range(2))
        assert torch.equal(first, second)


@settings(max_examples=30)
@given(
    size=st.sampled_from(
        [s for s in range(1, 2049) if any(s % m == 0 and (s // m).bit_count() == 1 for m in BASE_ORDERS)]
    ),
    groups=st.integers(1, 4),
    rows=st.integers(1, 9),
    order=st.sampled_from(ORDERS),
    inverse=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(size, groups, rows, order, inverse, dtype):
    x = random(rows, size * groups, dtype=dtype, seed=rows)
    found = transform(x, size, order, inverse)
    expected = reference(x, order, size, inverse=inverse)
    torch.testing.assert_close(
        found.double(), expected, atol=float(8 * torch.finfo(dtype).eps * expected.abs().max()), rtol=0
    )
    q, scale = kernels.walsh_quantize(x, *arguments(x, size, order), inverse, 4, 1.0, True)
    for a, b in zip((q, scale), quantize_activation(found, 4, 1.0, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_cover_a_transform_and_chunks_its_bits(dtype):
    for size in POWERS + OTHERS:
        m = factor_size(size)[0]
        for groups in (0, 1, 3, 500):
            for order in ORDERS:
                tile = kernels.tile_config(size, dtype, m, groups, order == "sequency")
                assert tile.blocks * tile.columns * tile.m == size
                assert 1 <= tile.warps <= 16
                assert tile.rows * tile.padded_m * tile.columns >= 32 * tile.warps
                if tile.chunks:
                    assert 2 ** sum(tile.chunks) * tile.halves == tile.c


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 24, dtype=torch.float64)}, "x must be float32, float16 or bfloat16"),
        ({"group_size": 7}, "group_size must divide"),
        ({"group_size": 6}, "group_size must be a power of two times 12"),
        ({"base": torch.ones(12, 12, dtype=torch.int8)}, "base must be a square float32 matrix"),
        ({"permutation": torch.zeros(24, dtype=torch.int64)}, r"permutation must be int32 \[24\]"),
        ({"bits": 5}, r"bits must be one of \(4, 8\), got 5"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\]"),
        ({"bits": 8, "packed": True}, "packed storage is for 4 bits"),
    ],
)
def test_errors_name_the_rule_and_the_value(change, message):
    x = torch.zeros(2, 24)
    base, permutation = transform_tables("test", x, 24, "sequency")
    call = {
        "x": x,
        "base": base,
        "permutation": permutation,
        "group_size": 24,
        "scale": 1.0,
        "inverse": False,
        "bits": 4,
    }
    with pytest.raises(ValueError, match=message):
        kernels.walsh_quantize(**{**call, **change})


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA tensors need a GPU")
def test_dispatch():
    x = random(3, 576)
    for order in ORDERS:
        expected = transform(x, 576, order)
        assert torch.equal(torch.ops.rcp_kernels.walsh_transform(x, *arguments(x, 576, order), False), expected)
        found = torch.ops.rcp_kernels.walsh_quantize(x, *arguments(x, 576, order), False, 4, packed=True)
        for a, b in zip(found, quantize_activation(expected, 4, 1.0, True), strict=True):
            assert torch.equal(a, b)
