"""GPTQ of a weight: exact where greedy rounding is, the identity of its error, feedback from stored values."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from rcp_kernels import quantize_weight
from rcp_kernels.methods.gptq import gptq_quantize_weight
from rcp_kernels.methods.gptq import quantize_weight as gptq_weight
from rcp_kernels.methods.gptq.quantize_weight import add_gram, factor_hessian, relative_errors, round_to_nearest
from rcp_kernels.ops import gptq_round


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    mix = torch.randn((columns, columns), generator=generator(seed)) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn((4 * columns, columns), generator=generator(seed + 1)) @ mix
    return torch.randn((rows, columns), generator=generator(seed + 2)) * 0.02, x.T @ x / x.shape[0]


def squared_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """e^T H e of each row, in float64."""
    difference = weight.double() - quantized.double()
    return ((difference @ hessian.double()) * difference).sum(-1)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    return relative_errors(weight, (quantized,), hessian)[0]


def rtn_levels(weight: Tensor, bits: int, group_size: int) -> Tensor:
    packed = quantize_weight(weight, bits, group_size)
    return packed.levels.float() * packed.scales.float()[..., None] * packed.tensor_scale


@pytest.mark.parametrize("levels", ["uniform", "clip", "kmeans"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 150])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_round_to_nearest(bits: int, group_size: int, levels: str) -> None:
    weight, hessian = problem(24, 150)  # tails of 22 and 86 columns
    packed = gptq_quantize_weight(weight, hessian, bits=bits, group_size=group_size, levels=levels)
    assert (packed.bits, packed.group_size) == (bits, group_size)
    assert packed.kind == ("table" if levels == "kmeans" else "uniform")
    rtn = round_to_nearest(weight, bits, group_size, levels)
    assert relative_error(weight, packed.dequantize(), hessian) < 0.8 * relative_error(weight, rtn, hessian)


@pytest.mark.parametrize("levels", ["uniform", "kmeans"])
def test_diagonal_hessian_is_round_to_nearest(levels: str) -> None:
    weight = torch.randn((10, 100), generator=generator(0))
    diagonal = torch.full((100,), 3.0)
    packed = gptq_quantize_weight(weight, diagonal.diag(), bits=2, group_size=32, levels=levels)
    assert torch.equal(packed.dequantize(), quantize_weight(weight, 2, 32, levels).dequantize())
    diagonal = torch.rand(100, generator=generator(1)) + 0.1
    given = rtn_levels(weight, 2, 32)
    packed = gptq_quantize_weight(weight, diagonal.diag(), bits=2, group_size=32, levels=given)
    assert torch.equal(packed.dequantize(), quantize_weight(weight, 2, 32, given).dequantize())


def brute_force(weight: Tensor, hessian: Tensor, table: Tensor, free: slice, fixed: Tensor) -> Tensor:
    """The least error of each row over all choices of the free columns. The other columns are those of ``fixed``."""
    best = torch.full((weight.shape[0],), torch.inf, dtype=torch.float64)
    width = len(range(*free.indices(weight.shape[1])))
    for choice in itertools.product(range(table.shape[-1]), repeat=width):
        candidate = fixed.clone()
        candidate[:, free] = table[:, 0, list(choice)]
        best = torch.minimum(best, squared_error(weight, candidate, hessian))
    return best


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_last_column_is_the_best_one_given_the_others(columns: int) -> None:
    weight, hessian = problem(200, columns)
    levels = rtn_levels(weight, 2, columns)
    packed = gptq_quantize_weight(weight, hessian, group_size=columns, levels=levels, damping=0.0)
    quantized = packed.dequantize()
    table = packed.levels.float() * packed.scales.float()[..., None] * packed.tensor_scale
    best = brute_force(weight, hessian, table, slice(columns - 1, columns), quantized)
    torch.testing.assert_close(squared_error(weight, quantized, hessian), best, rtol=1e-3, atol=1e-9)
    # Nothing precedes the first column: it is rounded without feedback.
    nearest = (weight[:, :1, None] - table).abs().argmin(-1)
    assert torch.equal(quantized[:, :1], table[:, 0].gather(1, nearest))


def test_weak_coupling_is_solved_exactly() -> None:
    weight = torch.randn((100, 4), generator=generator(0))
    coupling = torch.randn((4, 4), generator=generator(1)) * 0.02
    hessian = torch.diag(torch.tensor([1000.0, 100.0, 10.0, 1.0])) + coupling + coupling.T
    levels = rtn_levels(weight, 2, 4)
    packed = gptq_quantize_weight(weight, hessian, group_size=4, levels=levels, damping=0.0)
    table = packed.levels.float() * packed.scales.float()[..., None] * packed.tensor_scale
    best = brute_force(weight, hessian, table, slice(0, 4), weight.clone())
    found = squared_error(weight, packed.dequantize(), hessian)
    exact = (found <= best * (1 + 1e-4) + 1e-7).double().mean()
    assert float(exact) > 0.9


@pytest.mark.parametrize("block", [1, 32, 50, 128, 1000])
@pytest.mark.parametrize("group_size", [32, 128, 300])
def test_feedback_sees_what_is_stored(block: int, group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of ((w - q) / U_jj)^2 over the columns is e^T H e, if and only if q is the stored value throughout."""
    weight, hessian = problem(12, 300)
    weight[3] *= 1e-3
    weight[5, :32] = 0.0
    errors = []

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        codes, found = gptq_round(*args)
        errors.append(found.double().square().sum(1))
        return codes, found

    monkeypatch.setattr(gptq_weight, "gptq_round", spy)
    packed = gptq_quantize_weight(weight, hessian, bits=2, group_size=group_size, damping=0.01, block=block)
    mean = float(hessian.diagonal().mean())
    damped = hessian + 0.01 * mean * torch.eye(300)
    expected = squared_error(weight, packed.dequantize(), damped)
    torch.testing.assert_close(sum(errors) * mean, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_feedback_that_diverges_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(block: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        found = gptq_round(block, *args)
        block[3, args[3] :] = value
        return found

    monkeypatch.setattr(gptq_weight, "gptq_round", diverge)
    weight, hessian = problem(8, 64)
    with pytest.raises(ValueError, match=r"finite, got NaN or Inf: error feedback diverged; raise damping"):
        gptq_quantize_weight(weight, hessian, group_size=32, levels="kmeans")


def test_blocks_and_other_rows_do_not_show() -> None:
    weight, hessian = problem(200, 160)
    kwargs: dict[str, Any] = {"bits": 3, "group_size": 32, "levels": "uniform"}
    whole = gptq_quantize_weight(weight, hessian, **kwargs, block=160).dequantize()
    for block in (32, 64, 128):
        other = gptq_quantize_weight(weight, hessian, **kwargs, block=block).dequantize()
        # Another order of sums moves a few weights over a threshold, and changes all later columns.
        assert float((whole == other).double().mean()) > 0.98
    again = gptq_quantize_weight(weight, hessian, **kwargs, block=160).dequantize()
    assert torch.equal(whole, again)
    # One block needs no matrix product. A product may sum in another order for other rows.
    some = gptq_quantize_weight(weight[5:12], hessian, **kwargs, block=160).dequantize()
    assert torch.equal(some, whole[5:12])


def test_any_magnitude_and_far_scales() -> None:
    weight, hessian = problem(8, 64)
    reference = relative_error(weight, gptq_quantize_weight(weight, hessian, group_size=32).dequantize(), hessian)
    for magnitude in (1e-30, 1e-6, 1e4):
        packed = gptq_quantize_weight(weight * magnitude, hessian * 7.0, group_size=32)
        found = relative_error(weight, packed.dequantize() / magnitude, hessian)
        assert found == pytest.approx(reference, rel=0.02)
    weight[0] *= 1e-7  # below 2**-21 of the largest: its scale is subnormal in float16
    packed = gptq_quantize_weight(weight, hessian, group_size=32)
    assert bool(packed.dequantize()[1:].isfinite().all())
    assert 128 <= float(packed.scales.max()) < 256 or float(packed.scales.float().min()) < 2**-14


def test_dead_columns_are_rounded_and_feed_nothing_back() -> None:
    weight, hessian = problem(16, 64)
    dead = [3, 40, 63]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    levels = rtn_levels(weight, 3, 32)
    packed = gptq_quantize_weight(weight, hessian, bits=3, group_size=32, levels=levels)
    nearest = quantize_weight(weight, 3, 32, levels).dequantize()
    assert torch.equal(packed.dequantize()[:, dead], nearest[:, dead])
    live = [k for k in range(64) if k not in dead]
    assert not torch.equal(packed.dequantize()[:, live], nearest[:, live])
    changed = weight.clone()
    changed[:, dead] += 0.05
    other = gptq_quantize_weight(changed, hessian, bits=3, group_size=32, levels=levels)
    assert torch.equal(other.dequantize()[:, live], packed.dequantize()[:, live])
    everything = gptq_quantize_weight(weight, torch.zeros(64, 64), bits=3, group_size=32, levels="uniform")
    assert torch.equal(everything.dequantize(), quantize_weight(weight, 3, 32, "uniform").dequantize())


def test_damping_rises_until_it_is_enough() -> None:
    x = torch.randn((5, 64), generator=generator(0))
    singular = x.T @ x
    assert factor_hessian(singular, 0.01, "").damping == 0.01
    assert factor_hessian(singular, 0.0, "").damping >= 0.001
    _, hessian = problem(1, 64)
    assert factor_hessian(hessian, 0.0, "").damping == 0.0
    indefinite = hessian - 0.3 * hessian.diagonal().mean() * torch.eye(64)
    assert 0.01 < factor_hessian(indefinite, 0.01, "").damping <= 1.0
    mean = hessian.diagonal().mean()
    with pytest.raises(ValueError, match=r"here: the diagonal of the Hessian must be at least 0, got -"):
        factor_hessian(hessian - 10 * mean * torch.diag((torch.arange(64) == 5).float()), 0.01, "here")
    with pytest.raises(ValueError, match=r"here: the diagonal of the Hessian must be at least 0, got -"):
        factor_hessian(-hessian, 0.01, "here")
    hopeless = hessian.diagonal().diag() + 10 * mean * (1 - torch.eye(64))
    with pytest.raises(ValueError, match=r"here: the Hessian must be positive definite with damping 1.0, got"):
        factor_hessian(hopeless, 0.01, "here")


def test_factor_is_the_inverse() -> None:
    _, hessian = problem(1, 90)
    factor = factor_hessian(hessian, 0.01, "")
    mean = hessian.double().diagonal().mean()
    inverse = torch.linalg.inv(hessian.double() / mean + 0.01 * torch.eye(90, dtype=torch.float64))
    torch.testing.assert_close(factor.upper.double().T @ factor.upper.double(), inverse, rtol=1e-5, atol=1e-5)
    assert not factor.upper.tril(-1).any()


@pytest.mark.parametrize("features", [1, 90, 256, 600])
def test_the_triangle_is_the_whole(features: int) -> None:
    x = torch.randn((70, features), generator=generator(0))
    total = torch.zeros((features, features))
    for part in (x[:50], x[50:]):
        add_gram(total, part)
    torch.testing.assert_close(total.triu(), (x.double().T @ x.double()).float().triu(), rtol=1e-4, atol=1e-4)
    weight = torch.randn((9, features), generator=generator(1))
    quantized = [weight + 0.1, weight * 0.9]
    hessian = x.T @ x
    expected = [float(squared_error(weight, each, hessian).sum()) for each in quantized]
    square = float(squared_error(weight, torch.zeros_like(weight), hessian).sum())
    found = relative_errors(weight, quantized, hessian)
    assert found == pytest.approx([each / square for each in expected], rel=1e-4)
    assert relative_errors(torch.zeros_like(weight), quantized, hessian) == [0.0, 0.0]


def test_bad_weight_arguments() -> None:
    weight, hessian = problem(4, 64)
    with pytest.raises(
        ValueError, match=r"weight must be floating point .*got torch.float32 of shape \(64,\); flatten"
    ):
        gptq_quantize_weight(weight[0], hessian, group_size=32)
    with pytest.raises(ValueError, match=r"Hessian must be \[64, 64\].*got \(32, 32\)"):
        gptq_quantize_weight(weight, hessian[:32, :32], group_size=32)
    with pytest.raises(ValueError, match=r"levels must be .* = \(4, 2, 4\), got \(4,\); expand"):
        gptq_quantize_weight(weight, hessian, group_size=32, levels=torch.zeros(4))
    hessian[3, 3] = float("inf")
    with pytest.raises(ValueError, match=r"must be finite, got NaN or Inf"):
        gptq_quantize_weight(weight, hessian, group_size=32)
