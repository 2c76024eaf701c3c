"""Quantized models through transformers' own from_pretrained, save_pretrained and generate."""

import dataclasses
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

import transformers
from language_of_numbers import write_model
from rotated_models import IDS, logits, make_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForCausalLM

from rcp_kernels import QuantLinear, checkpoint, quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, load_quantized, save_quantized
from rcp_kernels.integrations.transformers import RcpConfig
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.models.hf import cache_argument
from rcp_kernels.nn import QuantizedKVCache


def quantized(name="llama", rotation="gsr", bits=2, act_bits=4, dtype=torch.float32):
    model = make_model(name).to(dtype)
    # A loaded model has RoPE's frequencies in float32.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    rotated = None if rotation == "none" else rotate_model(model, rotation, group_size=32)
    quantize_model(model, bits, 32, act_bits)
    return model, QuantizationConfig(bits, 32, act_bits, kv_bits=4, rotation=rotated)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with biases and R1 to R4, and its directory."""
    model, config = quantized()
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_quantized(model, folder, config)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that directory, to damage."""
    shutil.copytree(saved[1], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "rotation", "bits", "act_bits", "dtype"),
    [
        ("llama", "gsr", 2, 4, torch.float32),
        ("llama_tied", "none", 3, 8, torch.float32),
        ("llama_tied", "local_hadamard", 4, 16, torch.bfloat16),
        ("qwen3", "walsh", 3, 4, torch.float32),
        ("gemma2", "hadamard", 2, 8, torch.float32),
    ],
)
def test_a_directory_loads_bit_equal_and_saves_again(tmp_path, name, rotation, bits, act_bits, dtype):
    model, config = quantized(name, rotation, bits, act_bits, dtype)
    save_quantized(model, tmp_path / "first", config)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert {key: len(value) for key, value in info.items() if value} == {}
    assert loaded.dtype == dtype
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 14
    loaded.save_pretrained(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for directory in ("second", "sharded"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / directory)
        assert torch.equal(logits(again), logits(model))
    plain, found = load_quantized(tmp_path / "second")
    assert torch.equal(logits(plain), logits(model))
    assert found.rotation == config.rotation
    assert (found.bits, found.group_size, found.act_bits, found.kv_bits) == (bits, 32, act_bits, 4)
    first, second = (load_file(tmp_path / directory / "model.safetensors") for directory in ("first", "second"))
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)


def test_uniform_groups_stay_uniform(tmp_path):
    model, config = quantized("llama", bits=3)
    kinds = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            weight = layer.packed_weight()
            if "mlp" in name:  # tables beside them
                first = weight.levels[..., :1].clamp(max=15)
                weight = dataclasses.replace(weight, levels=first, kind="uniform")
            layer._hold(weight)
            kinds[name] = weight.kind
    assert len(set(kinds.values())) == 2
    save_quantized(model, tmp_path / "first", config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    for other in (loaded, again):
        assert {name: other.get_submodule(name).kind for name in kinds} == kinds
        assert torch.equal(logits(other), logits(model))
    stored = json.loads((tmp_path / "second" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 2


def test_nothing_is_said_while_loading(saved, caplog, recwarn):
    transformers.logging.enable_propagation()
    try:
        AutoModelForCausalLM.from_pretrained(saved[1])
    finally:
        transformers.logging.disable_propagation()
    assert caplog.text == ""
    assert list(recwarn) == []


def test_dtype_is_that_of_everything_but_the_packed_weights(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(loaded.get_submodule(name).dequantize(), module.dequantize())
    assert logits(loaded).dtype == torch.bfloat16


def change_config(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


def change_tensors(folder, change):
    """Write the file anew, as someone would who leaves no sha256 behind."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, sha256=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 4}, r"format_version must be 1 to 3, got 4.*upgrade"),
        ({"bits": 5}, "bits must be one of"),
        ({"colour": 1}, r"unknown \['colour'\]"),
        ({"bits": 3}, "q_proj must fit config.json.*bits of the stored weight must be the layer's, 3, got 2"),
        ({"group_size": 64}, "group_size of the stored weight must be"),
        ({"rotation": None}, "down_proj must fit.*input_rotation of the stored weight must be the layer's, none"),
        ({"modules_to_not_convert": []}, "lm_head must fit|unknown"),
        ({"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.up_proj"]}, r"up_proj.weight'\] missing"),
    ],
)
def test_another_config_is_refused(folder, fields, message):
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AutoModelForCausalLM.from_pretrained(folder)


LAYER = "model.layers.1.self_attn.k_proj"


def from_the_future(tensors):
    tensors[f"{LAYER}.format"] = torch.tensor([4, 2, 32, 96, 32, 7])


def cast(tensors):
    tensors[f"{LAYER}.scales"] = tensors[f"{LAYER}.scales"].float()


def cut(tensors):
    tensors[f"{LAYER}.codes"] = tensors[f"{LAYER}.codes"][:-1].contiguous()


def negative(tensors):
    tensors[f"{LAYER}.scales"][3, 1] = -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (from_the_future, f"{LAYER} must fit.*version must be 1 to 3, got 4; a newer"),
        (cast, f"{LAYER} must fit.*scales must be torch.float16, got torch.float32"),
        (cut, f"{LAYER} must fit.*codes must have shape.*truncated"),
        (negative, r"scales must be finite and >= 0, got -1.0 in row, group \[3, 1\]"),
        (lambda tensors: tensors.pop(f"{LAYER}.levels"), f"{LAYER} must fit.*missing levels"),
        (lambda tensors: tensors.pop(f"{LAYER}.bias"), f"{LAYER} must fit.*Missing key.*bias"),
        (lambda tensors: tensors.update({f"{LAYER}.zeros": torch.ones(1)}), f"{LAYER} must fit.*Unexpected key.*zeros"),
        (lambda tensors: tensors.pop("model.norm.weight"), r"\['model.norm.weight'\] missing"),
        (lambda tensors: tensors.update({"model.mystery": torch.ones(1)}), r"\['model.mystery'\] unknown"),
    ],
)
def test_other_tensors_are_refused(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(95)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight must have the shape .*\(96,\), got \(95,\): a mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_altered_or_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    checkpoint.verify(folder)
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256 of .* must be the one in config.json.*truncated or altered"):
        checkpoint.verify(folder)
    path.write_bytes(data[:-100])
    # transformers looks into the file for a dtype, where config.json has none, before we are asked.
    with pytest.raises((ValueError, SafetensorError), match="not fully covered"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_what_save_pretrained_wrote_is_whole_or_refused(saved, tmp_path, shard):
    AutoModelForCausalLM.from_pretrained(saved[1]).save_pretrained(tmp_path, max_shard_size=shard)
    # The digest in config.json was of the file that was read.
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sha256"] is None
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="safetensors file"):
        load_quantized(tmp_path)


def test_what_cannot_be_loaded_is_refused(saved):
    model, folder = saved
    with pytest.raises(ValueError, match=r"the class that config\.json names, LlamaForCausalLM, got LlamaModel"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="weights must be safetensors files, got none"):
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=transformers.AutoConfig.from_pretrained(folder), state_dict=model.state_dict()
        )
    halves = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match=r"device_map must name one device, got \['cpu', 'disk'\]"):
        AutoModelForCausalLM.from_pretrained(folder, device_map={**halves, "model.rotary_emb": "cpu"})


@pytest.mark.parametrize("rotation", ["none", "gsr"])
def test_a_float_model_is_quantized_while_it_loads(tmp_path, rotation):
    model = make_model("llama_tied")
    model.save_pretrained(tmp_path / "float")
    config = RcpConfig(3, 32, 8, 0.9, kv_bits=4, levels="uniform", rotation=rotation)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    if rotation != "none":
        rotate_model(model, rotation, group_size=32)
    quantize_model(model, 3, 32, 8, levels="uniform", act_clip=0.9)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    _, stored = load_quantized(tmp_path / "out")
    assert (stored.bits, stored.act_clip, stored.kv_bits) == (3, 0.9, 4)
    assert stored.modules_to_not_convert == ("lm_head",)
    assert (stored.rotation is None) == (rotation == "none")


def test_layers_left_in_floating_point_stay_so(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "float")
    config = RcpConfig(4, 32, modules_to_not_convert=("lm_head", "model.layers.0", "down_proj"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    loaded.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(loaded))
    packed = [name for name, module in again.named_modules() if isinstance(module, QuantLinear)]
    assert len(packed) == 6
    assert all(name.startswith("model.layers.1.") and "down" not in name for name in packed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gptq"}, r"RcpConfig: method must be \"rtn\".*got 'gptq'; run `rcp-kernels quantize MODEL"),
        ({"bits": 5}, "bits must be one of"),
        ({"kv_bits": 8}, r"RcpConfig: kv_bits must be one of \(4, 16\), got 8"),
        ({"kv_clip": 0.0}, r"RcpConfig: kv_clip must be in \(0, 1\], got 0.0; 1.0 keeps"),
        ({"act_clip": 3.0}, r"RcpConfig: act_clip must be in \(0, 1\], got 3.0"),
        ({"act_bits": 5}, r"RcpConfig: act_bits must be one of \(4, 8, 16\), got 5"),
        ({"group_size": 0}, "RcpConfig: group_size must be an int of at least 1, got 0"),
        ({"levels": "clip"}, "RcpConfig: levels must be .* got 'clip'"),
        ({"rotation": "fourier"}, "RcpConfig: rotation must be one of"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        RcpConfig(**arguments)


def test_one_name_is_no_list_of_names():
    with pytest.raises(TypeError, match=r"must be a list of names, got 'lm_head'; pass \['lm_head'\]"):
        RcpConfig(modules_to_not_convert="lm_head")


def test_generate_with_every_cache(saved):
    model, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **how)
    assert expected.shape == (2, IDS.shape[1] + 8)
    assert torch.equal(loaded.generate(IDS, **how), expected)
    assert torch.equal(loaded.generate(IDS, cache_implementation="static", **how), expected)
    # Four bits a key and value are another model: equal to the same one before it was saved, and to itself read packed.
    quantized_cache = model.generate(IDS, **cache_argument(model, QuantizedKVCache(model.config)), **how)
    found = loaded.generate(IDS, **cache_argument(loaded, QuantizedKVCache(loaded.config)), **how)
    assert torch.equal(found, quantized_cache)


def test_generate_with_a_compiled_forward(saved):
    """One graph for the prompt and one for all steps after it, with the static cache that keeps shapes."""
    loaded = AutoModelForCausalLM.from_pretrained(saved[1])
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = loaded.generate(IDS, **how)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loaded.forward = torch.compile(loaded.forward, backend=counter)
    assert torch.equal(loaded.generate(IDS, disable_compile=True, **how), expected)
    assert counter.frame_count == 2


def test_what_the_command_wrote_loads_bit_equal(run, tmp_path):
    """`rcp-kernels quantize` and then nothing but transformers, against the package's own loader."""
    model, out = write_model(tmp_path / "float"), tmp_path / "out"
    options = "--method rtn --w-bits 3 --a-bits 8 --kv-bits 4 --group-size 32 --rotation gsr --levels uniform"
    code, _, err = run("quantize", model, "-o", out, *options.split())
    assert not code, err
    loaded = AutoModelForCausalLM.from_pretrained(out)
    plain, _ = load_quantized(out)
    ids = torch.arange(10).view(1, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert loaded.model.layers[0].mlp.down_proj.input_rotation is not None
    assert "method: rtn" in (out / "README.md").read_text()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256 of .* must be the one in config.json"):
        checkpoint.verify(out)
