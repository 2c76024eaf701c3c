"""rotate_model refuses bad arguments and models, names the cause, and leaves the model unchanged."""

import copy
import re

import pytest
import torch
from rotated_models import difference, logits, make_config, make_model, transformers
from torch import nn

from rcp_kernels import quantize_model
from rcp_kernels.methods.rotate import rotate_model

WITHIN = 1e-4  # of float32 logits, as in test_rotate


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: make_model(name) for name in ("llama", "gemma2")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": "haar"}, r"rotation must be one of \('none', 'hadamard', .* got 'haar'"),
        ({"rotation": "matrix"}, r"rotation must be one of"),
        ({"group_size": 128}, r"hidden_size and intermediate_size .* got 128 and 96 and 160; the nearest .* is 32"),
        ({"group_size": 16, "r4_group_size": 64}, r"r4_group_size must divide intermediate_size .* 64 and 160; .* 32"),
        ({"group_size": 0}, r"must divide .* the nearest that works is 2"),
        ({"group_size": 128, "r4": False}, r"group_size must divide hidden_size for .* 128 and 96; .* is 32"),
        ({"rotation": torch.eye(95)}, r"floating point \[96, 96\]"),
        ({"rotation": torch.eye(96) * 1.001}, r"orthogonal, R R\^T = I within 1e-05, got 0.002"),
        ({"rotation": torch.full((96, 96), float("nan"))}, r"orthogonal"),
    ],
)
def test_refused_and_left_alone(arguments: dict, message: str, models) -> None:
    model = copy.deepcopy(models["llama"])
    with pytest.raises(ValueError, match=message):
        rotate_model(model, **arguments)
    assert all(torch.equal(value, models["llama"].state_dict()[key]) for key, value in model.state_dict().items())


def test_sizes_without_a_matrix() -> None:
    config = make_config("llama")
    config.intermediate_size = 19 * 32  # as the 4864 = 19 * 256 of Qwen2-0.5B
    model = transformers.LlamaForCausalLM(config).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=r"R4 of intermediate_size.* 608 .* 32 .*r4_group_size, or r4=False"):
        rotate_model(model, "walsh")
    rotate_model(model, "walsh", r4_group_size=32)
    assert difference(before, logits(model)) <= WITHIN
    config = make_config("llama")
    config.hidden_size = 19 * 8
    model = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"R1 of hidden_size: .* 152 .* 8 "):
        rotate_model(model, "hadamard")
    with pytest.raises(ValueError, match=r"hidden_size .* got 32 and 152.*; the nearest that works is 8"):
        rotate_model(model, "gsr", group_size=32, r4=False)
    config = make_config("llama")
    config.head_dim = 18
    model = transformers.LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"R2 and R3 of head_dim: .* 18 "):
        rotate_model(model, "gsr", group_size=32)


def test_refuses_what_is_no_plain_float_model(models) -> None:
    model = copy.deepcopy(models["llama"])
    quantize_model(model, bits=4, group_size=32)
    with pytest.raises(TypeError, match=r"q_proj must be a floating point nn.Linear, got QuantLinear"):
        rotate_model(model, "gsr", group_size=32)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make_config("llama"))
    with pytest.raises(ValueError, match="meta device"):
        rotate_model(model, "gsr", group_size=32)
    for part in ({"r3": True}, {"r4": True}):
        model = copy.deepcopy(models["llama"])
        rotate_model(model, "none", **part)
        with pytest.raises(ValueError, match="must not be rotated yet"):
            rotate_model(model, "gsr", group_size=32)
    model = copy.deepcopy(models["llama"])
    rotate_model(model, "walsh", r2=False, r3=False, r4=False)  # only the record shows R1
    with pytest.raises(ValueError, match="must not be rotated yet, got one with Rotated"):
        rotate_model(copy.deepcopy(model), "hadamard", r3=False, r4=False)
    model = copy.deepcopy(models["gemma2"])
    rotate_model(model, "gsr", group_size=32, r2=False, r3=False, r4=False)
    with pytest.raises(ValueError, match="must not be rotated yet"):
        rotate_model(model, "none", r2=True)
    with pytest.raises(ValueError, match=r"'gemma2', got a tensor"):
        rotate_model(copy.deepcopy(models["gemma2"]), torch.eye(96))
    model = copy.deepcopy(models["llama"])
    model.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"k_proj must have 96 input and 96 output features by the config, got 96 and"):
        rotate_model(model, "gsr", group_size=32)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm", "lm_head"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_named(name: str, value: float, models) -> None:
    model = copy.deepcopy(models["llama"])
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[-1] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weight of {re.escape(name)} must be finite, got NaN or Inf"):
        rotate_model(model, "gsr", group_size=32)
    assert all(torch.equal(tensor.nan_to_num(), before[key].nan_to_num()) for key, tensor in model.state_dict().items())


def test_float64_is_taken_where_nothing_runs_online(models) -> None:
    model = copy.deepcopy(models["llama"]).double()
    for part in ({}, {"r3": False}, {"r4": False}):
        with pytest.raises(
            TypeError, match=r"of model\.embed_tokens must be one of .*got torch\.float64; .*r3=False, r4="
        ):
            rotate_model(model, "gsr", group_size=32, **part)
    before = logits(model)
    rotate_model(model, "gsr", group_size=32, r3=False, r4=False)
    assert difference(before, logits(model)) <= 1e-6  # norms compute in float32
    model = copy.deepcopy(models["gemma2"]).double()
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        rotate_model(model, "gsr", group_size=32, r3=False, r4=False)
    model = copy.deepcopy(models["llama"])
    model.lm_head.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"weight of lm_head must be one of .*got torch\.float8_e4m3fn; convert"):
        rotate_model(model, "gsr", group_size=32, r3=False, r4=False)
