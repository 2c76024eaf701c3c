"""Recipes: the choices that follow from the method and the model."""

import dataclasses

import pytest
import torch
from language_of_numbers import write_model, write_text

transformers = pytest.importorskip("transformers")

from rcp_kernels.checkpoint import load_quantized  # noqa: E402
from rcp_kernels.methods.rotate import rotation_of  # noqa: E402
from rcp_kernels.pipeline import Recipe, evaluate, quantize  # noqa: E402
from rcp_kernels.pipeline import recipe as recipes  # noqa: E402
from rcp_kernels.pipeline.steps import rotate  # noqa: E402


@pytest.fixture(scope="module")
def linear():
    return torch.nn.Sequential(torch.nn.Linear(192, 64))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"w_bits": 4, "rotation": "none", "levels": "kmeans", "group_size": 64, "sequence": 512}),
        ({"method": "rtn"}, {"w_bits": 4, "rotation": "none", "levels": "kmeans"}),
        ({"w_bits": 3}, {"rotation": "none", "levels": "kmeans"}),
        ({"a_bits": 4}, {"w_bits": 4, "rotation": "gsr", "levels": "kmeans"}),
        ({"a_bits": 4, "rotation": "none"}, {"rotation": "none"}),
        ({"method": "rcp"}, {"w_bits": 2, "a_bits": 4, "kv_bits": 4, "rotation": "gsr", "text": "mixed"}),
        ({"method": "laquant"}, {"w_bits": 3, "rotation": "none", "text": None}),
    ],
)
def test_defaults_follow_the_method(linear, monkeypatch, fields, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    resolved = Recipe("demo", **fields).resolve(linear)
    assert {name: getattr(resolved, name) for name in expected} == expected
    assert dataclasses.asdict(resolved.resolve(linear)) == dataclasses.asdict(resolved)
    # A recipe file holds all of it.
    assert dataclasses.asdict(Recipe(**dataclasses.asdict(resolved)).resolve(linear)) == dataclasses.asdict(resolved)


def test_a_resolved_recipe_says_its_choices(linear):
    text = str(Recipe("demo", "rtn", kv_bits=4).resolve(linear))
    assert text == (
        "method rtn, 4-bit weights in groups of 64, kmeans levels, 16-bit activations, 4-bit keys and values, "
        "no rotation"
    )


@pytest.mark.parametrize(("method", "field", "slow"), [("rcp", "bf16", False), ("laquant", "dtype", "float32")])
def test_a_training_computes_in_float32_where_bfloat16_is_slow(linear, monkeypatch, method, field, slow):
    """By the device's capability; the recipe's own word counts more, and a resolved recipe keeps the choice."""
    asked = []

    def fast(device):
        asked.append(device)
        return device is not None

    monkeypatch.setattr(recipes, "fast_bfloat16", fast)
    there = Recipe("demo", method).resolve(linear, torch.device("cuda"))
    assert there.training[field] != slow
    assert "float32" not in str(there)
    here = Recipe("demo", method).resolve(linear)
    assert here.training[field] == slow
    assert str(here).endswith(", training in float32")
    assert asked == [torch.device("cuda"), None]
    assert there.resolve(linear).training == there.training
    assert here.resolve(linear, torch.device("cuda")).training == here.training


def test_r4_mixes_blocks_where_intermediate_size_has_no_hadamard_matrix():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=32 * 23, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        rotate(model, Recipe("x", rotation="walsh", group_size=32).resolve(model))
        torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-3)
    assert rotation_of(model).r4_group_size == 32


def test_the_pipeline_is_a_function(tmp_path):
    model = write_model(tmp_path / "model")
    phases = []
    recipe = Recipe(str(model), text=str(write_text(tmp_path / "text")), sequence=16, samples=4, group_size=32)
    summary = quantize(recipe, tmp_path / "out", progress=lambda *row: phases.append(row))
    assert summary.out == tmp_path / "out"
    assert "14 layers packed" in str(summary)
    assert load_quantized(tmp_path / "out")[1].bits == 4
    assert [row[0] for row in phases][:3] == ["reading the model", "reading the model", "recipe"]
    assert phases[-1][:3] == ("layers", 14, 14)


def test_a_text_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for text, error, message in (
        (tmp_path / "none.txt", OSError, "none.txt"),
        (tmp_path / "empty.txt", ValueError, "empty.txt must hold text"),
    ):
        with pytest.raises(error, match=message):
            quantize(Recipe("/no/such/model", text=str(text)), tmp_path / "out")
        with pytest.raises(error, match=message):
            evaluate("/no/such/model", text)
