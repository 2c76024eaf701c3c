"""Configurations, dtypes and layers that save_quantized and from_pretrained treat specially."""

import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")
import transformers
from test_writers_and_readers import float_model, logits
from transformers import AutoModelForCausalLM

from rcp_kernels import quantize_model
from rcp_kernels.checkpoint import cast_floats, load_quantized, save_quantized
from rcp_kernels.integrations.transformers import RcpConfig


def test_the_config_given_to_save_quantized_counts_for_a_loaded_model_too(tmp_path):
    model = float_model()
    quantize_model(model, 4, 32, 8)
    model.save_pretrained(tmp_path / "a")
    loaded, stored = load_quantized(tmp_path / "a")
    save_quantized(loaded, tmp_path / "b", dataclasses.replace(stored, kv_bits=4, kv_clip=0.9))
    again, stored = load_quantized(tmp_path / "b")
    assert (stored.kv_bits, stored.kv_clip) == (4, 0.9)
    again.save_pretrained(tmp_path / "c")
    assert load_quantized(tmp_path / "c")[1].kv_bits == 4


@pytest.mark.parametrize("part", ["bias", "norm"])
def test_parameters_of_two_dtypes_are_refused(tmp_path, part):
    model = float_model("LlamaBias", dtype=torch.bfloat16)
    quantize_model(model, 4, 32, 16)
    if part == "bias":
        layer = model.model.layers[0].mlp.up_proj
        layer.bias = nn.Parameter(layer.bias.detach().float())
    else:
        model.model.norm.float()
    with pytest.raises(ValueError, match=r"one dtype, .* got torch\.bfloat16 and torch\.float32 in .*cast_floats"):
        model.save_pretrained(tmp_path)
    cast_floats(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_float_layers_under_a_config_of_ours_are_refused(tmp_path):
    model = float_model()
    quantize_model(model, 4, 32, 16)
    model.save_pretrained(tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="must have packed layers, got none"):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"dtype must be float32, float16 or bfloat16, got torch\.float64"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float64)
    model.save_pretrained(tmp_path / "v", variant="w4")
    with pytest.raises(ValueError, match="load_quantized: the weights in"):
        load_quantized(tmp_path / "v")


def test_a_layer_that_two_places_share(tmp_path):
    model = float_model()
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.gate_proj
    quantize_model(model, 4, 32, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_plain_dictionary_is_no_request_to_quantize():
    with pytest.raises(ValueError, match=r"must have a format_version, .* got none; to quantize .* pass an RcpConfig"):
        RcpConfig.from_dict({"quant_method": "rcp", "bits": 4, "group_size": 32})
    assert "RcpConfig" in repr(RcpConfig(bits=4))
