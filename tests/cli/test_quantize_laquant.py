"""From the command line: laquant interrupted and gone on with, its own text, and where greedy decoding diverges."""

import csv
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import yaml
from language_of_numbers import write_model

from rcp_kernels.checkpoint import load_quantized
from rcp_kernels.data import by_name as sources
from rcp_kernels.data import corpus
from rcp_kernels.data import reasoning as reasoning_text
from rcp_kernels.data.reasoning import reasoning_questions
from rcp_kernels.methods.laquant import quantize_model as laquant
from rcp_kernels.methods.laquant.layer_losses import losses_csv, losses_png
from rcp_kernels.methods.rcp import Diverged
from rcp_kernels.models.load import load_float


@pytest.fixture
def arguments(model, text, tmp_path):
    recipe = {
        "model": str(model),
        "method": "laquant",
        "rotation": "none",
        "w_bits": 3,
        "group_size": 32,
        "text": str(text),
        "sequence": 16,
        "samples": 4,
        "training": {"epochs": 1, "batch_size": 2, "lr_weights": 1e-2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["quantize", "--recipe", tmp_path / "recipe.yaml", "--threads", 1]


def logits(folder):
    with torch.no_grad():
        return load_quantized(folder)[0](torch.arange(10).view(1, 10)).logits


def test_a_run_that_stopped_goes_on_after_its_last_layer(run, arguments, tmp_path, monkeypatch):
    code, _, err = run(*arguments, "-o", tmp_path / "whole")
    assert code == 0, err
    trained = []
    real = laquant._LayerTraining.run

    def stops(training, progress):
        if training.index == 1 and len(trained) == 1:
            raise Diverged("stopped in layer 1")
        trained.append(training.index)
        return real(training, progress)

    monkeypatch.setattr(laquant._LayerTraining, "run", stops)
    code, _, err = run(*arguments, "-o", tmp_path / "out")
    assert code == 1
    assert "stopped in layer 1" in err
    assert not (tmp_path / "out").exists()
    code, _, err = run(*arguments, "-o", tmp_path / "out")
    assert code == 1
    assert "pass --resume to go on with it" in err
    trained.append("resumed")
    code, _, err = run(*arguments, "-o", tmp_path / "out", "--resume")
    assert code == 0, err
    assert trained == [0, "resumed", 1]
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "whole"))
    assert not (tmp_path / "out.training").exists()

    losses = json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    rows = list(csv.DictReader((tmp_path / "out" / "curve.csv").read_text().splitlines()))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == losses
    assert [entry["layer"] for entry in losses] == [0, 1]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(*arguments, "-o", tmp_path / "out")  # its own files do not forbid a replacement
    assert code == 0, err


def test_eval_says_where_greedy_decoding_diverges(run, arguments, model, text, tmp_path):
    code, _, err = run(*arguments, "-o", tmp_path / "out", "--w-bits", 2)
    assert code == 0, err
    measure = ["--text", text, "--tokens", 640, "--window", 16, "--divergence-from", model, "--new-tokens", 12]
    code, said, err = run("eval", tmp_path / "out", *measure, "--json", tmp_path / "e.json")
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())["divergence"]
    assert len(found["positions"]) == 16
    assert found["mean"] == sum(found["positions"]) / 16 < 12
    assert (found["prompt_tokens"], found["new_tokens"], found["reference"]) == (40, 12, str(model))
    assert f"leaves {model} after {found['mean']:.1f} tokens on average, {found['median']:g} in the median" in said
    code, said, _ = run("eval", model, *measure)
    assert code == 0
    assert "after 12.0 tokens on average, 12 in the median, of 12 (16 prompts of 40 tokens); 100.0%" in said

    # Another tokenizer: the same words are other tokens there.
    other = write_model(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["one"], words["two"] = words["two"], words["one"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    code, _, err = run("eval", tmp_path / "out", *measure, "--divergence-from", other)
    assert code == 1
    assert "must tokenize the text as the one that is measured" in err


def test_reasoning_text_is_written_by_the_model(run, arguments, model, tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_CACHE_DIR", str(tmp_path / "cache"))
    code, _, err = run(*arguments, "-o", tmp_path / "out", "--text", "reasoning")
    assert code == 1
    assert "the tokenizer must have a chat template" in err
    loaded, tokenizer = load_float(str(model))
    tokenizer.chat_template = "{{ messages[0]['content'] }} one two"
    words, facts = sources.training_text("reasoning", 2000, model=loaded, tokenizer=tokenizer)
    assert facts["text"] == "reasoning"
    assert facts["reasoning"]["tokens"] > 0
    assert "one two" in words
    assert sources.training_text("reasoning", 2000, model=loaded, tokenizer=tokenizer)[0] == words


def test_reasoning_questions_are_all_different_and_the_same_each_time():
    questions = reasoning_questions(400)
    assert len(set(questions)) == 400
    assert questions[:50] == reasoning_questions(50)
    assert questions != reasoning_questions(400, seed=1)
    assert sum("Python" in question for question in questions) == 50
    assert reasoning_questions(0) == []
    assert len(set(reasoning_questions(5000))) == 5000  # more than the sequences, the smallest kind, give an eighth of


def test_more_questions_than_there_are_is_an_error_and_not_an_endless_loop(monkeypatch):
    monkeypatch.setattr(reasoning_text, "_TEMPLATES", (reasoning_text._sequence,))
    with pytest.raises(ValueError, match="got 5000 where the last 1000 draws repeated"):
        reasoning_questions(5000)


def test_the_repeated_lines_of_answers_stay():
    answer = "Let us go step by step.\n\n" + "First we add the numbers, then we divide. " * 6
    other = "Let us go step by step.\n\n" + "At first we multiply what was given here. " * 6
    assert corpus.without_overlap([answer, other], keep_repeated=True).documents == (answer, other)
    assert not corpus.without_overlap([answer, other]).documents[1].startswith("Let us")


def test_losses_as_table_and_plot():
    losses = [{"layer": 0, "before": 0.5, "after": 0.25}, {"layer": 1, "before": 0.75, "after": 0.5}]
    assert losses_csv(losses) == "layer,before,after\n0,0.5,0.25\n1,0.75,0.5\n"
    assert losses_png({"one": losses, "two": losses}).startswith(b"\x89PNG")
