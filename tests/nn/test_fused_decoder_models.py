"""fuse_decoder: layers that stay apart, an input order, refusals."""

import pytest
import torch
from rotated_models import logits
from test_fused_decoder import fused, quantized, with_reference_steps

from rcp_kernels import QuantLinear
from rcp_kernels.nn import fuse_decoder, is_fused, unfuse_decoder
from rcp_kernels.nn.merged_linear import MergedPart


def test_layers_that_stay_apart_are_fused_all_the_same():
    model = quantized("llama_tied")
    attention = model.model.layers[0].self_attn
    attention.k_proj = QuantLinear.from_packed(attention.k_proj.packed_weight(), act_bits=4)
    result = fused(model)
    assert type(result.model.layers[0].self_attn.k_proj) is QuantLinear
    assert torch.equal(logits(result), logits(with_reference_steps(model)))


def test_an_input_order_is_kept():
    model = quantized("llama_tied")
    for layer in model.model.layers:
        order = torch.randperm(160)
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).packed_weight()
            setattr(attention, name, QuantLinear.from_packed(weight, act_bits=8, input_order=order))
    result = fused(model)
    assert isinstance(result.model.layers[0].self_attn.q_proj, MergedPart)
    assert torch.equal(logits(result), logits(with_reference_steps(model)))


def test_refusals_name_what_stands_against_it():
    model = quantized("llama")
    layer = model.model.layers[1]
    state = model.state_dict()

    def refused(match):
        with pytest.raises(ValueError, match=match):
            fuse_decoder(model)
        assert not is_fused(model)
        assert not any(isinstance(module, MergedPart) for module in model.modules())

    packed = layer.self_attn.v_proj
    layer.self_attn.v_proj = torch.nn.Linear(96, 32)
    refused(r"model.layers.1.self_attn.v_proj must be a QuantLinear, got Linear")
    layer.self_attn.v_proj = packed
    handle = layer.mlp.up_proj.register_forward_hook(lambda *_: None)
    refused(r"model.layers.1.mlp.up_proj must have no hooks")
    handle.remove()
    layer.self_attn.forward = layer.self_attn.forward
    refused(r"model.layers.1.self_attn must have the forward of its class")
    del layer.self_attn.forward
    activation, layer.mlp.act_fn = layer.mlp.act_fn, torch.nn.GELU()
    refused(r"act_fn of model.layers.1.mlp must be SiLU .* got GELU")
    layer.mlp.act_fn = activation
    norm, layer.input_layernorm = layer.input_layernorm, torch.nn.LayerNorm(96)
    refused(r"model.layers.1.input_layernorm must be .*LayerNorm")
    layer.input_layernorm = norm
    with pytest.raises(ValueError, match="must be fused"):
        unfuse_decoder(model)
    fuse_decoder(model)
    with pytest.raises(ValueError, match="must not be fused yet"):
        fuse_decoder(model)
    with pytest.raises(RuntimeError, match="unfuse_decoder"):
        model.load_state_dict(state)
    unfuse_decoder(model)
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"model_type must be one of .*got a Linear"):
        fuse_decoder(torch.nn.Linear(2, 2))
