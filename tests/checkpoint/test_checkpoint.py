"""A quantized model on disk: the same logits bit for bit, damage refused with its reason, and no half-written files."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import transformers
from safetensors.torch import load_file, save_file

from rcp_kernels import QuantLinear, checkpoint, quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, load_quantized, read_quantization_config, save_quantized
from rcp_kernels.methods.rotate import rotate_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
IDS = torch.arange(20).view(1, 20) % 96


def quantized(rotation="gsr", bits=2, act_bits=4, tie=True, family="Llama", seed=0, dtype=torch.float32, **sizes):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "tie_word_embeddings": tie, **sizes})
    # Not .to(dtype) afterwards: it would round RoPE's frequencies too, which a loaded model has in float32.
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # without a gain of its own nothing has to be folded, and the head may stay tied
                parameter.mul_(1 + torch.rand_like(parameter))
    rotated = None if rotation == "none" else rotate_model(model, rotation, group_size=32)
    quantize_model(model, bits, 32, act_bits)
    return model, QuantizationConfig(bits, 32, act_bits, kv_bits=4, rotation=rotated)


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("rotation", ["none", "hadamard", "walsh", "local_hadamard", "gsr"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_saved_model_gives_the_same_logits(tmp_path, rotation, tie):
    model, config = quantized(rotation, tie=tie)
    save_quantized(model, tmp_path / "out", config)
    loaded, found = load_quantized(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert found.rotation == config.rotation
    assert found.modules_to_not_convert == ("lm_head",)
    assert (found.bits, found.group_size, found.act_bits, found.kv_bits) == (2, 32, 4, 4)
    assert not loaded.training
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 14


@pytest.mark.parametrize(
    ("family", "bits", "act_bits", "dtype"),
    [("Qwen2", 3, 8, torch.float32), ("Qwen3", 4, 16, torch.bfloat16), ("Mistral", 2, 4, torch.bfloat16)],
)
def test_families_biases_and_dtypes_come_back(tmp_path, family, bits, act_bits, dtype):
    model, config = quantized("gsr", bits, act_bits, family=family, dtype=dtype, head_dim=16)
    save_quantized(model, tmp_path / "out", config)
    loaded, _ = load_quantized(tmp_path / "out")
    assert logits(loaded).dtype == dtype
    assert torch.equal(logits(loaded), logits(model))


def test_the_directory_is_one_of_transformers(tmp_path):
    model, config = quantized()
    save_quantized(model, tmp_path / "out", config, files={"recipe.yaml": "method: rtn\n"})
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.yaml"]
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["dtype"] == "float32"
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert fields["quantization_config"]["quant_method"] == "rcp"
    assert fields["quantization_config"]["rotation"]["rotation"] == "gsr"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert set(tensors) == set(model.state_dict()) - {"lm_head.weight"}  # tied to the embedding
    assert tensors["model.layers.0.mlp.down_proj.codes"].dtype == torch.uint8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def make_uniform(model, every=1):
    """Replace the tables of every so many packed layers by progressions; returns how many."""
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)][::every]
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.packed_weight()
        first = weight.levels[..., :1].clamp(max=2 ** (7 - weight.bits) - 1)
        layer._hold(dataclasses.replace(weight, levels=first, kind="uniform"))
    return len(names)


@pytest.mark.parametrize("every", [1, 2])
def test_uniform_groups_come_back_as_such(tmp_path, every):
    """In all layers, or in some beside tables."""
    model, config = quantized("gsr", bits=3)
    save_quantized(model, tmp_path / "tables", config)
    count = make_uniform(model, every)
    save_quantized(model, tmp_path / "out", config)
    versions = [read_quantization_config(tmp_path / name)[1].format_version for name in ("tables", "out")]
    assert versions == [1, 2]
    loaded, _ = load_quantized(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert sum(layer.kind == "uniform" for layer in loaded.modules() if isinstance(layer, QuantLinear)) == count
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("tables", "out")]
    groups = sum(len(layer.packed_weight().scales.view(-1)) for layer in loaded.modules() if _is_uniform(layer))
    assert sizes[0] - sizes[1] == pytest.approx(7 * groups, rel=0.01)
    save_quantized(loaded, tmp_path / "again", config)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _is_uniform(module):
    return isinstance(module, QuantLinear) and module.kind == "uniform"


def change(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format_version": 4}, r"format_version must be 1 to 3, got 4.*upgrade"),
        ({"format_version": True}, r"format_version must be 1 to 3, got True"),
        ({"quant_method": "gptq"}, r"quant_method must be 'rcp', got 'gptq'"),
        ({"bits": 5}, "bits must be one of"),
        ({"act_bits": 5}, r"act_bits must be one of \(4, 8, 16\), got 5"),
        ({"kv_bits": 3}, r"kv_bits must be one of \(4, 16\), got 3"),
        ({"colour": 1}, r"unknown \['colour'\]"),
        ({"rotation": {"rotation": "gsr"}}, "Rotated: fields must be"),
        ({"act_clip": 2.0}, r"act_clip must be in \(0, 1\], got 2.0"),
        ({"kv_clip": "a"}, r"kv_clip must be in \(0, 1\], got 'a'"),
        ({"act_bits": 4.0}, r"act_bits must be one of \(4, 8, 16\), got 4.0"),
        ({"group_size": "32"}, "group_size must be an int of at least 1, got '32'"),
        ({"sha256": 3}, "sha256 must be a string or null, got 3"),
        ({"rotation": 3}, "rotation must be a table of fields or null, got 3"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names, got 'lm_head'"),
        ({"bits": 3}, "bits of the stored weight must be the layer's, 3, got 2"),
        ({"group_size": 64}, "group_size of the stored weight must be"),
        ({"rotation": None}, "input_rotation of the stored weight must be the layer's, none"),
        ({"modules_to_not_convert": []}, "must fit|missing"),
    ],
)
def test_another_config_is_refused(tmp_path, fields, message):
    model, config = quantized()
    save_quantized(model, tmp_path / "out", config)
    change(tmp_path / "out", **fields)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "out")


def test_an_altered_or_truncated_weight_file_is_refused(tmp_path):
    model, config = quantized()
    save_quantized(model, tmp_path / "out", config)
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    checkpoint.verify(tmp_path / "out")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"sha256 of .*truncated or altered since"):
        checkpoint.verify(tmp_path / "out")
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="safetensors file"):
        load_quantized(tmp_path / "out")
    change(tmp_path / "out", sha256=None)
    with pytest.raises(ValueError, match=r"must have the sha256 of model\.safetensors, got none"):
        checkpoint.verify(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match="must be there, got no such file"):
        load_quantized(tmp_path / "out")


def test_missing_and_unknown_tensors_are_named(tmp_path):
    model, config = quantized()
    save_quantized(model, tmp_path / "out", config)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    change(tmp_path / "out", sha256=None)
    with pytest.raises(ValueError, match=r"\['model\.norm\.weight'\] missing"):
        load_quantized(tmp_path / "out")


def test_not_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be the config of a quantized model, got FileNotFoundError"):
        load_quantized(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="got JSONDecodeError"):
        load_quantized(tmp_path)


def test_a_float_model_is_not_saved(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="must have packed layers, got none"):
        save_quantized(model, tmp_path / "out", QuantizationConfig(2, 32))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_other_files_is_not_replaced(tmp_path):
    model, config = quantized()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be empty or hold a quantized model.*got other files"):
        save_quantized(model, tmp_path, config)
    with pytest.raises(ValueError, match="must be a directory, got a file"):
        save_quantized(model, tmp_path / "notes.txt", config)


def test_a_float_model_or_a_stray_file_is_not_deleted(tmp_path):
    model, config = quantized()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path / "float")
    before = sorted(path.name for path in (tmp_path / "float").iterdir())
    with pytest.raises(ValueError, match="hold a quantized model to be replaced, got other files"):
        save_quantized(model, tmp_path / "float", config)
    assert sorted(path.name for path in (tmp_path / "float").iterdir()) == before
    save_quantized(model, tmp_path / "out", config)
    for stray in ("notes.md", ".git"):
        (tmp_path / "out" / stray).mkdir()
        with pytest.raises(ValueError, match=f"got '{stray}'"):
            save_quantized(model, tmp_path / "out", config)
        (tmp_path / "out" / stray).rmdir()
    save_quantized(model, tmp_path / "out", config)


def test_the_working_directory_and_an_unwritable_one_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for name in (".", "..", tmp_path):
        with pytest.raises(ValueError, match="must not be the working directory or hold it"):
            checkpoint.check_output(type(tmp_path)(name))
    with pytest.raises(OSError, match="/proc must be a directory that can be written to"):
        checkpoint.check_output(type(tmp_path)("/proc/out"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 3}, "bits of config must be that of every packed layer, got 3 and 2"),
        ({"group_size": 64}, "group_size of config must be"),
        ({"act_bits": 16}, "act_bits of config must be that of every packed layer, got 16 and 4"),
        ({"act_clip": 0.9}, "act_clip of config must be"),
        ({"rotation": None}, "rotation of config must be the model's, got None and Rotated"),
    ],
)
def test_a_config_that_is_not_the_model_s_is_refused(tmp_path, fields, message):
    model, config = quantized()
    with pytest.raises(ValueError, match=message):
        save_quantized(model, tmp_path / "out", dataclasses.replace(config, **fields))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_cast_is_refused(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).bfloat16()
    quantize_model(model, 2, 32, 4)
    with pytest.raises(ValueError, match=r"inv_freq must be torch\.float32.*from_pretrained\(\.\.\., dtype=\.\.\.\)"):
        save_quantized(model, tmp_path / "out", QuantizationConfig(2, 32, 4))


@pytest.mark.parametrize(
    "text", ["[1]", '{"quantization_config": [1]}', '{"quantization_config": {"quant_method": []}}']
)
def test_a_config_of_other_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"must be the config of|must be a table|quant_method must be"):
        load_quantized(tmp_path)


def test_a_config_of_no_language_model_is_refused(tmp_path):
    model, config = quantized()
    save_quantized(model, tmp_path / "out", config)
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    for changed in ({"hidden_size": 65}, {"model_type": "none"}):
        path.write_text(json.dumps({**fields, **changed}))
        # On transformers 5.0 the rotation is the first to see that 65 is no size for it.
        with pytest.raises(ValueError, match=r"must describe a language model of transformers|must divide hidden_size"):
            load_quantized(tmp_path / "out")
    del fields["model_type"]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="must describe a language model of transformers"):
        load_quantized(tmp_path / "out")


def test_an_old_model_that_cannot_go_back_is_kept_aside(tmp_path, monkeypatch):
    first, config = quantized(seed=0)
    save_quantized(first, tmp_path / "out", config)
    rename = os.rename

    def once(source, target):
        if str(target).endswith("out"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OSError, match=r"what was there is in .*\.out\.old\..*/model"):
        save_quantized(quantized(seed=1)[0], tmp_path / "out", config)
    (kept,) = tmp_path.glob(".out.old.*/model")
    assert torch.equal(logits(load_quantized(kept)[0]), logits(first))


def test_a_model_is_replaced_whole(tmp_path):
    first, config = quantized(seed=0)
    save_quantized(first, tmp_path / "out", config)
    second, config = quantized(seed=1)
    save_quantized(second, tmp_path / "out", config)
    assert torch.equal(logits(load_quantized(tmp_path / "out")[0]), logits(second))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", ["file_sha256", "flush", "take_name"])
def test_an_error_on_the_way_leaves_the_old_model(tmp_path, monkeypatch, failing):
    first, config = quantized(seed=0)
    save_quantized(first, tmp_path / "out", config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.save, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_quantized(quantized(seed=1)[0], tmp_path / "out", config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_model(tmp_path):
    first, config = quantized(seed=0)
    save_quantized(first, tmp_path / "out", config)
    code = f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path = {sys.path!r}
        from test_checkpoint import quantized, save_quantized
        model, config = quantized(seed=1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            save_quantized(model, Path({str(tmp_path / "out")!r}), config)
        except OSError as error:
            print("refused", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused"), done.stderr
    assert torch.equal(logits(load_quantized(tmp_path / "out")[0]), logits(first))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_config_round_trip():
    _, config = quantized()
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
