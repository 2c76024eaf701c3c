"""torch.ops.rcp_kernels.decode_attention against float64, on every ISA of this machine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lut_linear import DTYPES, SUPPORTED, restore_isa, restore_threads  # noqa: F401

from rcp_kernels import ops


def case(batch, kv_heads, groups, dim, length, capacity, dtype, seed, shared=True):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    qkv = noise(batch, 1, (groups + 2) * kv_heads * dim)
    angle = 6 * torch.rand(1 if shared else batch, 1, dim // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    keys, values = (torch.full((batch, kv_heads, capacity, dim), torch.nan, dtype=dtype) for _ in range(2))
    for storage in (keys, values):
        storage[:, :, :length] = noise(batch, kv_heads, length, dim)
    return qkv, cos, sin, keys, values


@pytest.mark.usefixtures("restore_isa")
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    dim=st.integers(1, 70).map(lambda half: 2 * half),
    length=st.integers(0, 70),
    room=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference(batch, kv_heads, groups, dim, length, room, dtype, shared, seed):
    arguments = case(batch, kv_heads, groups, dim, length, length + room, dtype, seed, shared)
    storage = [x.clone() for x in arguments[3:]]
    expected = ops.reference.decode_attention(*arguments[:3], *storage, length, dim**-0.5)
    outputs = []
    for isa in range(len(SUPPORTED)):
        torch.ops.rcp_kernels.set_cpu_isa(isa)
        mine = [x.clone() for x in arguments[3:]]
        y = ops.decode_attention(*arguments[:3], *mine, length, dim**-0.5)
        assert y.dtype == dtype
        for a, b in zip(mine, storage, strict=True):
            assert torch.equal(a.nan_to_num(1e3), b.nan_to_num(1e3)), "keys and values are stored bit for bit"
        bound = 1e-5 * storage[1][:, :, : length + 1].double().abs().max()
        bound = bound + expected.abs() * (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
        assert ((y.double() - expected).abs() <= bound).all(), SUPPORTED[isa]
        outputs.append(y)
    assert all(torch.equal(y, outputs[0]) for y in outputs), "the instruction sets differ"


@pytest.mark.usefixtures("restore_threads")
def test_threads_do_not_change_a_bit():
    arguments = case(3, 4, 2, 64, 1000, 1001, torch.float32, 0)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.decode_attention(*arguments, 1000, 0.125))
    assert torch.equal(*results)


@pytest.mark.parametrize("factor", [0.0, 1e3])
def test_equal_and_very_unequal_scores(factor):
    qkv, cos, sin, keys, values = case(1, 1, 1, 16, 20, 21, torch.float32, 0)
    y = ops.decode_attention(qkv * factor, cos, sin, keys.clone(), values.clone(), 20, 1.0)
    expected = ops.reference.decode_attention(qkv * factor, cos, sin, keys.clone(), values.clone(), 20, 1.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 0), (2, 7)])
def test_opcheck(dtype, batch, length):
    arguments = case(batch, 2, 3, 8, length, 9, dtype, 0)
    for storage in arguments[3:]:
        storage.nan_to_num_()
    torch.library.opcheck(torch.ops.rcp_kernels.decode_attention.default, (*arguments, length, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.ones(2, 2, 80)}, r"qkv must have shape \[batch, 1, features\], got \[2, 2, 80\]"),
        ({"qkv": torch.ones(2, 1, 81)}, "got 81 features"),
        ({"qkv": torch.ones(2, 1, 32)}, "got 32 features"),
        ({"qkv": torch.ones(2, 1, 80).double()}, "qkv must be float32"),
        ({"cos": torch.ones(3, 1, 8)}, r"cos and sin must have shape .* got \[3, 1, 8\]"),
        ({"sin": torch.ones(1, 1, 7)}, r"sin must have shape \[1, 1, 8\]"),
        ({"keys": torch.ones(2, 2, 9, 8).half()}, "keys must be Float, got Half"),
        ({"values": torch.ones(2, 2, 8, 8)}, r"values must have shape \[2, 2, 9, 8\]"),
        ({"keys": torch.ones(2, 9, 2, 8).transpose(1, 2)}, "keys and values must be contiguous"),
        ({"length": 9}, r"length must be from 0 to capacity - 1 \(8\), got 9"),
        ({"length": -1}, "got -1"),
        ({"scale": float("nan")}, "scale must be finite"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "qkv": torch.ones(2, 1, 80), "cos": torch.ones(1, 1, 8), "sin": torch.ones(1, 1, 8),
        "keys": torch.ones(2, 2, 9, 8), "values": torch.ones(2, 2, 9, 8), "length": 3, "scale": 1.0,
    }  # fmt: skip
    torch.ops.rcp_kernels.decode_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.rcp_kernels.decode_attention(**(arguments | change))
