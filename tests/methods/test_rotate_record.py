"""The record of a rotation, saved models, and the parts of a model."""

import copy
import dataclasses
import json

import pytest
import torch
from rotated_models import NAMES, difference, logits, make_config, make_model, random_rotation, transformers
from torch import nn

from rcp_kernels import OnlineRotation
from rcp_kernels.methods.rotate import Rotated, apply_structure, rotate_model
from rcp_kernels.models import FAMILIES, describe
from rcp_kernels.nn import RotatedLinear

WITHIN = 1e-4  # difference of float32 logits. Usual is 1e-5; a forgotten bias or gain gives 1e-1


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "rotation"),
    [
        ("llama_tied", "none"),
        ("llama_tied", "gsr"),
        ("mistral", "matrix"),
        ("qwen3", "walsh"),
        ("gemma2", "hadamard"),
        ("gemma3_text", "local_hadamard"),
    ],
)
def test_structure_comes_back(name: str, rotation: str, models) -> None:
    model = copy.deepcopy(models[name])
    given = random_rotation(model.config.hidden_size) if rotation == "matrix" else rotation
    record = rotate_model(model, given, group_size=32, r2=True, r3=True, r4=True, seed=5)
    record = Rotated.from_dict(json.loads(json.dumps(record.to_dict())))
    expected = logits(model)
    if record.untied:  # safetensors refuses two tensors that share memory
        addresses = [value.data_ptr() for value in model.state_dict().values()]
        assert len(set(addresses)) == len(addresses)

    fresh = make_model(name, seed=9)
    apply_structure(fresh, record)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)

    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(make_config(name)).eval()
        apply_structure(skeleton, record)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert set(skeleton.state_dict()) == set(state)
    skeleton.load_state_dict(state, assign=True)
    if not record.untied:
        skeleton.tie_weights()
    rotary = {key: buffer for key, buffer in model.named_buffers() if key not in state}
    for key, buffer in rotary.items():  # buffers outside the state_dict: RoPE's frequencies, gemma's scale
        parent, _, child = key.rpartition(".")
        setattr(skeleton.get_submodule(parent), child, buffer)
    assert torch.equal(logits(skeleton), expected)


def test_untied_head_stays_untied(models) -> None:
    model = copy.deepcopy(models["llama_tied"])
    rotate_model(model, "walsh", untie=True)
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    # transformers 5 and accelerate use these to place, save and tie weights.
    assert "lm_head.weight" not in getattr(model, "all_tied_weights_keys", {})


def test_tied_head_stays_tied(models, expected) -> None:
    model = copy.deepcopy(models["llama_tied"])
    gain = model.model.norm.weight.clone()
    record = rotate_model(model, "walsh")
    assert (record.tied, record.untied) == (True, False)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, gain)
    assert difference(logits(model), expected["llama_tied"]) < WITHIN
    assert Rotated.from_dict({k: v for k, v in record.to_dict().items() if k != "tied"}).tied is False


def test_no_gain_to_fold_needs_nothing_online(models) -> None:
    model = copy.deepcopy(models["llama_tied"])
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
    before = logits(model)
    record = rotate_model(model, "gsr", group_size=32, r3=False, r4=False)
    assert (record.tied, record.untied) == (False, False)
    assert not any(isinstance(module, OnlineRotation) for module in model.modules())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(logits(model), before) < WITHIN


def test_saved_by_transformers(tmp_path, models) -> None:
    model = copy.deepcopy(models["llama_tied"])
    record = rotate_model(model, "gsr", group_size=32)
    with pytest.warns(UserWarning, match=r"save_pretrained: this float model has a rotation that runs in it"):
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    apply_structure(loaded, record)
    assert torch.equal(logits(loaded), logits(model))


def test_record_refuses_what_it_is_not(models) -> None:
    model = copy.deepcopy(models["llama"])
    record = rotate_model(model, "gsr", group_size=32)
    fields = record.to_dict()
    for broken, what in (
        ({key: value for key, value in fields.items() if key != "r3"}, "fields must be"),
        (fields | {"more": 1}, "fields must be"),
        (fields | {"r4": 1}, "r4 must be bool"),
        (fields | {"group_size": "32"}, "group_size must be int"),
        (fields | {"rotation": "haar"}, "rotation must be one of"),
    ):
        with pytest.raises(ValueError, match=what):
            Rotated.from_dict(broken)
    with pytest.raises(ValueError, match="'mistral', got 'llama'"):
        apply_structure(copy.deepcopy(models["llama"]), dataclasses.replace(record, model_type="mistral"))
    with pytest.raises(ValueError, match="must not be rotated yet"):
        apply_structure(model, record)


def test_describe_names_every_module(models) -> None:
    assert {make_config(name).model_type for name in NAMES} == set(FAMILIES)
    for name in NAMES:
        model, architecture = models[name], describe(models[name])
        assert model.get_submodule(architecture.embed) is model.get_input_embeddings()
        assert model.get_submodule(architecture.head) is model.get_output_embeddings()
        assert len(architecture.layers) == 2
        found = {key for layer in architecture.layers for key in layer.linears} | {"lm_head"}
        assert found == {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
        norms = {
            value for layer in architecture.layers for key, value in vars(layer).items() if "norm" in key and value
        }
        norms.add(architecture.final_norm)
        assert norms == {key for key, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
        assert (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim) == (
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            model.config.head_dim,
        )


def test_unsupported_models() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=31)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match=r"gemma, gemma2, gemma3_text, llama, mistral, qwen2, qwen3, got 'gpt2'"):
        rotate_model(model)
    with pytest.raises(ValueError, match="got a Sequential without config"):
        rotate_model(nn.Sequential(nn.Linear(32, 32)))
    broken = make_model("llama")
    with pytest.raises(ValueError, match=r"the module model\.embed_tokens, got a LlamaModel without it"):
        describe(broken.model)
    del broken.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj"):
        rotate_model(broken, "gsr", group_size=32)


def test_rotated_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).eval()
    rotation = OnlineRotation(96, 32)
    x = torch.randn(3, 5, 96)
    before = linear(x)
    rotation.fuse_into(linear)
    layer = RotatedLinear.from_linear(linear, rotation)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert set(layer.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
    assert RotatedLinear(96, 8, rotation, bias=False, dtype=torch.bfloat16)(x.bfloat16()).shape == (3, 5, 8)
    with pytest.raises(ValueError, match=r"size 96 .in_features., got 64"):
        RotatedLinear(96, 8, OnlineRotation(64))
    with pytest.raises(TypeError, match="OnlineRotation, got Identity"):
        RotatedLinear(96, 8, nn.Identity())


def test_attention_that_cannot_be_rotated() -> None:
    from rcp_kernels.nn.rotated_linear import rotate_queries_and_keys

    with pytest.raises(ValueError, match="forward of Identity must call apply_rotary_pos_emb"):
        rotate_queries_and_keys(nn.Identity(), OnlineRotation(32))
    attention = make_model("llama").model.layers[0].self_attn
    rotate_queries_and_keys(attention, OnlineRotation(32))
    with pytest.raises(RuntimeError, match=r"position_embeddings=\.\.\., got"):
        attention(torch.zeros(1, 2, 96))
    with pytest.raises(ValueError, match="qk_rotation must not be there yet, got OnlineRotation"):
        rotate_queries_and_keys(attention, OnlineRotation(32))
