"""torch.ops.rcp_kernels.quantize_activation against the reference: bit-equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels import ops, quantize_activation

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    columns=st.integers(0, 300),
    bits=st.sampled_from([4, 8]),
    packed=st.booleans(),
    clip=st.sampled_from([1.0, 0.9, 0.1]),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-38, 1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(shape, columns, bits, packed, clip, dtype, magnitude, seed):
    packed = packed and bits == 4
    x = (torch.randn(*shape, columns, generator=torch.Generator().manual_seed(seed)) * magnitude).to(dtype)
    q, scale = quantize_activation(x, bits, clip, packed)
    expected_q, expected_scale = ops.reference.quantize_activation(x, bits, clip, packed)
    assert torch.equal(q, expected_q)
    assert q.dtype == expected_q.dtype
    assert torch.equal(scale, expected_scale)


def test_strides_do_not_matter():
    x = torch.randn(40, 6).t()
    for a, b in zip(quantize_activation(x, 8), quantize_activation(x.contiguous(), 8), strict=True):
        assert torch.equal(a, b)


def test_many_tokens_use_threads_and_agree():
    x = torch.randn(700, 512)
    q, scale = quantize_activation(x, 4)
    expected_q, expected_scale = ops.reference.quantize_activation(x, 4)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 8, got 5"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\]"),
        ({"clip": float("nan")}, r"clip must be in \(0, 1\]"),
        ({"bits": 8, "packed": True}, "packed storage holds two 4-bit values"),
        ({"x": torch.tensor(1.0)}, "at least one dimension"),
        ({"x": torch.ones(3, dtype=torch.int64)}, "must be float32, float16 or bfloat16, got Long"),
        ({"x": torch.tensor([[1.0], [torch.nan]])}, "token 1 holds NaN or Inf"),
        ({"x": torch.tensor([[torch.inf], [1.0]])}, "token 0 holds NaN or Inf"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.rcp_kernels.quantize_activation(**({"x": torch.ones(2, 4), "bits": 4} | arguments))
