"""GPTQ: exact where greedy rounding is, the identity of its error, what is fed back is what is stored, whole models."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcp_kernels import QuantLinear, quantize_weight
from rcp_kernels.methods import student
from rcp_kernels.methods.gptq import gptq_quantize_model, gptq_quantize_weight
from rcp_kernels.methods.gptq import quantize_model as gptq
from rcp_kernels.methods.gptq import quantize_weight as gptq_weight
from rcp_kernels.methods.gptq.quantize_model import KeptOutputs
from rcp_kernels.methods.gptq.quantize_weight import add_gram, factor_hessian, relative_errors, round_to_nearest
from rcp_kernels.methods.layers import first_layer_inputs, run_layer
from rcp_kernels.ops import gptq_round
from rcp_kernels.ops.quantize_activation import quantize_activation_reference

transformers = pytest.importorskip("transformers")  # an extra: the demo's


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    mix = torch.randn((columns, columns), generator=generator(seed)) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn((4 * columns, columns), generator=generator(seed + 1)) @ mix
    return torch.randn((rows, columns), generator=generator(seed + 2)) * 0.02, x.T @ x / x.shape[0]


def squared_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """Of each row: e^T H e, in float64."""
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
    """The least error of each row over all choices of the free columns; the others are as in ``fixed``."""
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
    # The first column is rounded as it is.
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
        # Sums in another order move a few weights over a threshold, and with them all that comes after.
        assert float((whole == other).double().mean()) > 0.98
    again = gptq_quantize_weight(weight, hessian, **kwargs, block=160).dequantize()
    assert torch.equal(whole, again)
    # One block has no matrix product, whose sums could be in another order for other rows.
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


def test_kept_outputs_end_at_the_limit_and_are_what_was_kept() -> None:
    kept = KeptOutputs(2 * 4 * 10)
    first, second = torch.ones(10), (torch.zeros(10), None)
    kept.keep("a", first)
    kept.keep("b", second)
    kept.keep("c", torch.ones(1))
    assert kept.get("a") is first
    assert kept.get("b") is second
    assert kept.get("c") is None
    kept.batch = 1
    assert kept.get("a") is None
    kept.batch = 0
    kept.drop(["b", "no such"])
    kept.keep("c", torch.ones(10))
    assert kept.get("c") is not None
    first += 1  # by whoever got it
    assert kept.get("a") is None


def tiny_llama(seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **kwargs,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 97, (12, 48), generator=generator(0))


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(("bits", "act_bits", "levels"), [(2, 4, "kmeans"), (3, 16, "uniform"), (4, 8, "clip")])
def test_model_beats_round_to_nearest_on_every_layer(bits: int, act_bits: int, levels: str, ids: Tensor) -> None:
    model = tiny_llama()
    calls: list[tuple[int, int, str]] = []
    result = gptq_quantize_model(
        model,
        ids,
        bits=bits,
        group_size=32,
        act_bits=act_bits,
        levels=levels,
        progress=lambda *call: calls.append(call),
    )
    assert len(result) == len(result.errors) == 21
    assert [error.name for error in result.errors] == list(result) == [name for _, _, name in calls]
    assert calls[-1][:2] == (21, 21)
    for error in result.errors:
        assert error.gptq < error.rtn, error
    for name, packed in result.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert torch.equal(layer.dequantize(), packed.dequantize())
        assert (layer.bits, layer.act_bits) == (bits, act_bits)
    assert type(model.lm_head) is nn.Linear
    assert bool(model(ids[:1]).logits.isfinite().all())


@pytest.mark.parametrize("rotation", ["none", "gsr"])
def test_hessians_are_of_the_inputs_at_run_time(rotation: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from rcp_kernels.methods.rotate import rotate_model

    model = tiny_llama()
    rotate_model(model, rotation, group_size=32, r3=False)
    seen: list[Tensor] = []
    original: Callable[..., Any] = gptq.factor_hessian
    monkeypatch.setattr(
        gptq, "factor_hessian", lambda hessian, *args: (seen.append(hessian), original(hessian, *args))[1]
    )
    result = gptq_quantize_model(model, ids, bits=3, group_size=32, act_bits=4)
    assert len(seen) == 12
    inputs: dict[str, Tensor] = {}
    for name in result:
        layer = model.get_submodule(name)

        def keep(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            x = args[0] if module.input_rotation is None else module.input_rotation(args[0])
            q, scale = quantize_activation_reference(x, 4)
            inputs[name] = (q.double() * scale.double()[..., None]).flatten(0, 1)

        layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(ids)
    step_names = [
        f"model.layers.{i}.{n}"
        for i in range(3)
        for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    for index, (name, hessian) in enumerate(zip(step_names, seen, strict=True)):
        x = inputs[name]
        expected = x.T @ x / x.shape[0]
        difference = float((hessian.double() - expected).norm() / expected.norm())
        # A rounding boundary of an activation, crossed once, is carried on by all that follows.
        assert difference < (1e-6 if index == 0 else 0.02), name


def test_simulated_model_has_the_stored_weights(ids: Tensor) -> None:
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = gptq_quantize_model(model, ids, bits=2, group_size=32, simulate=True, kv_bits=4)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        expected = result[layer].dequantize() if layer in result else before[name]
        assert torch.equal(parameter, expected), name
    assert all("forward" not in vars(module) for module in model.modules())


def test_two_runs_are_equal_and_the_mode_comes_back(ids: Tensor) -> None:
    first, second = tiny_llama().train(), tiny_llama()
    a = gptq_quantize_model(first, ids, group_size=32)
    b = gptq_quantize_model(second, ids, group_size=32)
    assert first.training
    assert not second.training
    for name in a:
        assert torch.equal(a[name].codes, b[name].codes), name


def test_the_cache_changes_the_weights(ids: Tensor) -> None:
    """Not those of the first q, k and v, which come before any cache."""
    results = [gptq_quantize_model(tiny_llama(), ids, group_size=32, kv_bits=bits) for bits in (16, 4)]
    same = {name: torch.equal(results[0][name].codes, results[1][name].codes) for name in results[0]}
    first = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    assert all(same[name] for name in first)
    assert not any(same[name] for name in same if name not in first)


def test_a_model_that_ignores_the_cache_is_refused(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "cache_argument", lambda *_: {})
    with pytest.raises(RuntimeError, match=r"layer model\.layers\.0: .* cache of 4 bits, got .* never asked it"):
        gptq_quantize_model(tiny_llama(), ids, group_size=32, kv_bits=4)


def test_kept_outputs_do_not_show(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_BATCH_TOKENS", 3 * 48)  # four batches
    results, runs = [], []
    for limit in (1 << 30, 0, 100_000):
        monkeypatch.setattr(gptq, "_KEPT_BYTES", limit)
        model = tiny_llama()
        heads: list[int] = []
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_, heads=heads: heads.append(1))
        results.append(gptq_quantize_model(model, ids, group_size=32, act_bits=8, kv_bits=4))
        runs.append(len(heads))
        assert all("forward" not in vars(module) for module in model.modules())
    # Once for the keywords, then in four passes over four batches, of which the last two find the attention's output.
    assert runs[0] == 1 + 2 * 4
    assert runs[1] == 1 + 4 * 4
    assert runs[0] < runs[2] < runs[1]
    for other in results[1:]:
        for name, packed in results[0].items():
            assert torch.equal(packed.codes, other[name].codes), name
            assert torch.equal(packed.levels, other[name].levels), name


def test_biases_stay(ids: Tensor) -> None:
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.bias.normal_()
    bias = model.model.layers[0].self_attn.q_proj.bias.detach().clone()
    gptq_quantize_model(model, ids, group_size=32)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)


def test_layers_by_hand_are_the_model(ids: Tensor) -> None:
    model = tiny_llama()
    hidden, keywords = first_layer_inputs(model, ids)
    assert hidden.shape == (12, 48, 64)
    with torch.no_grad():
        for layer, extra in zip(model.model.layers, keywords, strict=True):
            hidden = run_layer(layer, hidden, extra)
        torch.testing.assert_close(model.lm_head(model.model.norm(hidden)), model(ids).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_the_model_as_it_was(ids: Tensor) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.up_proj: weight must be finite"):
        gptq_quantize_model(model, ids, group_size=32)
    for act_bits in (4, 16):
        model = tiny_llama()
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[3] = float("inf")
        with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj.*(finite|NaN)"):
            gptq_quantize_model(model, ids, group_size=32, act_bits=act_bits)
        assert sum(type(module) is nn.Linear for module in model.modules()) == 22
        assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act_bits": 5}, r"act_bits must be one of \(4, 8, 16\), got 5"),
        ({"act_clip": 0.0}, r"act_clip must be in \(0, 1\], got 0.0"),
        ({"kv_bits": 32}, r"kv_bits must be one of .*, got 32"),
        ({"kv_clip": 1.5}, r"kv_clip must be in \(0, 1\], got 1.5"),
    ],
)
def test_bits_and_clips_are_checked_before_anything_runs(
    arguments: dict[str, Any], message: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "first_layer_inputs", None)
    with pytest.raises(ValueError, match=message):
        gptq_quantize_model(tiny_llama(), ids, group_size=32, **arguments)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_named(wrong: int, ids: Tensor) -> None:
    ids = ids.clone()
    ids[3, 4] = wrong
    model = tiny_llama()
    size = model.config.vocab_size
    with pytest.raises(ValueError, match=rf"token ids must be in \[0, {size}\), the model's vocabulary, got {wrong};"):
        gptq_quantize_model(model, ids, group_size=32)


def test_bad_arguments(ids: Tensor) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"got shape \(0, 48\); the calibration text is shorter than one sequence"):
        gptq_quantize_model(model, ids[:0], group_size=32)
    with pytest.raises(ValueError, match=r"at least one sequence of at least 2 tokens, got shape \(12, 1\)"):
        gptq_quantize_model(model, ids[:, :1], group_size=32)
    with pytest.raises(TypeError, match=r"token ids, got torch.float32; tokenize"):
        gptq_quantize_model(model, ids.float(), group_size=32)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: group_size must be one of .*got 100"):
        gptq_quantize_model(model, ids, group_size=100)
    with pytest.raises(ValueError, match=r"levels must be one of \('uniform', 'clip', 'kmeans'\).*got 'k'"):
        gptq_quantize_model(model, ids, group_size=32, levels="k")
    with pytest.raises(ValueError, match=r"damping must be in \[0, 1.0\], got 2"):
        gptq_quantize_model(model, ids, group_size=32, damping=2)
    with pytest.raises(ValueError, match=r"block must be an int of at least 1, got 0"):
        gptq_quantize_model(model, ids, group_size=32, block=0)
    gptq_quantize_model(model, ids, group_size=32)
    with pytest.raises(
        ValueError, match=r"must be an nn.Linear, got QuantLinear, which is quantized already; start from"
    ):
        gptq_quantize_model(model, ids, group_size=32)
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
