"""quantize_weight: nearest levels, k-means, extreme magnitudes, bad input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels import quantize_weight


def relative_error(weight: torch.Tensor, **kwargs: object) -> float:
    dense = quantize_weight(weight, **kwargs).dequantize()
    return float((dense.double() - weight.double()).norm() / weight.double().norm())


@given(
    out_features=st.integers(1, 4),
    in_features=st.integers(1, 200),
    bits=st.sampled_from((2, 3, 4)),
    group_size=st.sampled_from((32, 64, 128, None)),
    levels=st.sampled_from(("uniform", "kmeans")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_every_weight_gets_the_nearest_level(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int | None,
    levels: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    group_size = in_features if group_size is None else group_size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((out_features, in_features), generator=generator).to(dtype)
    packed = quantize_weight(weight, bits, group_size, levels)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    table = packed.levels.double() * packed.scales.double()[..., None] * packed.tensor_scale.double()
    table = table.repeat_interleave(group_size, dim=1)[:, :in_features]
    distance = (weight.double()[..., None] - table).abs()
    chosen = (weight.double() - packed.dequantize().double()).abs()
    # Midpoints are rounded to float32: a weight next to one may go either way.
    assert bool((chosen <= distance.amin(-1) + 1e-6).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_kmeans_beats_uniform_and_comes_near_the_optimum(bits: int) -> None:
    weight = torch.randn((64, 1024), generator=torch.Generator().manual_seed(0)) * 0.02
    kmeans = relative_error(weight, bits=bits, group_size=128, levels="kmeans")
    assert kmeans < 0.85 * relative_error(weight, bits=bits, group_size=128, levels="uniform")
    # Lloyd-Max distortion of a normal source (Max 1960) with 4, 8 and 16 levels, which tables per group stay below.
    assert kmeans < {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits] ** 0.5


def test_kmeans_is_exact_for_few_distinct_values() -> None:
    values = torch.tensor([-127.0, -30.0, 5.0, 90.0])
    generator = torch.Generator().manual_seed(0)
    weight = torch.stack([values.repeat(8)[torch.randperm(32, generator=generator)] for _ in range(12)]).view(3, 128)
    packed = quantize_weight(weight, 2, 32, "kmeans")
    assert torch.equal(packed.dequantize(), weight)


def test_uniform_levels_span_the_group() -> None:
    weight = torch.linspace(-3.0, 3.0, 64)[None]
    packed = quantize_weight(weight, 2, 64, "uniform")
    # -3, -1, 1, 3 in 16ths. No table is stored: the other levels follow from the first one.
    assert (packed.kind, packed.levels.tolist()) == ("uniform", [[[-48]]])
    assert packed.dequantize().unique().tolist() == [-3.0, -1.0, 1.0, 3.0]
    assert packed.unpack()[0, [0, 31, 32, 63]].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 0.3, -0.3, 5.0])
def test_uniform_levels_are_half_a_step_away_at_most(bits: int, offset: float) -> None:
    """And half an int8 level, by which the zero-point is rounded. Ranges without zero are extended to it."""
    weight = (torch.rand((40, 190), generator=torch.Generator().manual_seed(0)) - 0.5 + offset).double()
    packed = quantize_weight(weight.float(), bits, 64, "uniform")
    groups = [weight[:, first : first + 64] for first in range(0, 190, 64)]
    error = (packed.dequantize().double() - weight).abs()
    for index, group in enumerate(groups):
        high, low = group.amax(1).clamp(min=0.0), group.amin(1).clamp(max=0.0)
        bound = (high - low) / (2**bits - 1) * (0.5 + 0.5 / 2 ** (7 - bits)) * (1 + 2**-9)
        assert bool((error[:, 64 * index : 64 * index + group.shape[1]] <= bound[:, None]).all())


def test_clip_is_better_than_the_whole_range() -> None:
    weight = torch.randn((64, 256), generator=torch.Generator().manual_seed(0))
    clip = relative_error(weight, bits=2, group_size=64, levels="clip")
    assert clip < 0.8 * relative_error(weight, bits=2, group_size=64, levels="uniform")
    assert quantize_weight(weight, 2, 64, "clip").kind == "uniform"


@pytest.mark.parametrize("magnitude", [1e-38, 1e-12, 1e-6, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("levels", ["uniform", "clip", "kmeans"])
def test_any_magnitude_survives(magnitude: float, levels: str) -> None:
    weight = torch.randn((4, 256), generator=torch.Generator().manual_seed(0))
    reference = relative_error(weight, bits=3, group_size=64, levels=levels)
    assert relative_error(weight * magnitude, bits=3, group_size=64, levels=levels) == pytest.approx(
        reference, rel=0.02
    )


@pytest.mark.parametrize("levels", ["uniform", "clip", "kmeans"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 3e38, 1e-42])
def test_constant_groups(levels: str, value: float) -> None:
    weight = torch.full((2, 100), value)
    weight[1, :64] = 0.0
    packed = quantize_weight(weight, 2, 64, levels)
    torch.testing.assert_close(packed.dequantize(), weight, rtol=2**-10, atol=1e-42)


def test_range_of_float32_does_not_overflow() -> None:
    weight = torch.tensor([[-3e38, 3e38, -3e38, 1e38] * 8])
    for levels in ("uniform", "clip", "kmeans"):
        torch.testing.assert_close(quantize_weight(weight, 2, 32, levels).dequantize(), weight, rtol=0.02, atol=0)


def test_given_levels_are_kept() -> None:
    weight = torch.randn((4, 96), generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([-127.0, -20.0, 20.0, 127.0]).expand(4, 3, 4) / 64
    packed = quantize_weight(weight, 2, 32, levels)
    assert bool((packed.levels == torch.tensor([-127, -20, 20, 127], dtype=torch.int8)).all())
    assert set(packed.dequantize().unique().tolist()) <= {-127 / 64, -20 / 64, 20 / 64, 127 / 64}


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn((50, 200), generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(weight, 3, 64)
    monkeypatch.setattr("rcp_kernels.ops.quantize_weight.CHUNK_WEIGHTS", 1400)
    parts = quantize_weight(weight, 3, 64)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.levels, parts.levels)


def test_non_contiguous_and_trained_weights(recwarn: pytest.WarningsRecorder) -> None:
    weight = torch.randn((128, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    packed = quantize_weight(weight.t(), 2, 32)
    torch.set_warn_always(always)
    assert not list(recwarn)  # searchsorted warns of boundaries that are not contiguous
    assert torch.equal(packed.codes, quantize_weight(weight.detach().t().contiguous(), 2, 32).codes)


def test_bad_input() -> None:
    weight = torch.randn((4, 96))
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch.int8; convert"):
        quantize_weight(weight.to(torch.int8))
    for bad in (weight[0], weight[None], weight[:0], weight[:, :0]):
        with pytest.raises(ValueError, match=r"both at least 1, got shape \(.*\); flatten"):
            quantize_weight(bad)
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 3, 4\), got 8; choose"):
        quantize_weight(weight, 8)
    with pytest.raises(ValueError, match=r"group_size must be one of .*\(96\), got 100; pass in_features"):
        quantize_weight(weight, 2, 100)
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = weight.clone()
        broken[3, 7] = value
        with pytest.raises(ValueError, match=rf"finite in float32, got {value} at row, column \[3, 7\]; check"):
            quantize_weight(broken)
    with pytest.raises(ValueError, match=r"finite in float32, got -?inf .*check"):
        quantize_weight(weight.double() * 1e300)
    with pytest.raises(TypeError, match=r"weight must be a floating point tensor, got ndarray; convert"):
        quantize_weight(weight.numpy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight must be dense, got torch.sparse_coo; convert with .to_dense"):
        quantize_weight(weight.to_sparse())
    levels = torch.zeros((4, 1, 4))
    with pytest.raises(ValueError, match=r"levels must have values, got a tensor on the meta device; load"):
        quantize_weight(weight, levels=levels.to("meta"))
    levels[2, 0, 1] = float("nan")
    with pytest.raises(ValueError, match=r"levels must be finite.*got nan at row, group, level \[2, 0, 1\]; check"):
        quantize_weight(weight, levels=levels)
    with pytest.raises(ValueError, match=r"meta device.*load the checkpoint"):
        quantize_weight(weight.to("meta"))
    with pytest.raises(
        ValueError, match=r"levels must be one of \('uniform', 'clip', 'kmeans'\).*got 'k-means'; check"
    ):
        quantize_weight(weight, levels="k-means")
    with pytest.raises(TypeError, match=r"tensor of levels, got list; convert"):
        quantize_weight(weight, levels=[0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"= \(4, 1, 4\), got \(4,\); expand"):
        quantize_weight(weight, levels=torch.zeros(4))
    with pytest.raises(ValueError, match=r"levels must be ascending.*got \[1.0, 0.0, 0.0, 0.0\].*sort"):
        quantize_weight(weight, levels=torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(4, 1, 4))
    with pytest.raises(TypeError, match=r"levels must be floating point.*got torch.int8"):
        quantize_weight(weight, levels=torch.zeros((4, 1, 4), dtype=torch.int8))
