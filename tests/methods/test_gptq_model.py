"""GPTQ of a model: Hessians at run time, the cache, kept outputs, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rcp_kernels import QuantLinear
from rcp_kernels.methods import student
from rcp_kernels.methods.gptq import captured_layer, gptq_quantize_model
from rcp_kernels.methods.gptq import quantize_model as gptq
from rcp_kernels.methods.gptq.captured_layer import KeptOutputs
from rcp_kernels.methods.layers import first_layer_inputs, run_layer
from rcp_kernels.ops.quantize_activation import quantize_activation_reference

transformers = pytest.importorskip("transformers")  # an optional dependency


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
    first += 1  # changed in place
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
    return torch.randint(0, 97, (12, 48), generator=torch.Generator().manual_seed(0))


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
        # An activation that crosses a rounding boundary changes everything after it.
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
    """The first q, k and v stay the same: no cache precedes them."""
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
    monkeypatch.setattr(captured_layer, "BATCH_TOKENS", 3 * 48)  # four batches
    results, runs = [], []
    for limit in (1 << 30, 0, 100_000):
        monkeypatch.setattr(gptq, "_KEPT_BYTES", limit)
        model = tiny_llama()
        heads: list[int] = []
        model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_, heads=heads: heads.append(1))
        results.append(gptq_quantize_model(model, ids, group_size=32, act_bits=8, kv_bits=4))
        runs.append(len(heads))
        assert all("forward" not in vars(module) for module in model.modules())
    # Four passes over four batches. The last two reuse the attention's output.
    assert runs[0] == 2 * 4
    assert runs[1] == 4 * 4
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
