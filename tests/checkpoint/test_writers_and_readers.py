"""Every way to write a quantized model against every way to read it: the same logits, bit for bit."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

import transformers
from transformers import AutoModelForCausalLM

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, quantize_model, quantize_weight
from rcp_kernels.checkpoint import QuantizationConfig, cast_floats, load_quantized, save_quantized
from rcp_kernels.integrations import on_import
from rcp_kernels.integrations.transformers import RcpConfig
from rcp_kernels.methods.rotate import rotate_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
# What the class of the config is called, and what it takes beside SIZES. Those that ROTATED names can be rotated.
FAMILIES = {
    "Llama": {},
    "LlamaBias": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 32},
    "Gemma3Text": {"sliding_window": 4, "query_pre_attn_scalar": 32},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Granite": {},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, **MIXTURE},
    "Qwen3Moe": {"num_experts": 4, **MIXTURE},
}
ROTATED = ("Llama", "LlamaBias", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text")
IDS = torch.arange(3, 15)[None]


def float_model(family="Llama", tied=False, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family.removesuffix('Bias')}Config")(
        **{**SIZES, **FAMILIES[family]}, tie_word_embeddings=tied
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.25 * torch.rand_like(parameter))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def make_uniform(model):
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            weight = layer.packed_weight()
            first = weight.levels[..., :1].clamp(max=2 ** (7 - weight.bits) - 1)
            layer._hold(
                PackedWeight(
                    weight.codes,
                    first.contiguous(),
                    weight.scales,
                    weight.tensor_scale,
                    weight.bits,
                    weight.group_size,
                    weight.in_features,
                    weight.out_features,
                    "uniform",
                )
            )


@st.composite
def cases(draw):
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return {
        "family": family,
        "bits": draw(st.sampled_from([2, 3, 4])),
        "act_bits": draw(st.sampled_from([4, 8, 16])),
        "uniform": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "sharded": draw(st.booleans()),
        "head": draw(st.booleans()),
        "rotation": draw(st.sampled_from(["none", "gsr", "walsh"])) if family in ROTATED else "none",
        "untie": draw(st.booleans()),
        "writer": draw(st.sampled_from(["save_quantized", "save_pretrained"])),
        "reader": draw(st.sampled_from(["load_quantized", "from_pretrained"])),
        "bias": draw(st.sampled_from(["as it is", "zeros added", "lost"])),
    }


@pytest.mark.slow
@settings(max_examples=200)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_what_is_written_is_read_bit_equal(tmp_path_factory, case, seed):
    folder = tmp_path_factory.mktemp("case")
    model = float_model(case["family"], case["tied"], case["dtype"], seed)
    if case["rotation"] != "none":
        rotate_model(model, case["rotation"], group_size=32, untie=case["untie"])
    skip = () if case["head"] else ("lm_head",)
    quantize_model(model, case["bits"], 32, case["act_bits"], "uniform", skip)
    if case["uniform"]:
        make_uniform(model)
    change_bias(model, case["bias"])
    expected = logits(model)
    if case["writer"] == "save_quantized":
        stored = QuantizationConfig(
            case["bits"], 32, case["act_bits"], kv_bits=4, rotation=getattr(model, "_rcp_rotated", None)
        )
        save_quantized(model, folder / "model", stored)
    else:
        model.save_pretrained(folder / "model", max_shard_size="10KB" if case["sharded"] else "1GB")
        assert len(list((folder / "model").glob("*.safetensors"))) > 1 or not case["sharded"]
    if case["reader"] == "load_quantized":
        loaded, stored = load_quantized(str(folder / "model"))
        assert (stored.bits, stored.act_bits) == (case["bits"], case["act_bits"])
        assert stored.kv_bits == (4 if case["writer"] == "save_quantized" else 16)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert loaded.dtype == case["dtype"]
    assert torch.equal(logits(loaded), expected)
    layers = [{n: m for n, m in x.named_modules() if isinstance(m, QuantLinear)} for x in (model, loaded)]
    assert layers[0].keys() == layers[1].keys()
    assert isinstance(loaded.lm_head, QuantLinear) == case["head"]
    # Written again by the model that was read: the same once more.
    loaded.save_pretrained(folder / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / "again")), expected)


def change_bias(model, how):
    """As hand-made layers may have it: zeros where the class has no bias (AutoGPTQ), or none where it has one."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantLinear) or how == "as it is":
            continue
        if how == "zeros added" and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=model.dtype))
        elif how == "lost":
            layer.bias = None
        else:
            assert name


def test_a_bias_that_the_class_has_no_place_for_is_refused(tmp_path):
    model = float_model()
    quantize_model(model, 4, 32, 16)
    model.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.ones(96))
    for write in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: save_quantized(model, tmp_path / "out", QuantizationConfig(4, 32)),
    ):
        with pytest.raises(ValueError, match=r"mlp\.up_proj must have no bias.*got one that is not zero"):
            write()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_layers_made_by_hand(tmp_path):
    """One layer at a time, from_packed; nothing told transformers of it."""
    model = float_model("Qwen2")
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            packed = QuantLinear.from_packed(quantize_weight(linear.weight, 3, 32), linear.bias, act_bits=16)
            model.set_submodule(name, packed)
    model.save_pretrained(tmp_path)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(load_quantized(tmp_path)[0]), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "act_bits", 8), "act_bits must be the same in all packed layers, got 16 in"),
        (lambda layer: setattr(layer, "act_clip", 0.5), "act_clip must be the same in all packed layers"),
    ],
)
def test_layers_that_differ_are_refused(tmp_path, change, message):
    model = float_model()
    quantize_model(model, 3, 32, 16)
    change(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


def test_what_the_class_would_not_make_is_refused(tmp_path):
    model = float_model()
    quantize_model(model, 3, 32, 16)
    model.model.layers[0].mlp.adapter = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.adapter\.bias'.* unknown to it"):
        model.save_pretrained(tmp_path)
    del model.model.layers[0].mlp.adapter
    model.model.layers[0].mlp.up_proj = QuantLinear.from_linear(nn.Linear(64, 128, bias=False), 3, 32, 16)
    with pytest.raises(ValueError, match=r"up_proj must have the sizes .*\(64, 96\), got \(64, 128\)"):
        model.save_pretrained(tmp_path)


def test_a_rotation_without_a_record_is_refused(tmp_path):
    model = float_model()
    quantize_model(model, 3, 32, 16)
    rotated = nn.Linear(96, 64, bias=False)
    model.model.layers[0].mlp.down_proj = QuantLinear.from_linear(
        rotated, 3, 32, 16, input_rotation=OnlineRotation(96, 32)
    )
    with pytest.raises(ValueError, match="must have a record, got input_rotation in model"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_made_while_loading(tmp_path, tied):
    float_model(tied=tied).save_pretrained(tmp_path / "float")
    config = RcpConfig(bits=4, group_size=32, modules_to_not_convert=[])
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(packed.lm_head, QuantLinear)
    packed.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again), logits(packed))
    assert torch.equal(logits(load_quantized(tmp_path / "packed")[0]), logits(packed))
    again.tie_weights()
    assert torch.equal(logits(again), logits(packed))


def test_the_default_of_modules_to_not_convert():
    assert RcpConfig(bits=4, group_size=32, modules_to_not_convert=None).stored.modules_to_not_convert == ("lm_head",)


@pytest.mark.parametrize("rotation", ["none", "gsr"])
def test_dequantize_gives_a_float_model(tmp_path, rotation):
    model = float_model()
    if rotation != "none":
        rotate_model(model, rotation, group_size=32, r3=False)
    quantize_model(model, 4, 32, 16)
    model.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = logits(loaded)
    loaded.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in loaded.modules())
    found = logits(loaded)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    loaded.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float")), found)


def test_cast_floats_leaves_tables_and_refuses_overflow():
    model = float_model(tied=True)
    quantize_model(model, 3, 32, 16)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"values of model\.norm\.weight must be at most 65504 .* got 1e\+06"):
        cast_floats(model, torch.float16)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    cast_floats(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.config.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import rcp_kernels, transformers",
        "import transformers, rcp_kernels",
        "from transformers import LlamaForCausalLM; import rcp_kernels",
        "import rcp_kernels; from transformers import LlamaForCausalLM",
    ],
)
def test_importing_the_package_is_enough(tmp_path, imports):
    model = float_model()
    quantize_model(model, 3, 32, 16)
    model.save_pretrained(tmp_path / "model")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
{imports}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r})
with torch.no_grad():
    found = model(torch.arange(3, 15)[None], use_cache=False).logits
assert torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_package_imports_neither_transformers_nor_the_compiler():
    code = "import sys, rcp_kernels; print(sorted({'transformers', 'torch._dynamo', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_transformers_that_is_too_old_is_said(monkeypatch):
    def refuse(name):
        raise ImportError("transformers must be 5 or later, got 4.57.0")

    monkeypatch.setattr(on_import.importlib, "import_module", refuse)
    with pytest.warns(UserWarning, match="cannot be loaded or saved: transformers must be 5 or later, got 4"):
        on_import.install()  # transformers is there


def test_families_whose_initializers_read_linear_layers(tmp_path):
    """transformers initializes what no file holds, and Mamba's code for that reads the weights of linear layers."""
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=1, vocab_size=96, state_size=32, time_step_rank=32, use_mambapy=False
    )
    model = transformers.MambaForCausalLM(config).eval()
    quantize_model(model, 4, 32, 16, "uniform", ("lm_head", "dt_proj"))  # its forward reads the weight of dt_proj
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_model_with_an_image_tower(tmp_path):
    text = {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=45,
        boi_token_index=43,
        eoi_token_index=44,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    quantize_model(model, 4, 32, 16, "uniform")
    model.save_pretrained(tmp_path)
    loaded = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.slow
def test_asking_for_the_module_spec_does_not_use_up_the_hook(tmp_path):
    model = float_model()
    quantize_model(model, 3, 32, 16)
    model.save_pretrained(tmp_path)
    code = f"""
import importlib.util, rcp_kernels
for _ in range(2):
    assert importlib.util.find_spec("transformers.modeling_utils")
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "QuantLinear", done.stderr[-2000:]
