"""The Triton kernels of walsh_transform, compiled for sm_80, executed, against the float64 reference.

What the interpreter executes (tests/interpreted) is Triton; this is what came out of its compiler.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

from ptx.triton_launch import ExecutedKernel

from rcp_kernels.ops.reference import quantize_activation
from rcp_kernels.ops.reference import walsh_transform as reference
from rcp_kernels.ops.walsh_transform import transform_tables
from rcp_kernels.triton.walsh_transform import launch as kernels

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def executed(monkeypatch):
    """The launches of the operators go to the executor; what it counted comes back."""
    transform = ExecutedKernel(kernels._transform_kernel, ("y_ptr",))
    quantize = ExecutedKernel(kernels._quantize_kernel, ("q_ptr", "scale_ptr"))
    monkeypatch.setattr(kernels, "_transform_kernel", transform)
    monkeypatch.setattr(kernels, "_quantize_kernel", quantize)
    return transform.counters, quantize.counters


def random(*shape: int, dtype: torch.dtype = SINGLE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def tables(x: torch.Tensor, size: int, order: str) -> tuple:
    return *transform_tables("test", x, size, order), size, size**-0.5


def assert_one_read(counters, name: str, tensor: torch.Tensor) -> None:
    traffic = counters.buffers[name]
    assert traffic.requested_sectors == traffic.distinct_sectors
    assert traffic.used_bytes == tensor.numel() * tensor.element_size()


# Every size class: less than a vector, less than a warp, one chunk, several, rows in a tile and one, two halves.
@pytest.mark.parametrize(
    ("size", "rows", "order", "dtype"),
    [
        (2, 1, "sequency", HALF),
        (2, 1027, "natural", SINGLE),
        (8, 3, "sequency", SINGLE),
        (32, 65, "sequency", BRAIN),
        (128, 17, "sequency", HALF),
        (128, 33, "natural", SINGLE),
        (1024, 3, "natural", HALF),
        (2048, 2, "sequency", BRAIN),
        (4096, 2, "sequency", HALF),
        (8192, 1, "sequency", SINGLE),
        (16384, 1, "natural", BRAIN),
        (32768, 1, "sequency", HALF),
    ],
)
def test_powers_of_two_bit_for_bit(executed, size, rows, order, dtype):
    x = random(rows, size, dtype=dtype)
    expected = reference(x, order, dtype=torch.float32).to(dtype)
    assert torch.equal(kernels.walsh_transform(x, *tables(x, size, order), False), expected)
    (counters,) = executed[0]
    assert_one_read(counters, "x_ptr", x)
    assert counters.by_class()["mma"] == 0


@pytest.mark.parametrize(
    ("size", "order", "inverse", "dtype", "launches"),
    [
        (12, "sequency", False, HALF, 1),
        (576, "sequency", False, HALF, 1),
        (576, "sequency", True, BRAIN, 1),
        (576, "natural", False, SINGLE, 1),
        (1536, "sequency", True, HALF, 1),
        (14336, "sequency", True, BRAIN, 1),
        (28672, "sequency", False, HALF, 2),
        (18432, "sequency", True, BRAIN, 2),
    ],
)
def test_sizes_with_a_dense_factor(executed, size, order, inverse, dtype, launches):
    rows = 3 if size < 2000 else 1
    x = random(rows, size, dtype=dtype)
    exact = reference(x, order, inverse=inverse)
    found = kernels.walsh_transform(x, *tables(x, size, order), inverse)
    allowed = torch.finfo(dtype).eps * exact.abs().max() * 0.51
    if dtype == SINGLE:
        allowed += 2 * (reference(x, order, inverse=inverse, dtype=dtype).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= allowed
    assert len(executed[0]) == launches
    # The base of a float32 tensor is multiplied by multiply-adds, the butterflies alone need no base.
    on_tensor_cores = sum(counters.by_class()["mma"] > 0 for counters in executed[0])
    assert on_tensor_cores == (dtype != SINGLE and (launches == 1 or inverse))


def test_groups_strides_and_in_place(executed):
    x = random(3, 10, 128, dtype=HALF).transpose(0, 1).reshape(10, 384)
    expected = reference(x, "sequency", 128, dtype=torch.float32).to(HALF)
    assert torch.equal(kernels.walsh_transform(x, *tables(x, 128, "sequency"), False), expected)
    overwritten = x.clone()
    kernels.walsh_transform_(overwritten, *tables(x, 128, "sequency"), False)
    assert torch.equal(overwritten, expected)
    # Tiles of 16 rows: the last one is not full.
    assert executed[0][0].blocks == 2


@pytest.mark.parametrize(
    ("size", "groups", "order", "dtype", "bits", "packed"),
    [
        (128, 32, "sequency", HALF, 4, True),
        (64, 3, "natural", SINGLE, 4, False),
        (4096, 1, "natural", SINGLE, 8, False),
        (4096, 1, "sequency", HALF, 4, True),
        (576, 1, "sequency", BRAIN, 4, False),
        (576, 1, "natural", HALF, 4, True),
        (1, 301, "natural", HALF, 4, True),
        (128, 130, "sequency", HALF, 4, True),
    ],
)
def test_quantized(executed, size, groups, order, dtype, bits, packed):
    """Bit for bit the transform, and then the quantization of what it gave."""
    x = random(3, groups * size, dtype=dtype)
    x[1] = 0
    arguments = tables(x, size, order) if size > 1 else (None, None, 1, 1.0)
    q, scale = kernels.walsh_quantize(x, *arguments, False, bits, 0.9, packed)
    y = kernels.walsh_transform(x, *arguments, False) if size > 1 else x
    wanted, wanted_scale = quantize_activation(y, bits, 0.9)
    assert torch.equal(scale, wanted_scale)
    if packed:
        q = torch.stack(((q << 4).view(torch.int8) >> 4, q.view(torch.int8) >> 4), -1).flatten(1)[:, : x.shape[1]]
    assert torch.equal(q, wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite(executed, bad):
    x = random(2, 1024, dtype=HALF)
    x[1, 77] = bad
    q, scale = kernels.walsh_quantize(x, *tables(x, 128, "sequency"), False, 4, 1.0, True)
    assert scale[0].isfinite()
    assert scale[1].isnan()
    assert q[1].eq(0).all()
