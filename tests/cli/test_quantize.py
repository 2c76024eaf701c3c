"""quantize, eval and generate from the command line, end to end on a tiny model with its own tokenizer."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
import yaml
from language_of_numbers import WORDS, write_model
from safetensors.torch import load_file, save_file

from rcp_kernels import checkpoint
from rcp_kernels.checkpoint import load_quantized
from rcp_kernels.methods.rcp import Diverged, RcpConfig, loop
from rcp_kernels.pipeline.load import is_quantized
from rcp_kernels.pipeline.recipe import OWN, read_recipe

TRAINING = {
    "steps": 3,
    "batch": 2,
    "micro_batch": 1,
    "warmup": 1,
    "validate_every": 2,
    "checkpoint_every": 1,
    "bf16": False,
    "blocks": {"sequences": 2, "epochs": 1, "batch": 1},
}


def logits(folder):
    with torch.no_grad():
        return load_quantized(folder)[0](torch.arange(10).view(1, 10)).logits


def common(text, method="rcp"):
    uses = {"rtn": [], "rcp": ["--text", text, "--sequence", 16]}
    return [*uses.get(method, ["--text", text, "--sequence", 16, "--samples", 4]), "--group-size", 32]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", ["--rotation", "none", "--levels", "uniform"]),
        ("gptq", ["--rotation", "hadamard", "--a-bits", 4, "--kv-bits", 4]),
        ("laquant", ["--rotation", "none", "--w-bits", 3]),
    ],
)
def test_every_method_writes_a_model_that_evaluates_and_generates(run, model, text, tmp_path, method, options):
    out = tmp_path / "out"
    code, _, err = run("quantize", model, "-o", out, "--method", method, *options, *common(text, method))
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    code, said, err = run("eval", out, "--text", text, "--tokens", 64, "--window", 16, "--json", tmp_path / "e.json")
    assert code == 0, err
    assert said.startswith("perplexity ")
    measured = json.loads((tmp_path / "e.json").read_text())
    assert measured["tokens"] == 64
    assert 1 < measured["perplexity"] < 100  # random weights: about as many as words
    code, said, err = run("generate", out, "--prompt", "one two three", "--new-tokens", 5)
    assert code == 0, err
    assert set(said.split()) <= set(WORDS)


def test_a_recipe_makes_the_same_model_again(run, model, text, tmp_path):
    (tmp_path / "training.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    arguments = ["--method", "rcp", "--a-bits", 4, "--kv-bits", 4, *common(text)]
    code, _, err = run(
        "quantize", model, "-o", tmp_path / "one", *arguments, "--recipe", tmp_path / "training.yaml", "--threads", 1
    )
    assert code == 0, err
    recipe = read_recipe(tmp_path / "one" / "recipe.yaml")
    stored = recipe["training"]
    assert TRAINING == {name: stored[name] for name in TRAINING} | {
        "blocks": {name: stored["blocks"][name] for name in TRAINING["blocks"]}
    }
    # What the preset and the defaults gave is there as well: another version's may be others.
    assert set(stored) == {entry.name for entry in dataclasses.fields(RcpConfig)} - OWN
    assert (recipe["method"], recipe["a_bits"], recipe["rotation"], recipe["model"]) == ("rcp", 4, "gsr", str(model))
    assert "recipe: method rcp, 2-bit weights in groups of 32, 4-bit activations" in err
    again = ["quantize", "--recipe", tmp_path / "one" / "recipe.yaml", "--threads", 1]
    code, _, err = run(*again, "-o", tmp_path / "two")
    assert code == 0, err
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "two"))
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["training"]["steps"] == 3
    assert "validation" in (tmp_path / "one" / "curve.csv").read_text()
    assert not (tmp_path / "one.training").exists()
    assert run(*again, "-o", tmp_path / "three", "--steps", 2)[0] == 0
    assert json.loads((tmp_path / "three" / "report.json").read_text())["training"]["steps"] == 2


@pytest.mark.slow
def test_two_processes_that_share_a_model_make_what_one_makes(run, model, text, tmp_path):
    """quantize under torchrun with --shard: FSDP2 of accelerate over gloo."""
    pytest.importorskip("accelerate")
    (tmp_path / "training.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    options = [*map(str, ["--method", "rcp", "--kv-bits", 4, *common(text), "--recipe", tmp_path / "training.yaml"])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rcp_kernels"]
    path = os.pathsep.join([str(Path(checkpoint.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "quantize", str(model), "-o", str(tmp_path / "two"), "--shard", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "two.training").exists()
    code, _, err = run("quantize", model, "-o", tmp_path / "one", *options)
    assert code == 0, err
    one, two = ({**load_quantized(tmp_path / name)[0].state_dict()} for name in ("one", "two"))
    assert one.keys() == two.keys()
    codes = [name for name in one if name.endswith("codes")]
    assert codes
    different = sum(int((one[name] != two[name]).sum()) for name in codes) / sum(one[name].numel() for name in codes)
    # Sums of two processes are in another order.
    assert different < 0.02
    code, _, err = run("quantize", model, "-o", tmp_path / "three", "--shard", *options)
    assert code == 1
    assert "--shard is for method rcp in several processes, got rcp in 1; start it with torchrun" in err


def test_a_directory_of_the_states_name_keeps_what_is_in_it(run, model, text, tmp_path):
    shutil.copytree(model, tmp_path / "tiny.training")
    (tmp_path / "tiny.training" / "notes.txt").write_text("mine")
    before = sorted(path.name for path in (tmp_path / "tiny.training").iterdir())
    out = ["-o", tmp_path / "tiny", "--group-size", 32]
    assert run("quantize", tmp_path / "tiny.training", *out, "--method", "rtn")[0] == 0
    code, _, err = run("quantize", model, *out, "--method", "rcp", "--text", text)
    assert code == 1
    assert "tiny.training must hold a training's state and nothing else, got 'config.json'" in err
    assert sorted(path.name for path in (tmp_path / "tiny.training").iterdir()) == before
    (tmp_path / "file.training").write_text("mine")
    code, _, err = run("quantize", model, "-o", tmp_path / "file", "--method", "rcp", "--text", text)
    assert (code, (tmp_path / "file.training").read_text()) == (1, "mine")
    assert "must be free for the training's state, got a file" in err


def test_a_training_that_stopped_goes_on_with_resume(run, model, text, tmp_path, monkeypatch):
    (tmp_path / "training.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    arguments = ["quantize", model, "--method", "rcp", *common(text), "--recipe", tmp_path / "training.yaml"]
    arguments += ["--threads", 1]
    assert run(*arguments, "-o", tmp_path / "whole")[0] == 0

    command = sys.modules["rcp_kernels.pipeline.steps"]

    def stop(*_):
        raise Diverged("stopped before it was written")

    with monkeypatch.context() as patch:
        patch.setattr(command, "export_student", stop)
        code, _, err = run(*arguments, "-o", tmp_path / "out")
    assert code == 1
    assert "stopped before it was written" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*arguments, "-o", tmp_path / "out")
    assert code == 1
    assert "pass --resume" in err
    other = ["--method", "laquant", "--rotation", "none", "--w-bits", 3, *common(text), "--resume"]
    code, _, err = run("quantize", model, "-o", tmp_path / "out", *other)
    assert code == 1
    assert "got one of rcp; pass --method rcp --resume to go on with it" in err
    code, _, err = run(*arguments, "-o", tmp_path / "out", "--resume")
    assert code == 0, err
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--a-bits", 5], 2, "a_bits must be one of (4, 8, 16), got 5"),
        (["--kv-bits", 3], 2, "kv_bits must be one of (4, 16), got 3"),
        (["--group-size", 48], 2, "group_size must be one of"),
        (["--method", "laquant", "--rotation", "gsr"], 2, "laquant is for weights only"),
        (["--method", "rtn", "--resume"], 1, "--resume is for method rcp"),
        (["--method", "rcp", "--resume"], 1, "--resume needs the state of a training"),
        (["--text", "docstring"], 1, "docstring must be a file, dataset:NAME, or one of ('mixed'"),
        (["--group-size", 128, "--rotation", "gsr"], 1, "group_size must divide hidden_size"),
        (["--text", "dataset:x", "--method", "best"], 2, "method must be one of"),
        (["--method", "rtn", "--samples", 3, "--preset", "full"], 2, "rtn has no use for --preset, --samples"),
        (["--method", "rcp", "--levels", "uniform"], 2, "rcp has no use for --levels"),
        (["--steps", 5], 2, "gptq has no use for --steps"),
    ],
)
def test_bad_options_are_named(run, model, tmp_path, arguments, code, message):
    found, _, err = run("quantize", model, "-o", tmp_path / "out", *arguments)
    assert found == code
    assert message in " ".join(err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_bad_names_and_files_are_named(run, model, text, tmp_path):
    code, _, err = run("quantize", tmp_path / "none.gguf", "-o", tmp_path / "out")
    assert code == 1
    assert "no such file" in err
    (tmp_path / "recipe.yaml").write_text("methode: rtn\n")
    code, _, err = run("quantize", model, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    assert code == 1
    assert "got ['methode']" in err
    code, _, err = run("quantize", "-o", tmp_path / "out")
    assert code == 2
    assert "MODEL is needed" in err
    short = tmp_path / "short.txt"
    short.write_text("one two three")
    code, _, err = run("quantize", model, "-o", tmp_path / "out", "--text", short, "--group-size", 32)
    assert code == 1
    assert "at least one window of 512 tokens is needed" in err
    assert not (tmp_path / "out").exists()
    assert run("quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)[0] == 0
    code, _, err = run("quantize", tmp_path / "out", "-o", tmp_path / "again")
    assert code == 1
    assert "must be a float model, got a quantized one" in err


def test_a_float_model_is_never_the_output(run, model, tmp_path):
    before = sorted(path.name for path in model.iterdir())
    for out in (model, model.parent):
        code, _, err = run("quantize", model, "-o", out, "--method", "rtn", "--group-size", 32)
        assert code == 1
        assert "OUT must not be or hold the model that is read" in err
    other = tmp_path / "other"
    shutil.copytree(model, other)
    code, _, err = run("quantize", model, "-o", other, "--method", "rtn", "--group-size", 32)
    assert code == 1
    assert "must be empty or hold a quantized model" in err
    assert sorted(path.name for path in model.iterdir()) == sorted(path.name for path in other.iterdir()) == before


def test_clips_of_the_training_are_those_of_the_model(run, model, text, tmp_path):
    training = {**TRAINING, "act_clip": 0.75, "kv_clip": 0.5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"training": training}))
    arguments = ["--method", "rcp", "--a-bits", 4, "--kv-bits", 4, "--threads", 1, *common(text)]
    code, _, err = run("quantize", model, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml", *arguments)
    assert code == 0, err
    loaded, config = load_quantized(tmp_path / "out")
    assert (config.act_clip, config.kv_clip) == (0.75, 0.5)
    assert loaded.model.layers[0].mlp.up_proj.act_clip == 0.75


def test_other_quantized_and_incomplete_models_are_not_float_models(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**fields, "quantization_config": {"quant_method": "gptq"}}))
    for arguments in (["quantize", other, "-o", tmp_path / "out"], ["eval", other]):
        code, _, err = run(*arguments)
        assert code == 1
        assert "must be a float model, got a quantized one (quant_method 'gptq')" in err
    (other / "config.json").write_text(json.dumps(fields))
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("eval", other)
    assert code == 1
    assert "must have every weight that config.json asks for, got 1 that break this, ['model.norm.weight']" in err


def test_files_that_do_not_fit_their_config_are_named(run, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    fields = json.loads((other / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 1}, "must have no layer that config.json does not ask for, got 9 that break this"),
        ({"intermediate_size": 96}, "must have weights of the sizes in config.json, got 6 that break this"),
    ):
        (other / "config.json").write_text(json.dumps({**fields, **change}))
        code, _, err = run("quantize", other, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)
        assert code == 1
        assert message in err
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, _, err = run("quantize", other, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)
    assert code == 1
    assert "must be whole safetensors files, got" in err
    (tmp_path / "bad.gguf").write_bytes(b"GGUFxxxx")
    code, _, err = run("quantize", tmp_path / "bad.gguf", "-o", tmp_path / "out")
    assert code == 1
    assert "bad.gguf must be a GGUF file of a language model that transformers knows" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm"])
def test_values_that_are_not_finite_are_named(run, tmp_path, name):
    """No layer that is quantized shows them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    with torch.no_grad():
        model.get_submodule(name).weight.view(-1)[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    arguments = ["--method", "rtn", "--rotation", "none", "--group-size", 32]
    code, _, err = run("quantize", tmp_path / "model", "-o", tmp_path / "out", *arguments)
    assert code == 1
    assert f"quantize: {name}.weight must be finite, got NaN or Inf" in err


def test_an_architecture_that_is_not_known_is_named(run, model, tmp_path):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=12, n_positions=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "gpt2")
    code, _, err = run("quantize", tmp_path / "gpt2", "-o", tmp_path / "out", "--rotation", "gsr", "--method", "rtn")
    assert code == 1
    assert "config.model_type must be one of" in err
    assert "got 'gpt2'" in err


def test_rtn_takes_every_family_of_linear_layers(run, model, text, tmp_path):
    config = transformers.GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vocab_size=12
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "neox")
    assert run("quantize", tmp_path / "neox", "-o", tmp_path / "out", "--method", "rtn")[0] == 0
    code, out, _ = run("eval", tmp_path / "out", "--text", text, "--window", 32, "--tokens", 64)
    assert (code, "perplexity" in out) == (0, True)


def test_a_damaged_config_is_one_line(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "damaged")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "damaged" / "config.json").write_text(json.dumps({**config, "hidden_size": "a"}))
    code, _, err = run("quantize", tmp_path / "damaged", "-o", tmp_path / "out", "--method", "rtn")
    assert code == 1
    assert "config.json of" in err


def test_a_full_disk_is_named(run, model, text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", full)
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
        arguments = ["--method", "rcp", "--recipe", tmp_path / "r.yaml", *common(text)]
        code, _, err = run("quantize", model, "-o", tmp_path / "out", *arguments)
        assert code == 1
        assert "out.training must be on a disk with space for the training's state" in err
        assert "pass --resume" in err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.save, "flush", full)
        code, _, err = run("quantize", model, "-o", tmp_path / "new", "--method", "rtn", "--group-size", 32)
        assert code == 1
        assert "new must be on a disk with space for the model, got [Errno 28]" in err
        assert not (tmp_path / "new").exists()


def test_a_config_is_read_as_json(run, model, text, tmp_path):
    assert run("quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)[0] == 0
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    assert is_quantized(str(tmp_path / "out"))
    code, _, err = run("eval", tmp_path / "out", "--text", text, "--tokens", 32, "--window", 16)
    assert code == 0, err
