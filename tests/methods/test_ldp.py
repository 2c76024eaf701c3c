"""The trained quantizers: stored values exactly, and gradients against finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rcp_kernels import quantize_weight
from rcp_kernels.formats import snap_levels
from rcp_kernels.methods import fake_quantize as module
from rcp_kernels.methods.fake_quantize import fake_quantize, group_range, snap
from rcp_kernels.methods.ldp import LearnableDirectPartitioning
from rcp_kernels.methods.uniform import UniformQuantizer
from rcp_kernels.ops import clip_search, kmeans_levels
from rcp_kernels.ops.clip_search import CLIP_RATIOS


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scattered(quantizer: LearnableDirectPartitioning, seed: int = 0) -> LearnableDirectPartitioning:
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator(seed)))
    return quantizer


def error(weight: Tensor, quantized: Tensor) -> float:
    return float((weight.detach().double() - quantized.detach().double()).square().sum())


@given(
    rows=st.integers(1, 5),
    in_features=st.integers(1, 200),
    bits=st.sampled_from((2, 3, 4)),
    group_size=st.sampled_from((32, 64, 128, None)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    result=st.sampled_from((None, torch.float32, torch.bfloat16)),
    magnitude=st.sampled_from((1e-30, 1e-5, 1.0, 1e4)),
    seed=st.integers(0, 2**31),
)
def test_forward_is_what_export_stores(
    rows: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    dtype: torch.dtype,
    result: torch.dtype | None,
    magnitude: float,
    seed: int,
) -> None:
    group_size = in_features if group_size is None else group_size
    weight = (torch.randn((rows, in_features), generator=generator(seed)) * magnitude).to(dtype)
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, bits, group_size), seed)
    uniform = UniformQuantizer(weight.shape, bits, group_size)
    uniform.init_uniform(weight)
    for each in (quantizer, uniform):
        value = each(weight, result)
        packed = each.export(weight)
        assert value.dtype == (result or dtype)
        assert (packed.bits, packed.group_size) == (bits, group_size)
        assert torch.equal(value, packed.dequantize().to(value.dtype))


def test_forward_is_the_same_under_autocast() -> None:
    weight = torch.randn((8, 96), generator=generator(0))
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, 2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(weight), quantizer.export(weight).dequantize())
        assert torch.equal(quantizer(weight, torch.bfloat16), quantizer.export(weight).dequantize().bfloat16())


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-20, 1.0, 1e30])
def test_snap_is_the_formats(magnitude: float) -> None:
    levels = torch.randn((6, 5, 4), generator=generator(0)).sort(-1).values * magnitude
    levels[2] *= 1e-6  # float16 scales that are subnormal next to the others
    levels[3] = 0.0
    table, scales, tensor_scale = snap_levels(levels)
    assert torch.equal(snap(levels), table.float() * scales.float()[..., None] * tensor_scale)


def test_nan_shows() -> None:
    weight = torch.randn((2, 64), generator=generator(0))
    weight[1, 3] = float("nan")
    assert bool(LearnableDirectPartitioning(weight.shape, 2, 32)(weight)[1, :32].isnan().all())
    with pytest.raises(ValueError, match="must be finite"):
        LearnableDirectPartitioning(weight.shape, 2, 32).export(weight)


def test_chunks_and_strides_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn((200, 50), generator=generator(0))
    quantizer = scattered(LearnableDirectPartitioning((50, 200), 2, 64))
    results = []
    for chunk, weight in ((10**9, base.t().contiguous()), (1, base.t().contiguous()), (700, base.t())):
        monkeypatch.setattr(module, "_CHUNK_WEIGHTS", chunk)
        weight = weight.detach().requires_grad_()
        quantizer.zero_grad()
        value = quantizer(weight)
        value.backward(torch.randn((50, 200), generator=generator(1)))
        results.append((value, weight.grad, *(p.grad for p in quantizer.parameters())))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def plain(quantizer: LearnableDirectPartitioning, weight: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The formulas of the class in float64, without the snap, for full groups: the base of finite differences."""
    groups = weight.double().unflatten(1, (-1, quantizer.group_size))
    low = torch.sigmoid(values["beta"]) * groups.amin(-1)
    high = torch.sigmoid(values["gamma"]) * groups.amax(-1)
    if quantizer.bits == 2:
        p1 = torch.sigmoid(values["s1"])
        p2 = (1 - p1) * torch.sigmoid(values["s2"])
        shares = torch.stack([torch.zeros_like(p1), p1, p1 + p2, torch.ones_like(p1)], -1)
    else:
        shares = torch.linspace(0, 1, 2**quantizer.bits, dtype=torch.float64).expand(*low.shape, -1)
    levels = low[..., None] + (high - low)[..., None] * shares
    nearest = (groups[..., None] - levels[..., None, :]).abs().argmin(-1)
    return levels.gather(-1, nearest).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_parameter_gradients_are_finite_differences(bits: int) -> None:
    weight = torch.randn((3, 128), generator=generator(0))
    upstream = torch.randn((3, 128), generator=generator(1))
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, bits, 64))
    start = {name: parameter.detach().double() for name, parameter in quantizer.named_parameters()}
    # Weights next to a threshold are left out: the snap gives them another level.
    upstream[(plain(quantizer, weight, start) - quantizer(weight).detach()).abs() > 0.02] = 0.0
    assert int(upstream.count_nonzero()) > 350
    quantizer(weight).backward(upstream)
    assert len(start) == (4 if bits == 2 else 2)
    step = 1e-7  # so small that no weight changes its level
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None
        for index in range(parameter.numel()):
            ends = []
            for sign in (1, -1):
                moved = start[name].clone()
                moved.view(-1)[index] += sign * step
                ends.append(plain(quantizer, weight, {**start, name: moved}))
            expected = float(((ends[0] - ends[1]) * upstream).sum()) / (2 * step)
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(expected, rel=1e-4, abs=1e-4), name


def test_weight_gradient_is_straight_through_inside_the_clip() -> None:
    weight = torch.randn((4, 96), generator=generator(0)).requires_grad_()
    upstream = torch.randn((4, 96), generator=generator(1))
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, 2, 32))
    levels = quantizer.levels(weight).detach().repeat_interleave(32, 1)
    quantizer(weight).backward(upstream)
    inside = (weight > levels[..., 0]) & (weight < levels[..., -1])
    assert 0 < int(inside.sum()) < weight.numel()
    assert torch.equal(weight.grad, torch.where(inside, upstream, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_come_back_in_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = torch.randn((4, 70), generator=generator(0)).to(dtype)
    upstream = torch.randn((4, 70), generator=generator(1)).to(torch.bfloat16)
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, 2, 32))
    grads = []
    for each in (weight, weight.float()):
        each.requires_grad_()
        quantizer.zero_grad()
        quantizer(each, torch.bfloat16).backward(upstream)
        grads.append((each.grad, *(p.grad for p in quantizer.parameters())))
    assert grads[0][0].dtype == dtype
    assert torch.equal(grads[0][0].float(), grads[1][0])
    for a, b in zip(grads[0][1:], grads[1][1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group_size", [32, 70])
def test_uniform_gradients_against_autograd(group_size: int) -> None:
    weight = torch.randn((4, 70), generator=generator(0)).requires_grad_()
    upstream = torch.randn((4, 70), generator=generator(1))
    quantizer = UniformQuantizer(weight.shape, 3, group_size)
    quantizer.init_clip_search(weight)

    reference = weight.detach().double().requires_grad_()
    scale, zero = (p.detach().double().requires_grad_() for p in (quantizer.scale, quantizer.zero))
    s, z = (p.repeat_interleave(group_size, 1)[:, :70] for p in (scale, zero))
    position = (reference / s + z).clamp(0, 7)
    code = position + (position.round() - position).detach()
    value = (code - z) * s
    # Weights next to a threshold are left out: the snap gives them another level.
    upstream[(value - quantizer(weight)).detach().abs() > 0.02] = 0.0
    assert int(upstream.count_nonzero()) > 250
    quantizer(weight).backward(upstream)
    value.backward(upstream.double())
    torch.testing.assert_close(weight.grad.double(), reference.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.zero.grad.double(), zero.grad, rtol=1e-4, atol=1e-4)


def test_only_what_is_learned_is_a_parameter() -> None:
    def names(**kwargs: bool) -> set[str]:
        return {name for name, _ in LearnableDirectPartitioning((4, 64), 2, 32, **kwargs).named_parameters()}

    assert names() == {"beta", "gamma", "s1", "s2"}
    assert names(learn_partition=False) == {"beta", "gamma"}
    assert names(learn_clip=False) == {"s1", "s2"}
    fixed = LearnableDirectPartitioning((4, 64), 2, 32, learn_clip=False, learn_partition=False)
    assert set(fixed.state_dict()) == {"beta", "gamma", "s1", "s2"}
    weight = torch.randn((4, 64), requires_grad=True)
    fixed(weight).sum().backward()
    assert weight.grad is not None
    assert set(LearnableDirectPartitioning((4, 64), 3, 32).state_dict()) == {"beta", "gamma"}


def test_uniform_init_is_uniform() -> None:
    weight = torch.randn((4, 64), generator=generator(0))
    quantizer = scattered(LearnableDirectPartitioning(weight.shape, 2, 32))
    quantizer.init_uniform(weight)
    low, high = group_range(weight, 32)
    share = 1 / (1 + math.exp(-4.0))
    expected = torch.lerp(low[..., None], high[..., None], torch.linspace(0, 1, 4)) * share
    torch.testing.assert_close(quantizer.levels(weight), expected)


def test_inits_rank_by_error() -> None:
    weight = torch.randn((32, 256), generator=generator(0)) * 0.02
    quantizer = LearnableDirectPartitioning(weight.shape, 2, 64)
    errors = [error(weight, quantizer(weight))]
    for init in (quantizer.init_clip_search, quantizer.init_kmeans):
        init(weight)
        errors.append(error(weight, quantizer(weight)))
    assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
    kmeans = error(weight, quantize_weight(weight, 2, 64, "kmeans").dequantize())
    assert errors[2] == pytest.approx(kmeans, rel=1e-3)


def test_clip_search_finds_the_least_error_of_its_grid() -> None:
    groups = torch.randn((20, 64), generator=generator(0))
    ratios = clip_search(groups, 4)
    assert set(ratios.flatten().tolist()) <= set(torch.tensor(CLIP_RATIOS).tolist())

    def errors(ratios: Tensor) -> Tensor:
        low, high = (groups.amin(1) * ratios[:, 0], groups.amax(1) * ratios[:, 1])
        levels = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 4)
        return (groups[..., None] - levels[:, None]).square().amin(-1).sum(1)

    found = errors(ratios)
    for ratio in CLIP_RATIOS:
        assert bool((found <= errors(torch.full((20, 2), ratio)) * (1 + 1e-5)).all())


def test_importance_moves_levels_to_what_counts() -> None:
    weight = torch.randn((64, 64), generator=generator(0))
    importance = torch.rand(64, generator=generator(1)).pow(6) + 1e-3
    for init in ("init_clip_search", "init_kmeans"):
        weighted, unweighted = (LearnableDirectPartitioning(weight.shape, 2, 64) for _ in range(2))
        getattr(weighted, init)(weight, importance)
        getattr(unweighted, init)(weight)
        a, b = ((each(weight).detach() - weight).square() @ importance for each in (weighted, unweighted))
        assert float(a.sum()) < 0.95 * float(b.sum())


def test_weighted_kmeans_of_equal_weights_is_kmeans() -> None:
    groups = torch.randn((50, 64), generator=generator(0))
    expected = kmeans_levels(groups, 8)
    torch.testing.assert_close(kmeans_levels(groups, 8, torch.full_like(groups, 0.25)), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kmeans_levels(groups, 8, torch.zeros_like(groups)), expected, rtol=1e-5, atol=1e-6)


def test_given_levels_come_back() -> None:
    weight = torch.randn((3, 64), generator=generator(0))
    low, high = group_range(weight, 32)
    levels = torch.stack([0.8 * low, 0.3 * low, 0.4 * high, 0.9 * high], -1)
    quantizer = LearnableDirectPartitioning(weight.shape, 2, 32)
    quantizer.init_levels(weight, levels)
    torch.testing.assert_close(quantizer.levels(weight), levels)
    with pytest.raises(ValueError, match=r"= \(3, 2, 4\), got \(4,\); expand"):
        quantizer.init_levels(weight, levels[0, 0])


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_equal_weights(value: float) -> None:
    weight = torch.full((2, 32), value, requires_grad=True)
    for init in ("init_uniform", "init_clip_search", "init_kmeans"):
        quantizer = LearnableDirectPartitioning(weight.shape, 2, 32)
        getattr(quantizer, init)(weight.detach())
        quantizer(weight).sum().backward()
        assert bool(quantizer(weight).isfinite().all())
        assert torch.equal(quantizer(weight), quantizer.export(weight).dequantize())
        assert not weight.grad.any()
        assert all(bool(p.grad.isfinite().all()) for p in quantizer.parameters())
    uniform = UniformQuantizer(weight.shape, 2, 32)
    uniform.init_uniform(weight.detach())
    torch.testing.assert_close(uniform(weight).detach(), weight.detach(), rtol=2**-10, atol=0)
    uniform(weight).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in uniform.parameters())


def test_ties_take_the_lower_level() -> None:
    levels = torch.tensor([-127.0, -1.0, 1.0, 127.0]).expand(1, 1, 4)
    weight = torch.tensor([[-64.0, 0.0, 64.0, 1.0] * 8])
    expected = torch.tensor([[-127.0, -1.0, 1.0, 1.0] * 8])
    assert torch.equal(fake_quantize(weight, levels, 32), expected)
    assert torch.equal(quantize_weight(weight, 2, 32, levels).dequantize(), expected)


def test_training_lowers_the_error() -> None:
    weight = torch.randn((16, 128), generator=generator(0))
    quantizer = LearnableDirectPartitioning(weight.shape, 2, 64)
    before = error(weight, quantizer(weight))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().sum().backward()
        optimizer.step()
    kmeans = error(weight, quantize_weight(weight, 2, 64, "kmeans").dequantize())
    assert error(weight, quantizer(weight)) < min(0.6 * before, 1.05 * kmeans)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"learn_partition needs 2 bits.*got 3 bits; leave it out"):
        LearnableDirectPartitioning((4, 64), 3, 32, learn_partition=True)
    for make in (LearnableDirectPartitioning, UniformQuantizer):
        with pytest.raises(ValueError, match=r"both at least 1, got \(4,\); pass weight.shape"):
            make((4,))
        with pytest.raises(ValueError, match=r"group_size must be one of"):
            make((4, 64), 2, 33)
        with pytest.raises(ValueError, match=r"weight must have .*\(4, 64\), got \(64, 4\)"):
            make((4, 64), 2, 32)(torch.zeros(64, 4))
