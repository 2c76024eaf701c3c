"""What quantize, eval and generate refuse from the command line, and old or damaged inputs."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from test_quantize import common

from rcp_kernels.models.load import group_size_of
from rcp_kernels.pipeline.recipe import Recipe


def test_what_cannot_work_is_refused_before_the_model_is_loaded(run, model, tmp_path):
    for arguments, code, message in (
        (["eval", model, "--json", tmp_path / "none" / "e.json"], 2, "cannot write"),
        (["generate", model, "--prompt", ""], 2, "--prompt needs a text"),
        (["eval", tmp_path / "none"], 1, "must be a model's directory, got no such directory"),
        (["generate", tmp_path / "none", "--prompt", "one"], 1, "must be a model's directory, got no such directory"),
    ):
        found, _, err = run(*arguments)
        assert found == code
        assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": 5}, "model must be of type str, got 5"),
        ({"seed": "a"}, "seed must be of type int, got 'a'"),
        ({"w_bits": 2.0}, r"w_bits must be of type int .*got 2\.0"),
        ({"a_bits": True}, "a_bits must be of type int .*got True"),
        ({"training": None}, r"training must be of type dict\[str, Any\], got None"),
        ({"method": "rtn", "training": {"steps": 1}}, "training must be empty with method rtn"),
        ({"training": {"seed": 1}}, "seed must be said by the recipe's own field"),
        ({"training": {"steps": "3"}}, "steps must be of type int, got '3'"),
        ({"training": {"blocks": 5}}, "blocks must be a table or null, got 5"),
        ({"training": {"act_clip": 1.5}}, r"act_clip must be in \(0, 1\], got 1.5"),
        ({"method": "laquant", "rotation": "none", "training": {"stepz": 1}}, r"got \['stepz'\]"),
    ],
)
def test_a_recipe_of_wrong_types_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"model": "demo", "method": "rcp", **fields})


def test_group_size_is_the_largest_that_divides():
    assert group_size_of(torch.nn.Sequential(torch.nn.Linear(576, 2), torch.nn.Linear(1536, 2)), None) == 64
    assert group_size_of(torch.nn.Sequential(torch.nn.Linear(4096, 2)), None) == 128
    assert group_size_of(torch.nn.Sequential(torch.nn.Linear(4096, 2)), 32) == 32


def test_an_unknown_training_field_is_named():
    with pytest.raises(ValueError, match=r"\['stepz'\]"):
        Recipe("demo", "rcp", training={"stepz": 1})
    with pytest.raises(ValueError, match=r"training\.blocks"):
        Recipe("demo", "rcp", training={"blocks": {"layers": 1}})


def test_an_old_config_without_a_dtype(run, model, tmp_path):
    """The dtype is that of the tensors, and what is written is smaller than what was read."""
    source = tmp_path / "source"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    del fields["dtype"]
    (source / "config.json").write_text(json.dumps(fields))
    code, out, err = run("quantize", source, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "out")]
    assert sizes[1] < sizes[0]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bytes_source"] == sizes[0]
    assert f"read {sizes[0] / 1e3:.1f} kB; " in out
    assert "times smaller" in out


def test_values_that_do_not_fit_the_dtype_are_named_at_once(run, model, text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    code, _, err = run(
        "quantize", source, "-o", tmp_path / "out", "--dtype", "float16", "--rotation", "none", *common(text, "gptq")
    )
    assert code == 1
    assert "values of model.embed_tokens.weight must be at most 65504 to be stored as torch.float16, got 1e+06" in err
    assert "layers" not in err  # no bar of the method has begun


def test_bad_options_of_eval_are_refused_before_the_model_is_loaded(run):
    code, _, err = run("eval", "/nowhere", "--tokens", 100, "--window", 512)
    assert (code, "tokens must be at least window, 512, got 100" in err) == (1, True)
    code, _, err = run("eval", "/nowhere", "--new-tokens", 5)
    assert (code, "--new-tokens needs --divergence-from" in " ".join(err.replace("│", " ").split())) == (2, True)
