"""The student: gradients, quantized weights that are kept, and the export to packed layers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rcp_models import tiny_model, tiny_windows

from rcp_kernels import QuantLinear, ops
from rcp_kernels.methods.ldp import LearnableDirectPartitioning
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.methods.student import (
    FakeQuantKV,
    FakeQuantLinear,
    export_student,
    fake_quantize_activation,
    make_student,
    students,
    with_quantized_weights,
)
from rcp_kernels.models.hf import cache_argument


@given(st.sampled_from([4, 8]), st.sampled_from([1.0, 0.9]), st.integers(0, 2**31))
def test_fake_quantized_activation_is_the_operator_and_passes_the_gradient(bits, clip, seed):
    x = torch.randn(3, 33, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    q, scale = ops.quantize_activation(x.detach(), bits, clip)
    y = fake_quantize_activation(x, bits, clip)
    assert torch.equal(y, q.float() * scale[:, None])
    grad = torch.randn(3, 33, generator=torch.Generator().manual_seed(seed + 1))
    y.backward(grad)
    inside = x.detach().abs() <= clip * x.detach().abs().amax(-1, keepdim=True)
    assert torch.equal(x.grad, grad if clip == 1.0 else grad * inside)


def test_gradients_reach_every_weight_and_every_quantizer():
    model = tiny_model()
    rotate_model(model, "gsr", group_size=32)
    make_student(model, group_size=32)
    output = model(tiny_windows(2), use_cache=False, **cache_argument(model, FakeQuantKV(4))).logits
    output.square().mean().backward()
    layers = students(model)
    assert len(layers) == 14
    for layer in layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, (layer.name, name)
            assert float(parameter.grad.abs().max()) > 0, (layer.name, name)
    trained = {id(p) for layer in layers for p in layer.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_held_weights_give_the_same_gradients():
    one, other = tiny_model(), tiny_model()
    for model in (one, other):
        make_student(model, group_size=32)
    parts = tiny_windows(4).split(2)
    for ids in parts:
        one(ids).logits.square().mean().backward()
    with with_quantized_weights(other, torch.float32):
        for ids in parts:
            other(ids).logits.square().mean().backward()
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_exported_layer_has_the_trained_weight_and_nearly_the_same_output():
    model = tiny_model()
    rotate_model(model, "gsr", group_size=32)
    make_student(model, group_size=32)
    layers = {layer.name: layer for layer in students(model)}
    weights = {name: layer.quantizer(layer.weight).detach() for name, layer in layers.items()}
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    down = next(name for name in layers if name.endswith("down_proj"))
    expected = layers[down](x).detach()
    export_student(model)
    assert not students(model)
    for name, weight in weights.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, QuantLinear)
        assert torch.equal(packed.dequantize(), weight), name
    # Sums of 128 products, in float and in exact integers.
    torch.testing.assert_close(model.get_submodule(down)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_packed_already_is_named():
    model = tiny_model()
    make_student(model, group_size=32)
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.q_proj must be an nn\.Linear"):
        make_student(model, group_size=32)


def test_fake_quant_linear_keeps_a_bias():
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 8)
    layer = FakeQuantLinear(linear, LearnableDirectPartitioning((8, 32), 2, 32), 16, 1.0, "x")
    x = torch.randn(3, 32)
    expected = x @ layer.quantizer(layer.weight).T + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
