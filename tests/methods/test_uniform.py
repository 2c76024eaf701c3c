"""UniformQuantizer: levels that need no table, the value that is stored, and what the start covers.

Its gradients are in test_ldp.py, beside those of the other quantizer.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcp_kernels.methods.uniform import UniformQuantizer


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(packed) -> torch.Tensor:
    """int64 [N, groups, 2**bits], also for a weight that stores only the first level."""
    levels = packed.as_table().levels
    return levels.to(torch.int64)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 5),
    in_features=st.integers(1, 150),
    bits=st.sampled_from((2, 3, 4)),
    group_size=st.sampled_from((32, 64, 128, None)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    magnitude=st.sampled_from((1e-30, 1e-5, 1.0, 1e3)),
    shift=st.sampled_from((0.0, -8.0, 8.0)),
    seed=st.integers(0, 2**31),
)
def test_levels_are_a_progression_and_forward_is_what_is_stored(
    rows, in_features, bits, group_size, dtype, magnitude, shift, seed
):
    group_size = in_features if group_size is None else group_size
    weight = ((torch.randn((rows, in_features), generator=generator(seed)) + shift) * magnitude).to(dtype)
    quantizer = UniformQuantizer(weight.shape, bits, group_size)
    quantizer.init_clip_search(weight)
    with torch.no_grad():  # arbitrary values, as after a training
        quantizer.scale.mul_(torch.randn(quantizer.scale.shape, generator=generator(seed + 1)) + 0.5)
        quantizer.zero.add_(torch.randn(quantizer.zero.shape, generator=generator(seed + 2)) * 4)
    packed = quantizer.export(weight)
    levels = table(packed)
    assert bool((levels.diff(dim=-1) == 2 ** (7 - bits)).all())
    assert int(levels.abs().max()) <= 127
    value = quantizer(weight)
    assert value.dtype == dtype
    assert torch.equal(value, packed.dequantize().to(dtype))

    # By the definition, in float64: the nearest of the levels.
    values = levels.double() * packed.scales.double()[..., None] * packed.tensor_scale.double()
    groups = torch.arange(in_features) // group_size
    distance = (weight.double()[..., None] - values[:, groups]).abs().amin(-1)
    found = (weight.double() - packed.dequantize().double()).abs()
    assert bool((found <= distance * (1 + 1e-6) + values.abs().max() * 1e-7).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shift", [0.0, 1.5, -1.5])
def test_the_start_reaches_from_minimum_to_maximum(bits, shift):
    weight = torch.randn((8, 256), generator=generator(0)) + shift
    quantizer = UniformQuantizer(weight.shape, bits, 64)
    quantizer.init_uniform(weight)
    error = (quantizer(weight) - weight).abs().view(8, 4, 64).amax(-1)
    # Half a step, and half a step of the zero-point.
    assert bool((error <= quantizer.scale * (0.5 + 0.5 / 2 ** (7 - bits) + 2**-9)).all())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_that_are_all_far_from_zero(bits, sign):
    weight = sign * torch.linspace(10.0, 11.0, 64).view(1, 64)
    quantizer = UniformQuantizer(weight.shape, bits, 64)
    quantizer.init_uniform(weight)
    # int8 cannot hold levels of this range only. Levels nearer to zero stay unused.
    assert float(quantizer.levels().detach().abs().max()) == pytest.approx(11.0)
    value = quantizer(weight).detach()
    assert float((value - weight).abs().max()) <= float(quantizer.scale.detach().max()) * (0.5 + 2**-9)
    assert torch.equal(value, quantizer.export(weight).dequantize())
    quantizer.init_clip_search(weight)  # its error is at most that of the full range
    assert float((quantizer(weight) - weight).detach().square().sum()) <= 1.1 * float((value - weight).square().sum())


def test_the_zero_point_is_fine_to_a_sixteenth_of_a_step():
    weight = torch.zeros((1, 32))
    quantizer = UniformQuantizer(weight.shape, 3, 32)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        for zero, first in ((3.0, -48), (3.03, -48), (3.04, -49), (100.0, -127), (-100.0, 15), (math.pi, -50)):
            quantizer.zero.fill_(zero)
            assert int(table(quantizer.export(weight))[0, 0, 0]) == first


def test_a_group_of_zeros_and_what_is_not_finite():
    weight = torch.zeros((2, 64))
    quantizer = UniformQuantizer(weight.shape, 3, 64)
    quantizer.init_clip_search(weight)
    assert not quantizer(weight).any()
    assert not quantizer.export(weight).dequantize().any()
    with pytest.raises(ValueError, match="weight must be finite, got NaN or Inf"):
        quantizer.export(torch.full((2, 64), math.inf))
    with torch.no_grad():
        quantizer.zero[1] = math.nan
    with pytest.raises(ValueError, match="zero must be finite, got NaN or Inf"):
        quantizer.export(weight)


def test_a_zero_point_outside_of_what_fits_gets_no_gradient():
    weight = torch.randn((1, 64), generator=generator(0))
    quantizer = UniformQuantizer(weight.shape, 3, 32)
    quantizer.init_uniform(weight)
    with torch.no_grad():
        quantizer.zero[0, 0] = 50.0
    quantizer(weight).square().sum().backward()
    assert float(quantizer.zero.grad[0, 0]) == 0.0
    assert float(quantizer.zero.grad[0, 1]) != 0.0
