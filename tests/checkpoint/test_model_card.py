"""The README.md of a quantized directory: what it says, and that its code loads the model."""

import re
import shutil

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("safetensors")

from rotated_models import logits, make_model
from transformers import AutoModelForCausalLM

import rcp_kernels.integrations.transformers  # noqa: F401 (registers the method)
from rcp_kernels import quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, check_output, save_quantized
from rcp_kernels.checkpoint.model_card import model_card, write_model_card
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.nn import QuantizedKVCache

RECIPE = "model: meta-llama/Llama-2-7b-hf\nmethod: rtn\nw_bits: 3\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = make_model("llama")
    record = rotate_model(model, "gsr", group_size=32)
    quantize_model(model, 3, 32, 8)
    folder = tmp_path_factory.mktemp("card") / "model"
    config = QuantizationConfig(3, 32, 8, kv_bits=4, kv_clip=0.95, rotation=record)
    save_quantized(model, folder, config, files={"recipe.yaml": RECIPE})
    return model, folder


def metadata(card):
    """The lines between the fences, which the hub reads as YAML."""
    assert card.startswith("---\n")
    return card.split("---\n")[1].splitlines()


def test_a_saved_directory_has_a_card_whose_code_loads_it(saved, monkeypatch):
    model, folder = saved
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    scope = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)
    assert torch.equal(logits(scope["model"]), logits(model))
    assert isinstance(scope["cache"], QuantizedKVCache)
    monkeypatch.undo()
    check_output(folder)  # it is still one that save_quantized may replace


def test_what_the_card_says(saved, tmp_path):
    _, folder = saved
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    card = model_card(tmp_path)
    assert metadata(card) == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "base_model: meta-llama/Llama-2-7b-hf",
        "base_model_relation: quantized",
        "tags:",
        "- rcp-kernels",
        "- 3-bit",
    ]
    assert "# Llama-2-7b-hf, 3 bits a weight\n" in card
    assert "its license holds for this one too" in card
    # 8 levels and a scale: 80 bits for each 32 weights, in rows of whole groups.
    assert "| weights | 3 bits in groups of 32; 5.5 bits a packed weight with levels and scales |" in card
    assert "| activations | 8 bits |" in card
    assert "| keys and values | 4 bits, clipped at 0.95 of the largest |" in card
    assert "| rotation | R1 gsr, R2, R3, R4 |" in card
    assert "| in floating point | lm_head |" in card
    assert f"| weight files | {(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB |" in card
    assert "AutoTokenizer.from_pretrained(name)" in card
    assert f"```yaml\n{RECIPE.strip()}\n```" in card


def test_a_card_of_what_save_pretrained_wrote(saved, tmp_path):
    _, folder = saved
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    write_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert metadata(card)[-2:] == ["- rcp-kernels", "- 3-bit"]
    assert "base_model" not in card
    assert "# llama, 3 bits a weight\n" in card
    assert "How it was made" not in card


def test_a_local_path_is_no_base_model_of_the_hub(saved, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    for name in ("models/mine", "/data/mine", "'demo'"):
        (tmp_path / "recipe.yaml").write_text(f"model: {name}\n")
        card = model_card(tmp_path)
        lines = metadata(card)
        assert ("Base model: `mine`;" in card) == (name != "'demo'")
        assert any("base_model:" in line for line in lines) == (name == "'demo'")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in lines
