"""walsh_transform and walsh_quantize: export, fake tensors, bad arguments and values that are not finite."""

import pytest
import torch
from test_walsh_transform import random

from rcp_kernels import ops, walsh_quantize, walsh_transform


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return walsh_transform(x, group_size=48)

    program = torch.export.export(Model(), (random(2, 96),), strict=strict)
    x = random(2, 96, seed=1)
    assert torch.equal(program.module()(x), walsh_transform(x, group_size=48))


def test_meta_and_fake_tensors() -> None:
    x = torch.empty((3, 96), dtype=torch.float16, device="meta")
    assert (walsh_transform(x).shape, walsh_transform(x).dtype) == (x.shape, torch.float16)
    q, scale = walsh_quantize(x, packed=True)
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((3, 48), torch.uint8, (3,), torch.float32)
    real = random(3, 96)
    for _ in range(2):  # neither before nor after real tensors of that size exist does one kind reach the other
        with torch._subclasses.FakeTensorMode():
            assert walsh_transform(torch.empty((3, 96))).shape == (3, 96)
        assert type(walsh_transform(real)) is torch.Tensor


@pytest.mark.parametrize("function", [walsh_transform, walsh_quantize, ops.reference.walsh_transform])
@pytest.mark.parametrize(
    ("x", "keywords", "message"),
    [
        (torch.ones(2, 100), {}, r"got 100 = 25 \* 4, .* the largest group_size that works is 20"),
        (torch.ones(2, 4095), {}, r"got 4095 = 4095 \* 1, .* no group_size above 1"),
        (torch.ones(2, 0), {}, r"size must be at least 1, got 0"),
        (torch.ones(2, 96), {"group_size": 9}, r"got 9 = 9 \* 1"),
        (torch.ones(2, 96), {"group_size": 0}, r"size must be at least 1, got 0"),
        (torch.ones(2, 96), {"group_size": 64}, r"group_size must divide the last dimension.*got.*64.*"),
        (torch.ones(2, 96), {"order": "hadamard"}, r"order must be one of .*, got 'hadamard'; check"),
        (torch.tensor(1.0), {}, r"at least one dimension, got a scalar; use x\[None\]"),
    ],
)
def test_bad_arguments(function, x: torch.Tensor, keywords: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(x, **keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("backend", ["cpu", "meta"])
def test_bad_dtypes(dtype: torch.dtype, backend: str) -> None:
    x = torch.ones((2, 64), dtype=dtype, device=backend)
    for function in (walsh_transform, walsh_quantize, lambda x: walsh_transform(x, inplace=True)):
        with pytest.raises(ValueError, match=r"must be float32, float16 or bfloat16, got .*; convert"):
            function(x)


def test_fake_kernels_check_their_input() -> None:
    x = torch.empty((2, 96), device="meta")
    for function in (walsh_transform, walsh_quantize, lambda x, **kw: walsh_transform(x, inplace=True, **kw)):
        with pytest.raises(ValueError, match=r"group_size must divide the last dimension.*64"):
            function(x, group_size=64)
    with pytest.raises(ValueError, match=r"contiguous"):
        walsh_transform(x.T, group_size=2, inplace=True)
    with pytest.raises(ValueError, match=r"packed storage is for 4 bits"):
        walsh_quantize(x, 8, packed=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value: float) -> None:
    x = random(3, 64)
    x[1, 5] = value
    y = walsh_transform(x)
    assert not bool(torch.isfinite(y[1]).any())
    assert bool(torch.isfinite(y[[0, 2]]).all())
    with pytest.raises(ValueError, match=r"token 1 holds NaN or Inf"):
        walsh_quantize(x)
