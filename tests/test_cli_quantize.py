"""quantize, eval, generate and ablation from the command line, end to end on a tiny model with its own tokenizer."""

import json
import shutil
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

import tokenizers
import transformers
import yaml
from safetensors.torch import load_file, save_file

from rcp_kernels import ablation, cli
from rcp_kernels.checkpoint import load_quantized
from rcp_kernels.commands.recipe import Recipe, read_recipe
from rcp_kernels.commands.sources import group_size_of, is_quantized
from rcp_kernels.methods import corpus
from rcp_kernels.methods.rcp import Diverged

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "[UNK]", "[EOS]"]
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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A transformers directory with a two-layer model of a twelve-word language."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=128,
        eos_token_id=11,
        bos_token_id=11,
        pad_token_id=11,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    digits = torch.randint(10, (700,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(WORDS[i] for i in digits))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command: exit code, standard output, and standard error with the message of SystemExit."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rcp-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (1, out, err + code) if isinstance(code, str) else (code or 0, out, err)

    return command


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
    assert recipe["training"] == TRAINING
    assert (recipe["method"], recipe["a_bits"], recipe["rotation"], recipe["model"]) == ("rcp", 4, "gsr", str(model))
    code, _, err = run("quantize", "--recipe", tmp_path / "one" / "recipe.yaml", "-o", tmp_path / "two", "--threads", 1)
    assert code == 0, err
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "two"))
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["training"]["steps"] == 3
    assert "validation" in (tmp_path / "one" / "curve.csv").read_text()
    assert not (tmp_path / "one.training").exists()


def test_a_training_that_stopped_goes_on_with_resume(run, model, text, tmp_path, monkeypatch):
    (tmp_path / "training.yaml").write_text(yaml.safe_dump({"training": TRAINING}))
    arguments = ["quantize", model, "--method", "rcp", *common(text), "--recipe", tmp_path / "training.yaml"]
    arguments += ["--threads", 1]
    assert run(*arguments, "-o", tmp_path / "whole")[0] == 0

    from rcp_kernels.commands import quantize as command

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
    code, _, err = run(*arguments, "-o", tmp_path / "out", "--resume")
    assert code == 0, err
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--a-bits", 5], 2, "a_bits must be one of (4, 8, 16), got 5"),
        (["--kv-bits", 3], 2, "kv_bits must be one of (4, 16), got 3"),
        (["--group-size", 48], 2, "group_size must be one of"),
        (["--method", "laquant", "--rotation", "gsr"], 2, "laquant is for weights only"),
        (["--method", "rtn", "--levels", "clip"], 2, "levels of rtn must be"),
        (["--method", "rtn", "--resume"], 1, "--resume is for method rcp"),
        (["--group-size", 128], 1, "group_size must divide hidden_size"),
        (["--text", "dataset:x", "--method", "best"], 2, "is not one of"),
        (["--method", "rtn", "--samples", 3, "--preset", "full"], 2, "rtn has no use for --preset, --samples"),
        (["--method", "rcp", "--levels", "uniform"], 2, "rcp has no use for --levels"),
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
    assert "at least 1 windows of 512 tokens are needed" in err
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
    assert "must have every weight, got 1 missing, ['model.norm.weight']" in err


def test_a_config_is_read_as_json(run, model, text, tmp_path):
    assert run("quantize", model, "-o", tmp_path / "out", "--method", "rtn", "--group-size", 32)[0] == 0
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")))
    assert is_quantized(str(tmp_path / "out"))
    code, _, err = run("eval", tmp_path / "out", "--text", text, "--tokens", 32, "--window", 16)
    assert code == 0, err


def test_what_cannot_work_is_refused_before_the_model_is_loaded(run, model, tmp_path):
    for arguments, code, message in (
        (["eval", model, "--json", tmp_path / "none" / "e.json"], 2, "--json needs a directory that exists"),
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
        ({"w_bits": 2.0}, "w_bits must be of type int, got 2.0"),
        ({"a_bits": True}, "a_bits must be of type int, got True"),
        ({"training": None}, r"training must be of type dict\[str, Any\], got None"),
        ({"method": "rtn", "training": {"steps": 1}}, "training must be empty with method rtn"),
        ({"training": {"seed": 1}}, "seed must be said by the recipe's own field"),
        ({"training": {"steps": "3"}}, "steps must be of type int, got '3'"),
        ({"training": {"blocks": 5}}, "blocks must be a table or null, got 5"),
        ({"training": {"act_clip": 1.5}}, r"training\.act_clip must be in \(0, 1\], got 1.5"),
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
        Recipe("demo", "rcp", training={"stepz": 1}).training_config(64)
    with pytest.raises(ValueError, match=r"training\.blocks"):
        Recipe("demo", "rcp", training={"blocks": {"layers": 1}}).training_config(64)


def test_the_ablation_measures_each_cell_once(model, text, tmp_path, monkeypatch):
    words = text.read_text()
    monkeypatch.setattr(ablation, "WINDOW", 16)
    monkeypatch.setattr(ablation, "CALIBRATION", 2)
    monkeypatch.setattr(ablation, "held_out_text", lambda *_: (words, "numbers"))
    monkeypatch.setattr(corpus, "docstring_corpus", lambda *_: corpus.Corpus(words * 20, 1, 0, "0"))
    lines = []
    arguments = {"model": str(model), "steps": 1, "tokens": 64, "log": lines.append}
    for only in ("FP", "W2A16_gptq_gsr", "W2A4_rtn", "rcp_plus_partition"):
        ablation.run(tmp_path / "cells", only=only, **arguments)
    found = ablation.read(tmp_path / "cells")
    assert len(found) == 8
    assert {row["tokens"] for row in found.values()} == {64}
    assert min(row["perplexity"] for row in found.values()) > 1
    # The same columns in each group, and the same activations in another order (docs/rotate.md): up to float sums.
    same = [found["W2A4", "rtn", name]["perplexity"] for name in ("gsr", "local_hadamard")]
    assert same[0] == pytest.approx(same[1], rel=1e-2)
    before = len(lines)
    ablation.run(tmp_path / "cells", only="FP", **arguments)
    assert len(lines) == before
    with pytest.raises(ValueError, match="must be measured on 32 tokens as this run is, got 64"):
        ablation.run(tmp_path / "cells", only="FP", **{**arguments, "tokens": 32})
    text_ = ablation.table(tmp_path / "cells")
    assert "GSR equals LH under RTN" in text_
    ablation.write(tmp_path / "cells", tmp_path / "results")
    assert len((tmp_path / "results" / "ablation.csv").read_text().splitlines()) == 9
    assert (tmp_path / "results" / "ablation.png").stat().st_size > 1000


def test_claims_are_checked_on_numbers():
    def rows(*values):
        order = ablation.CLAIMS[0][1]
        return {("W2A16", "gptq", name): {"perplexity": value} for name, value in zip(order, values, strict=True)}

    assert "under GPTQ (GSR, table 1): holds" in ablation.checks(rows(1.0, 2.0, 2.0, 3.0))[0]
    assert "does not hold" in ablation.checks(rows(2.0, 1.0, 2.0, 3.0))[0]
    assert ablation.checks({}) == []
