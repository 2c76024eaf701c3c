"""Dry runs of the shipped recipes, and what a dry run says."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
import yaml

from rcp_kernels.pipeline import Recipe, dry_run
from rcp_kernels.pipeline import recipe as recipe_module
from rcp_kernels.pipeline.memory import MemoryCounter
from rcp_kernels.pipeline.recipe import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = {"meta-llama/Llama-2-7b-hf": "llama-2-7b", "Qwen/Qwen3-4B": "qwen3-4b"}

# Device bytes by hand, in 1e9 bytes; docs/memory.md has the sums.
BY_HAND = {
    "llama-2-7b-rcp-w2a4kv4": 85.3,
    "llama-2-7b-gsr-gptq-w2a16": 3.05,
    "llama-2-7b-gsr-gptq-w2a4": 3.05,
    "qwen3-4b-laquant-w3g128": 6.65,
}


def needs(name, **options):
    fields = read_recipe(RECIPES / f"{name}.yaml")
    config = RECIPES / "configs" / CONFIGS[fields["model"]]
    return dry_run(Recipe(**fields | {"model": str(config)}), **options)


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(BY_HAND)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_shipped_recipe_needs_what_a_hand_computation_says(name):
    found = needs(name, device="cuda")
    assert found.device_bytes / 1e9 == pytest.approx(BY_HAND[name], rel=0.1)
    text = (RECIPES.parent / "docs" / "memory.md").read_text()
    assert f"| `{name}` | {found.device_bytes / 1e9:.1f} |" in text


@pytest.mark.parametrize("name", BY_HAND)
def test_the_command_validates_a_recipe_for_another_machine(run, name):
    config = CONFIGS[yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"]]
    arguments = ("--recipe", RECIPES / f"{name}.yaml", "--dry-run", "--device", "cuda")
    code, out, err = run("quantize", RECIPES / "configs" / config, *arguments)
    assert code == 0, err
    assert "cuda GB" in out
    assert "not measured" in out


def test_a_dry_run_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("quantize", RECIPES / "configs" / "llama-3.2-1b", "--dry-run", "--device", "cpu")
    assert code == 0, err
    assert "output directory" in out
    assert not list(tmp_path.iterdir())


def test_a_shard_of_eight_takes_less():
    training = {"activation_checkpointing": True, "batch": 8, "micro_batch": 1}
    recipe = Recipe(str(RECIPES / "configs" / "llama-3.2-1b"), "rcp", training=training)
    one, eight = (dry_run(recipe, device="cuda", processes=n, shard=n > 1) for n in (1, 8))
    assert eight.device_bytes < one.device_bytes / 2
    assert eight.flops < one.flops / 2
    with pytest.raises(ValueError, match="method rcp, got gptq"):
        dry_run(Recipe(recipe.model), processes=2)


def test_checkpointing_and_8_bit_states_take_less():
    config = str(RECIPES / "configs" / "llama-3.2-1b")
    plain, recomputed, small = (
        dry_run(Recipe(config, "rcp", training=training), device="cuda").device_bytes
        for training in (
            {},
            {"activation_checkpointing": True},
            {"activation_checkpointing": True, "optimizer": "adamw8bit"},
        )
    )
    assert small < recomputed < plain


def test_the_counter_forgets_freed_tensors():
    counter = MemoryCounter()
    with counter:
        first = torch.empty(1000, device="meta")
        second = first[10:] + 1
        assert counter.bytes.total() == 4000 + 3960
        del first
        with counter.tagged("later"):
            third = second.to(torch.float64)
        assert counter.bytes == {"temporaries": 3960, "later": 2 * 3960}
        assert float(third.sum()) == 1.0  # nothing can be read back
    assert counter.peaks["later"] == {"temporaries": 3960, "later": 2 * 3960}


def test_the_device_decides_on_bfloat16_and_not_the_cpu_here(monkeypatch):
    config = str(RECIPES / "configs" / "llama-3.2-1b")
    found = dry_run(Recipe(config, "rcp"), device="cuda").device_bytes
    original = recipe_module.fast_bfloat16
    slow_cpu = lambda device=None: device is not None and device.type != "cpu" and original(device)  # noqa: E731
    monkeypatch.setattr(recipe_module, "fast_bfloat16", slow_cpu)
    assert dry_run(Recipe(config, "rcp"), device="cuda").device_bytes == found


@pytest.mark.parametrize("order", [("--dry-run", "--device", "cuda:3"), ("--device", "cuda:3", "--dry-run")])
def test_the_options_may_stand_in_any_order(run, order):
    code, out, err = run("quantize", RECIPES / "configs" / "llama-3.2-1b", *order)
    assert code == 0, err
    assert "cuda GB" in out


@pytest.mark.parametrize(
    ("fields", "options", "found"),
    [
        ({}, {"device": "bogus"}, "bogus"),
        ({}, {"device": "meta"}, "meta"),
        ({"method": "rcp"}, {"shard": True}, "--shard"),
        ({"method": "rcp"}, {"processes": -1}, "-1"),
        ({"method": "rcp"}, {"processes": 3}, "batch"),
        ({"method": "rcp", "training": {"optimizer": "adamw8bit"}}, {"processes": 2, "shard": True}, "adamw8bit"),
        ({"text": "no such file"}, {}, "no such file"),
    ],
)
def test_what_quantize_refuses_a_dry_run_refuses(fields, options, found):
    recipe = Recipe(str(RECIPES / "configs" / "llama-3.2-1b"), **fields)
    with pytest.raises((ValueError, OSError), match=found):
        dry_run(recipe, **{"device": "cuda", **options})


def test_the_number_of_processes_in_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ValueError, match=r"WORLD_SIZE.*abc"):
        dry_run(Recipe(str(RECIPES / "configs" / "llama-3.2-1b"), "rcp"), device="cuda")
