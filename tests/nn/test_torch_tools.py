"""torch's own tools on models with QuantLinear: distributed state dicts, functional_call, autocast, torch.load."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.func import functional_call

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, quantize_weight
from rcp_kernels.integrations.importers import ImportedWeight

SIGNS = [1, -1] * 32


class Model(nn.Module):
    """A packed layer of every kind: with and without bias, rotated, with an input order, of uniform groups."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        torch.manual_seed(seed or 0)
        rotation = OnlineRotation(64, 32, "natural", signs=SIGNS)
        uniform = quantize_weight(torch.randn(8, 64), 2, 32)
        uniform = PackedWeight(
            uniform.codes, uniform.levels[..., :1].clamp(max=31), uniform.scales, uniform.tensor_scale, 2, 32, 64, 8,
            "uniform",
        )  # fmt: skip
        self.embedding = nn.Embedding(10, 64)
        self.blocks = nn.Sequential(
            QuantLinear.from_linear(nn.Linear(64, 32), 4, 32, 16),
            nn.LayerNorm(32),
            nn.Sequential(QuantLinear.from_linear(nn.Linear(32, 64, bias=False), 3, 32, 8)),
        )
        self.rotated = QuantLinear.from_linear(nn.Linear(64, 8), 2, 32, 8, input_rotation=rotation)
        self.ordered = QuantLinear.from_packed(
            quantize_weight(torch.randn(8, 64), 2, 32), torch.randn(8), 4, input_order=torch.randperm(64)
        )
        self.uniform = QuantLinear.from_packed(uniform, None, 16)
        if seed is None:  # as a loader makes it, before anything is loaded
            self.blocks[0] = QuantLinear(64, 32, 4, 32, 16)
            self.blocks[2][0] = QuantLinear(32, 64, 3, 32, 8, bias=False)
            self.rotated = QuantLinear(
                64, 8, 2, 32, 8, input_rotation=OnlineRotation(64, 32, "natural", None, [1] * 64)
            )
            self.ordered = QuantLinear(64, 8, 2, 32, 4)
            self.uniform = QuantLinear(64, 8, 2, 32, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.embedding(ids))
        return self.rotated(x) + self.ordered(x) + self.uniform(x)


IDS = torch.arange(10)
OPTIONS = [
    None,
    StateDictOptions(full_state_dict=True),
    StateDictOptions(cpu_offload=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["default", "full", "offload", "full+offload"])
def test_distributed_state_dicts(options: StateDictOptions | None) -> None:
    model = Model(1)
    expected = model.state_dict()
    state = get_model_state_dict(model, options=options)
    assert set(state) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    fresh = Model(None)
    assert not torch.equal(fresh(IDS), model(IDS))
    result = set_model_state_dict(fresh, dict(state), options=options)
    assert result == ([], [])
    assert torch.equal(fresh(IDS), model(IDS))
    assert fresh.uniform.kind == "uniform"


def test_distributed_state_dicts_name_what_is_missing() -> None:
    state = get_model_state_dict(Model(1))
    del state["blocks.2.0.levels"]
    with pytest.raises(RuntimeError, match=r"blocks\.2\.0: PackedWeight: .*missing blocks\.2\.0\.levels"):
        set_model_state_dict(Model(None), dict(state))
    state = get_model_state_dict(Model(1), options=StateDictOptions(ignore_frozen_params=True))
    assert "ordered.bias" not in state  # given as a tensor that takes no gradient
    assert "ordered.codes" in state


def test_stored_tensors_are_attributes() -> None:
    for name, layer in Model(1).named_modules():
        if not isinstance(layer, QuantLinear):
            continue
        for key, tensor in layer.state_dict().items():
            found = layer
            for part in key.split("."):
                found = getattr(found, part)
            assert torch.equal(found, tensor), f"{name}.{key}"
        assert hasattr(layer, "rotation") == (layer.input_rotation is not None)
        for key in (*PackedWeight.KEYS, "rotation"):
            with pytest.raises(AttributeError, match=f"QuantLinear: {key} must not be set.*got Tensor; use load_state"):
                setattr(layer, key, torch.zeros(3))
    with pytest.raises(AttributeError, match="no attribute 'rotation'"):
        _ = Model(1).ordered.rotation
    meta = Model(1).ordered.to("meta")
    assert all(getattr(meta, key).shape == tensor.shape for key, tensor in meta.state_dict().items())


def test_functional_call_refuses_a_packed_weight_by_name() -> None:
    model, other = Model(1), Model(2)
    before, expected = model.state_dict(), model(IDS)
    for state in (
        other.state_dict(),
        {"blocks.0.codes": other.blocks[0].codes},
        {"rotated.rotation": other.rotated.rotation},
        {"uniform.format": other.uniform.format},
        {"ordered.scales": nn.Parameter(other.ordered.scales)},
    ):
        with pytest.raises((AttributeError, KeyError), match=r"codes|rotation|format|scales"):
            functional_call(model, state, (IDS,))
        # Nothing of the given state stays behind.
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(IDS), expected)


def test_functional_call_uses_what_it_can_be_given() -> None:
    model, other = Model(1), Model(2)
    biases = {name: tensor for name, tensor in other.named_parameters() if name.endswith("bias")}
    reference = copy.deepcopy(model)
    reference.load_state_dict(biases, strict=False)
    assert torch.equal(functional_call(model, biases, (IDS,)), reference(IDS))
    everything = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(functional_call(model, everything, (IDS,)), other(IDS))
    layer = model.ordered
    x = torch.randn(3, 64)
    order = torch.randperm(64)
    found = functional_call(layer, {"input_order": order}, (x,))
    expected = QuantLinear.from_packed(layer.packed_weight(), layer.bias, 4, input_order=order)
    assert torch.equal(found, expected(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_a_linear(dtype: torch.dtype, given: torch.dtype) -> None:
    model = Model(1)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    for layer in layers:
        plain = nn.Linear(layer.in_features, layer.out_features)
        x = torch.randn((2, layer.in_features), dtype=given)
        for grad in (False, True):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
                y = layer(x)
                assert y.dtype == plain(x.float()).dtype == dtype
                with torch.autocast("cpu", enabled=False):
                    assert layer(x).dtype == given
            with torch.no_grad():
                assert torch.equal(y, layer(x.to(dtype)))
    with torch.autocast("cpu", dtype=dtype):
        assert model(IDS).dtype == dtype


def test_autocast_goes_through_the_gradient() -> None:
    layer = Model(1).ordered.requires_grad_(True)
    x = torch.randn((2, 64), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().square().sum().backward()
    assert (x.grad.dtype, layer.bias.grad.dtype) == (torch.float32, torch.float32)
    assert bool(x.grad.any())


def test_autocast_leaves_the_rest_alone() -> None:
    layer = Model(1).ordered
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.to("meta")(torch.empty((2, 64), device="meta")).dtype == torch.float32
        layer = Model(1).ordered
        with pytest.raises(ValueError, match=r"must be float32, float16 or bfloat16, got Double"), torch.no_grad():
            layer(torch.randn(2, 64).double())
        with pytest.raises(TypeError, match=r"x must be a tensor \[..., 64\], got NoneType"):
            layer(None)


@pytest.mark.parametrize("kind", ["table", "uniform"])
def test_torch_load_weights_only(kind: str) -> None:
    weight = (Model(1).uniform if kind == "uniform" else Model(1).ordered).packed_weight()
    imported = ImportedWeight(weight, 0.25, torch.randperm(64), torch.randn(8))
    file = io.BytesIO()
    torch.save({"a": weight, "b": [imported]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for found in (loaded["a"], loaded["b"][0].weight):
        assert isinstance(found, PackedWeight)
        assert found.validate().kind == kind
        assert torch.equal(found.dequantize(), weight.dequantize())
    assert torch.equal(loaded["b"][0].bias, imported.bias)
    assert torch.equal(loaded["b"][0].dequantize(), imported.dequantize())
    file.seek(0)
    assert torch.load(file, map_location="meta", weights_only=True)["a"].validate().codes.is_meta
    file = io.BytesIO()
    torch.save(Model(1).state_dict(), file)
    file.seek(0)
    fresh = Model(None)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(IDS), Model(1)(IDS))
