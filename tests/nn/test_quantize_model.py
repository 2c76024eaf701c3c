"""quantize_model: what is swapped, what is kept, the report, and models it refuses."""

import pytest
import torch
from torch import nn

from rcp_kernels import OnlineRotation, QuantLinear, quantize_model, quantize_weight
from rcp_kernels.nn import RotatedLinear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int = 64, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_swaps_all_but_the_head() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    ids = torch.arange(8)[None]
    before = model(ids).detach()
    expected = quantize_weight(model.layers[1].down.weight, 4, 32)
    steps: list[tuple[int, int, str]] = []
    report = quantize_model(
        model, bits=4, group_size=32, act_bits=8, progress=lambda *step: steps.append(step), act_clip=0.95
    )
    names = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert [layer.name for layer in report.layers] == names
    assert steps == [(i + 1, 4, name) for i, name in enumerate(names)]
    assert report.kept == ["lm_head"]
    assert model.lm_head.weight is model.embed.weight
    down = model.layers[1].down
    assert isinstance(down, QuantLinear)
    assert (down.bits, down.group_size, down.act_bits, down.act_clip, down.training) == (4, 32, 8, 0.95, False)
    assert torch.equal(down.dequantize(), expected.dequantize())
    after = model(ids).detach()
    assert float((after - before).norm() / before.norm()) < 0.1


def test_report_adds_up() -> None:
    model = Model().to(torch.bfloat16)
    report = quantize_model(model, bits=2, group_size=64)
    weights = 4 * 64 * 128
    assert report.weights == weights
    assert report.bytes_before == 2 * weights
    packed = [model.get_submodule(layer.name).packed_weight() for layer in report.layers]
    assert [layer.bytes_after for layer in report.layers] == [weight.nbytes for weight in packed]
    assert report.bytes_after == sum(weight.nbytes for weight in packed)
    assert report.bits_per_weight == pytest.approx(2 + 32 / 64 + 16 / 64 + 4 * 32 / weights)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "out",
        "x",
        "in",
        "bits",
        "group",
        "bits/weight",
        "MB",
        "before",
        "MB",
        "after",
    ]
    assert lines[2].split() == ["layers.0.up", "128", "x", "64", "2", "64", "2.754", "0.02", "0.00"]
    end = lines.index("kept in floating point: lm_head")
    assert lines[end - 1].split() == ["4", "layers", "2.754", "0.07", "0.01"]
    assert len({len(line) for line in lines[:end]}) == 1
    assert lines[end + 1] == "4 layers packed, 2.754 bits a weight"
    # The rest of the model, a shared parameter once.
    left = {part.name: part for part in report.storage.parts}
    assert sum(part.weights for part in left.values()) == sum(p.numel() for p in model.parameters())
    assert left["embed.weight"].kind == "embedding"
    assert report.storage.packed_bytes == report.bytes_after
    assert report.storage.float_share == pytest.approx(
        report.storage.float_weights / (report.storage.float_weights + weights)
    )


class Experts(nn.Module):
    """The experts of a mixture in one parameter, as transformers 5 keeps them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 128))


def test_report_names_what_is_no_linear_layer():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), Experts(), nn.Embedding(10, 64))
    report = quantize_model(model, bits=2, group_size=64)
    kinds = {part.name: (part.kind, part.weights) for part in report.storage.parts}
    assert kinds == {"1.gate_up_proj": ("not an nn.Linear", 4 * 64 * 128), "2.weight": ("embedding", 640)}
    text = str(report)
    assert "1.gate_up_proj".replace("1", "*") in text
    assert "not an nn.Linear" in text
    assert f"{(4 * 64 * 128 + 640) / (4 * 64 * 128 + 640 + 64 * 64):.1%} of the weights" in text


def test_report_counts_a_shared_parameter_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 64), "up": nn.Linear(64, 64), "lm_head": nn.Linear(64, 10, False)})
    model["lm_head"].weight = model["embed"].weight
    report = quantize_model(model, bits=4, group_size=64)
    assert [part.name for part in report.storage.parts] == ["embed.weight", "up.bias"]


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ((), []),
        (["up"], ["layers.0.up", "layers.1.up"]),
        (("layers.1.down", "lm_head"), ["layers.1.down", "lm_head"]),
        ({"layers.0"}, ["layers.0.up", "layers.0.down"]),
        (("1", "lm_head"), ["layers.1.up", "layers.1.down", "lm_head"]),
    ],
)
def test_skip(skip, kept: list[str]) -> None:
    model = Model()
    report = quantize_model(model, group_size=64, skip=skip)
    assert report.kept == kept
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert linears == kept


def test_default_skip_needs_no_head() -> None:
    model = nn.Sequential(nn.Linear(64, 32))
    assert len(quantize_model(model, group_size=64).layers) == 1


def test_shared_module_is_swapped_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": nn.Linear(64, 64)})
    report = quantize_model(model, group_size=64)
    assert [layer.name for layer in report.layers] == ["a", "c"]
    assert isinstance(model["a"], QuantLinear)
    assert model["b"][0] is model["a"]
    # Kept under one name is kept under all.
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(64, 64)})
    assert quantize_model(model, group_size=64, skip=("b",)).kept == ["a", "b"]
    assert model["a"] is shared


def test_rotated_linear_hands_its_rotation_on() -> None:
    torch.manual_seed(0)
    linear, rotation = nn.Linear(96, 40), OnlineRotation(96, 32)
    model = nn.Sequential(RotatedLinear.from_linear(linear, rotation))
    expected = quantize_weight(linear.weight, 4, 32)
    assert quantize_model(model, bits=4, group_size=32, act_bits=16).kept == []
    assert isinstance(model[0], QuantLinear)
    assert model[0].input_rotation is rotation
    assert torch.equal(model[0].dequantize(), expected.dequantize())


def test_subclasses_are_kept() -> None:
    # nn.MultiheadAttention reads out_proj.weight itself; its out_proj is a subclass for that reason.
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "up": nn.Linear(64, 64)})
    report = quantize_model(model, group_size=64)
    assert report.kept == ["attention.out_proj"]
    model["attention"](*[torch.randn(3, 1, 64)] * 3)


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers_of_torch_are_kept(kind: type[nn.Module]) -> None:
    layer = kind(64, 4, 128, batch_first=True)
    model = nn.ModuleDict({"layer": layer, "up": nn.Linear(64, 64)}).eval()
    x = torch.randn((2, 5, 64))
    inputs = (x,) if kind is nn.TransformerEncoderLayer else (x, x)
    with torch.no_grad():
        before = layer(*inputs)
        report = quantize_model(model, group_size=64)
        assert torch.equal(layer(*inputs), before)
    assert [each.name for each in report.layers] == ["up"]
    assert {"layer.linear1", "layer.linear2", "layer.self_attn.out_proj"} <= set(report.kept)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_do_more_than_multiply_are_kept() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("plain", "after", "before", "back", "own")})
    model["after"].register_forward_hook(lambda module, inputs, output: output + 1)
    model["before"].register_forward_pre_hook(lambda module, inputs: None)
    model["back"].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model["own"].forward = lambda x: x
    model["old_norm"] = nn.utils.weight_norm(nn.Linear(64, 64))
    model["new_norm"] = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    report = quantize_model(model, group_size=64)
    assert [layer.name for layer in report.layers] == ["plain"]
    assert report.kept == ["after", "before", "back", "own", "old_norm", "new_norm"]


def test_float64_model() -> None:
    model = nn.Sequential(nn.Linear(64, 48)).double()
    quantize_model(model, group_size=64)
    assert model(torch.randn(2, 64)).dtype == torch.float32


def test_state_dict_of_a_swapped_model_loads_into_another() -> None:
    torch.manual_seed(0)
    model, fresh = Model(), Model()
    for each in (model, fresh):
        quantize_model(each, bits=3, group_size=32)
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), fresh(ids))


def test_refuses() -> None:
    model = Model()
    with pytest.raises(TypeError, match=r"skip must be a collection of names, got the string 'lm_head'; pass"):
        quantize_model(model, skip="lm_head")
    with pytest.raises(ValueError, match=r"every entry of skip.*got \['q_proj'\] without a match; look at"):
        quantize_model(model, skip=("q_proj", "lm_head"))
    with pytest.raises(TypeError, match=r"skip must be a collection of names, got None; pass \(\)"):
        quantize_model(model, skip=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict; for a tensor"):
        quantize_model({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an nn.Linear to replace, got a Conv1d with none; pass the module"):
        quantize_model(nn.Conv1d(4, 4, 3))
    with pytest.raises(ValueError, match=r"with none, but 1 QuantLinear: it is quantized already; start from"):
        quantize_model(nn.Sequential(QuantLinear(64, 32)))
    with pytest.raises(
        ValueError, match=r"with 5 linear layers, all of them to be kept \(layers.0.up, for one\).*check"
    ):
        quantize_model(model, skip=("layers", "lm_head"))
    with pytest.raises(ValueError, match=r"cannot be replaced in place; use QuantLinear.from_linear"):
        quantize_model(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"layer layers.0.up: group_size must be one of"):
        quantize_model(model, group_size=48)
    with pytest.raises(ValueError, match=r"layer layers.0.up: QuantLinear: act_bits must be"):
        quantize_model(model, group_size=32, act_bits=5)


def test_error_leaves_the_model_as_it_was() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].up.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"layer layers.1.up: .*finite in float32, got nan at row, column \[3, 5\]"):
        quantize_model(model, group_size=64)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
