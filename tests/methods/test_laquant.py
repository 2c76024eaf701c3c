"""LAQuant on tiny random models: the loop, the loss it minimises, what it exports, and that it can be interrupted."""

import copy
import resource
import tempfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rcp_kernels import QuantLinear
from rcp_kernels.methods.laquant import LaquantConfig, laquant_quantize_model
from rcp_kernels.methods.layers import Diverged, first_layer_inputs, run_layer
from rcp_kernels.methods.uniform import UniformQuantizer

transformers = pytest.importorskip("transformers")

CONFIG = LaquantConfig(bits=3, group_size=32, epochs=3, batch_size=2, lr_weights=1e-3, lr_quantizer=1e-3)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,  # as large as trained weights; with 0.02 the layers change almost nothing
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(1))


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(getattr(first[name], tensor), getattr(second[name], tensor))
        for name in first
        for tensor in first[name].TENSORS
    )


def packed_levels(packed) -> torch.Tensor:
    """int64 [N, groups, 2**bits], also for a weight that stores only the first level."""
    return packed.as_table().levels.to(torch.int64)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_training_lowers_every_layers_loss_and_the_result_is_what_was_trained(model, ids, lookahead):
    reference, seen = copy.deepcopy(model), []
    config = LaquantConfig(**{**vars(CONFIG), "lookahead": lookahead})
    result = laquant_quantize_model(model, ids, config, progress=lambda *step: seen.append(step))
    assert [entry["layer"] for entry in result.losses] == [0, 1, 2]
    assert all(entry["after"] < entry["before"] for entry in result.losses)
    assert len(seen) == 3 * 3 * 3  # layers, epochs, batches of 5 sequences by 2
    assert seen[-1][:2] == (2, 9)
    assert len(result.weights) == 3 * 7
    steps = torch.cat([packed_levels(packed).diff(dim=-1).flatten() for packed in result.weights.values()])
    assert steps.unique().tolist() == [16]  # evenly spaced in int8: no table is needed
    for name, packed in result.weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        assert layer.act_bits == 16
        torch.testing.assert_close(layer.dequantize(), packed.dequantize(), rtol=0, atol=0)
        assert not torch.equal(packed.dequantize(), reference.get_submodule(name).weight)

    # Recompute the losses of all layers: earlier layers are quantized, later layers are not.
    hybrid = copy.deepcopy(reference)
    for name, packed in result.weights.items():
        hybrid.get_submodule(name).weight.data = packed.dequantize()
    hidden, keywords = first_layer_inputs(reference, ids)
    with torch.no_grad():
        exact = quantized = hidden
        for index in range(3):
            exact = run_layer(reference.model.layers[index], exact, keywords[index])
            quantized = run_layer(hybrid.model.layers[index], quantized, keywords[index])
            ahead = index + 1 if lookahead and index < 2 else None
            pair = [quantized, exact]
            if ahead is not None:
                pair = [run_layer(reference.model.layers[ahead], stream, keywords[ahead]) for stream in pair]
            assert F.smooth_l1_loss(*pair).item() == pytest.approx(result.losses[index]["after"], rel=1e-4)


def test_lookahead_wins_behind_the_next_layer(model, ids):
    """Compares both losses, trained with the same budget, by the next layer's output, which lookahead minimizes."""
    reference, after = copy.deepcopy(model), {}
    hidden, keywords = first_layer_inputs(reference, ids)
    for lookahead in (0, 1):
        config = LaquantConfig(**{**vars(CONFIG), "lookahead": lookahead, "epochs": 10})
        trained = copy.deepcopy(reference)
        result = laquant_quantize_model(trained, ids, config)
        hybrid = copy.deepcopy(reference)
        for name, packed in result.weights.items():
            if name.startswith("model.layers.0."):
                hybrid.get_submodule(name).weight.data = packed.dequantize()
        with torch.no_grad():
            outs = []
            for one in (hybrid, reference):
                out = run_layer(one.model.layers[0], hidden, keywords[0])
                outs.append(run_layer(reference.model.layers[1], out, keywords[1]))
        after[lookahead] = F.smooth_l1_loss(*outs).item()
    assert after[1] < after[0]


def test_runs_repeat_and_resume_to_the_bit(model, ids, tmp_path):
    whole = laquant_quantize_model(copy.deepcopy(model), ids, CONFIG).weights
    assert same(whole, laquant_quantize_model(copy.deepcopy(model), ids, CONFIG).weights)

    class Killed(Exception):
        pass

    def kill(layer: int, step: int, loss: float) -> None:
        if (layer, step) == (1, 4):
            raise Killed

    with pytest.raises(Killed):
        laquant_quantize_model(copy.deepcopy(model), ids, CONFIG, directory=tmp_path, progress=kill)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer_000.safetensors", "run.json"]
    seen = []
    resumed = laquant_quantize_model(
        copy.deepcopy(model), ids, CONFIG, directory=tmp_path, progress=lambda *step: seen.append(step)
    )
    assert seen[0][:2] == (1, 1)
    assert same(whole, resumed.weights)
    assert [entry["layer"] for entry in resumed.losses] == [0, 1, 2]


def test_streams_in_a_file_give_the_same_bits(model, ids):
    in_memory = laquant_quantize_model(copy.deepcopy(model), ids, CONFIG).weights
    in_file = laquant_quantize_model(copy.deepcopy(model), ids, CONFIG, memory_budget=0.0).weights
    assert same(in_memory, in_file)


def test_streams_that_do_not_fit_on_the_disk_are_an_error(model, ids, tmp_path, monkeypatch):
    """Without the check, the first write into a mapped file would be a bus error."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            laquant_quantize_model(model, ids, CONFIG, memory_budget=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "rule"),
    [("run.json", "must be the record of a run"), ("layer_000.safetensors", "must be a complete safetensors file")],
)
def test_a_damaged_state_is_named(model, ids, tmp_path, name, rule):
    laquant_quantize_model(copy.deepcopy(model), ids, CONFIG, directory=tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{name} {rule}, got .*delete"):
        laquant_quantize_model(copy.deepcopy(model), ids, CONFIG, directory=tmp_path)


def test_bfloat16_training_stays_close(model, ids):
    config = LaquantConfig(**{**vars(CONFIG), "dtype": "bfloat16"})
    result = laquant_quantize_model(model, ids, config)
    assert all(entry["after"] < entry["before"] for entry in result.losses)


def test_the_model_keeps_what_is_not_quantized(model, ids):
    reference = copy.deepcopy(model)
    model.train()
    laquant_quantize_model(model, ids, CONFIG)
    assert model.training
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=0)
        assert parameter.requires_grad
        assert parameter.grad is None


def test_another_run_in_the_directory_is_refused(model, ids, tmp_path):
    laquant_quantize_model(copy.deepcopy(model), ids, CONFIG, directory=tmp_path)
    with pytest.raises(ValueError, match=r"another lookahead in .*run\.json; pass an empty directory"):
        laquant_quantize_model(
            copy.deepcopy(model), ids, LaquantConfig(**{**vars(CONFIG), "lookahead": 0}), directory=tmp_path
        )
    with pytest.raises(ValueError, match="another calibration in"):
        laquant_quantize_model(copy.deepcopy(model), ids.flip(0), CONFIG, directory=tmp_path)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="another model in"):
        laquant_quantize_model(model, ids, CONFIG, directory=tmp_path)


def test_a_loss_that_is_not_finite_names_the_layer(model, ids, tmp_path):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("nan"))
    with pytest.raises(Diverged, match=r"loss of model\.layers\.0 must be finite, got nan at step 0"):
        laquant_quantize_model(model, ids, CONFIG, directory=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lookahead": 2}, r"lookahead must be one of \(0, 1\), got 2"),
        ({"epochs": 0}, "epochs must be an int of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        ({"dtype": "float16"}, "dtype must be one of .*'float32', 'bfloat16'.*, got 'float16'"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LaquantConfig(**change)


def test_bad_calibration_is_refused(model):
    with pytest.raises(ValueError, match="shorter than one sequence"):
        laquant_quantize_model(model, torch.zeros(1, 1, dtype=torch.int64), CONFIG)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 97\), the model's vocabulary, got 97"):
        laquant_quantize_model(model, torch.tensor([[1, 97]]), CONFIG)


def test_the_start_weighs_each_input_by_its_size(model, ids, monkeypatch):
    """Compares the sums of squares that the clip search gets with hooks on the float model."""
    seen: list[torch.Tensor] = []
    expected: dict[str, torch.Tensor] = {}
    real = UniformQuantizer.init_clip_search

    def keep(self, weight, importance):
        seen.append(importance)
        real(self, weight, importance)

    first = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers.0." in name]
    for name in first:

        def hook(module, args, name=name):
            expected[name] = expected.get(name, 0) + args[0].detach().double().square().sum((0, 1))

        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(ids)
    for name in first:
        model.get_submodule(name)._forward_pre_hooks.clear()
    monkeypatch.setattr(UniformQuantizer, "init_clip_search", keep)
    laquant_quantize_model(model, ids, LaquantConfig(**{**vars(CONFIG), "epochs": 1}))
    for name, importance in zip(first, seen[:7], strict=True):
        torch.testing.assert_close(importance.double(), expected[name], rtol=1e-4, atol=1e-6)
