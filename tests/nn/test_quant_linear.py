"""QuantLinear: construction, forward, gradients, every way of storing and moving it, bad input."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rcp_kernels import PackedWeight, QuantLinear, ops, quantize_weight

KEYS = ["bias", "codes", "format", "levels", "scales", "tensor_scale"]


def make_layer(in_features: int = 200, out_features: int = 24, bits: int = 2, **kwargs: object) -> QuantLinear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features)
    return QuantLinear.from_linear(linear, bits=bits, **{"group_size": 64, **kwargs})


def same_function(a: QuantLinear, b: QuantLinear) -> bool:
    x = torch.randn((5, a.in_features), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_agrees_with_the_reference(bits: int, act_bits: int, dtype: torch.dtype) -> None:
    layer = make_layer(bits=bits, act_bits=act_bits, act_clip=0.9)
    x = torch.randn((2, 3, 200), generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    expected = ops.reference.lut_linear(x, layer.packed_weight(), layer.bias, act_bits, 0.9)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 24)
    # The result is rounded once more to the dtype of x; before that it is good to 1e-5 of the terms' size.
    tolerance = {torch.float32: 1e-5, torch.float16: 2.0**-11 + 1e-5, torch.bfloat16: 2.0**-8 + 1e-5}[dtype]
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < tolerance


def test_weight_only_layer_is_close_to_the_dense_one() -> None:
    layer = make_layer(bits=4, act_bits=16)
    x = torch.randn((7, 200))
    dense = nn.functional.linear(x, layer.dequantize(), layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)


def test_shapes_of_input() -> None:
    layer = make_layer()
    x = torch.randn((4, 6, 200))
    with torch.no_grad():
        y = layer(x)
        assert layer(x[:0]).shape == (0, 6, 24)
        assert layer(x[:, :0]).shape == (4, 0, 24)
        assert layer(x[0, 0]).shape == (24,)
        assert torch.equal(layer(x[2, 3]), y[2, 3])
        assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
        strided = torch.empty((4, 6, 400))[..., ::2].copy_(x)
        assert not strided.is_contiguous()
        assert torch.equal(layer(strided), y)
        assert torch.equal(layer(x[:1, :1].expand(3, 2, 200)), y[:1, :1].expand(3, 2, 24))


@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"), [(5, 1, 128), (1, 3, 1), (33, 17, 33), (576, 7, 64), (130, 2, 128)]
)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_odd_geometries(in_features: int, out_features: int, group_size: int, bits: int) -> None:
    layer = make_layer(in_features, out_features, bits, group_size=group_size, act_bits=8)
    weight = quantize_weight(nn.Linear(1, 1).weight.new_ones((out_features, in_features)), bits, group_size)
    assert torch.equal(QuantLinear.from_packed(weight).packed_weight().codes, weight.codes)
    x = torch.randn((3, in_features))
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(
        y.double(), ops.reference.lut_linear(x, layer.packed_weight(), layer.bias, 8), rtol=1e-5, atol=1e-5
    )


def test_new_layer_is_zero() -> None:
    layer = QuantLinear(200, 24)
    assert torch.equal(layer(torch.randn(3, 200)), torch.zeros(3, 24))
    assert torch.equal(layer.dequantize(), torch.zeros(24, 200))
    assert QuantLinear(200, 24, bias=False).bias is None
    assert QuantLinear(200, 24, dtype=torch.bfloat16).bias.dtype == torch.bfloat16


def test_float64_bias_becomes_float32() -> None:
    linear = nn.Linear(64, 48).double()
    layer = QuantLinear.from_linear(linear, group_size=64)
    assert layer.bias.dtype == QuantLinear(64, 48, dtype=torch.float64).bias.dtype == torch.float32
    assert torch.equal(layer.bias, linear.bias.float())
    assert layer(torch.randn(2, 64)).shape == (2, 48)
    torch.set_default_dtype(torch.float64)
    try:
        assert QuantLinear(64, 48).bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_there_is_no_weight_to_read() -> None:
    layer = make_layer()
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"no float weight to read.*use .dequantize\(\), or keep this layer"):
        _ = layer.weight
    with pytest.raises(AttributeError, match=r"no attribute 'absent'"):
        _ = layer.absent


@pytest.mark.parametrize(("in_features", "group_size"), [(160 * 32, 32), (53248, 32), (100003, 64)])
def test_error_stays_within_the_documented_bound(in_features: int, group_size: int) -> None:
    # All values have one sign and nothing cancels (docs/numerics.md, the linear layer).
    generator = torch.Generator().manual_seed(0)
    weight = quantize_weight(torch.rand((2, in_features), generator=generator) + 0.1, 2, group_size)
    x = torch.rand((1, in_features), generator=generator) + 0.1
    with torch.no_grad():
        y = QuantLinear.from_packed(weight)(x)
    expected = ops.reference.lut_linear(x, weight)
    bound = (-(-in_features // group_size) + 2) * 2.0**-24
    assert bool(((y - expected).abs() <= bound * expected).all())
    with torch.no_grad():
        y = QuantLinear.from_packed(weight, act_bits=16)(x)
    expected = ops.reference.lut_linear(x, weight, act_bits=16)
    bound += (group_size / 4 + 2) * 2.0**-24
    assert bool(((y - expected).abs() <= bound * expected).all())


def test_from_linear_copies_what_a_linear_has() -> None:
    linear = nn.Linear(64, 8).to(torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    layer = QuantLinear.from_linear(linear, 3, 32, act_bits=8, levels="uniform")
    assert not layer.training
    assert layer.bias.dtype == torch.bfloat16
    assert not layer.bias.requires_grad
    assert torch.equal(layer.dequantize(), quantize_weight(linear.weight, 3, 32, "uniform").dequantize())
    layer.bias.data.fill_(5.0)
    assert not bool((linear.bias == 5.0).any())
    assert QuantLinear.from_linear(nn.Linear(64, 8, bias=False)).bias is None
    levels = torch.tensor([-1.0, -0.25, 0.25, 1.0]).expand(8, 2, 4)
    assert QuantLinear.from_linear(linear, 2, 32, levels=levels).dequantize().unique().numel() <= 4


def test_from_packed_is_exact() -> None:
    weight = quantize_weight(torch.randn(24, 200), 3, 64)
    layer = QuantLinear.from_packed(weight, bias=torch.arange(24.0), act_bits=8, act_clip=0.95)
    back = layer.packed_weight()
    for name in PackedWeight.TENSORS:
        assert torch.equal(getattr(back, name), getattr(weight, name))
    assert (layer.bits, layer.group_size, layer.act_bits, layer.act_clip) == (3, 64, 8, 0.95)
    assert not layer.bias.requires_grad
    assert torch.equal(layer.dequantize(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 3, 200), (0, 200)])
def test_gradient_is_straight_through(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = make_layer().to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    expected = grad_y.float() @ layer.dequantize()
    assert x.grad.dtype == dtype
    assert layer.bias.grad.dtype == dtype
    torch.testing.assert_close(x.grad, expected.to(dtype))
    torch.testing.assert_close(layer.bias.grad, grad_y.float().reshape(-1, 24).sum(0).to(dtype))
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_gradient_only_where_it_is_asked_for() -> None:
    layer = make_layer()
    layer.requires_grad_(False)
    assert layer(torch.randn(3, 200)).grad_fn is None
    x = torch.randn((3, 200), requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.bias.grad is None
    layer.bias.requires_grad_(True)
    layer(x.detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((24,), 3.0))
    with torch.inference_mode():
        assert not layer(x).requires_grad


def test_gradient_of_the_gradient() -> None:
    layer = make_layer()
    x = torch.randn((3, 200), requires_grad=True)
    grad_y = torch.randn((3, 24), requires_grad=True)
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y, create_graph=True)
    grad_x.sum().backward()
    torch.testing.assert_close(grad_y.grad, layer.dequantize().sum(1).expand(3, 24))


def test_functional_transform() -> None:
    layer = make_layer()
    x = torch.randn((3, 200))
    grad = torch.func.grad(lambda x: layer(x).sum())(x)
    torch.testing.assert_close(grad, layer.dequantize().sum(0).expand(3, 200))


def test_state_dict_is_the_canonical_format(tmp_path) -> None:
    layer = make_layer(bits=3)
    state = layer.state_dict()
    assert sorted(state) == KEYS
    weight = layer.packed_weight()
    for name in PackedWeight.TENSORS:
        assert torch.equal(state[name], getattr(weight, name))
    assert state["format"].tolist() == [1, 3, 64, 200, 24]
    assert torch.equal(PackedWeight.from_state_dict(state).dequantize(), layer.dequantize())

    fresh = QuantLinear(200, 24, bits=3, group_size=64)
    assert not same_function(fresh, layer)
    assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    assert same_function(fresh, layer)

    save_file(state, tmp_path / "layer.safetensors")
    fresh = QuantLinear(200, 24, bits=3, group_size=64)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert same_function(fresh, layer)


def test_state_dict_of_a_model(tmp_path) -> None:
    model = nn.Sequential(make_layer(), nn.ReLU(), make_layer(24, 8, bits=4))
    fresh = nn.Sequential(QuantLinear(200, 24, group_size=64), nn.ReLU(), QuantLinear(24, 8, bits=4, group_size=64))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_function(fresh[0], model[0])
    assert same_function(fresh[2], model[2])


def uniform_layer(bits: int = 3) -> QuantLinear:
    weight = make_layer(bits=bits).packed_weight()
    first = weight.levels[..., :1].clamp(max=2 ** (7 - bits) - 1)
    weight = dataclasses.replace(weight, levels=first, kind="uniform")
    return QuantLinear.from_packed(weight, torch.ones(24), act_bits=8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_groups_stay_uniform(tmp_path, bits: int) -> None:
    layer = uniform_layer(bits)
    assert layer.kind == layer.packed_weight().kind == "uniform"
    assert same_function(layer, QuantLinear.from_packed(layer.packed_weight().as_table(), layer.bias, act_bits=8))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert (state["format"].tolist(), state["levels"].shape) == ([2, bits, 64, 200, 24, 1], (24, 4, 1))
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        fresh = QuantLinear(200, 24, bits=bits, group_size=64, act_bits=8, device=device)
        assert fresh.kind == "table"
        fresh.load_state_dict(state, assign=assign)
        assert fresh.kind == "uniform"
        assert len(fresh.packed) == len(layer.packed)
        assert same_function(fresh, layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.kind == "uniform"
        assert same_function(twin, layer)
        assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items())
    # And back: the kind is that of the weight last loaded.
    fresh.load_state_dict(make_layer(bits=bits).state_dict())
    assert fresh.kind == "table"
    assert "kind=uniform" in repr(layer)
    assert "kind" not in repr(fresh)


def test_layers_pickled_before_there_were_kinds() -> None:
    layer = make_layer()
    state = layer.__getstate__()
    del state["kind"]
    old = QuantLinear.__new__(QuantLinear)
    old.__setstate__(state)
    assert old.kind == "table"
    assert same_function(old, layer)


def test_loading_names_what_is_wrong() -> None:
    layer = make_layer()
    state = layer.state_dict()

    def fails(
        message: str, strict: bool = True, target: QuantLinear | None = None, **changes: torch.Tensor | None
    ) -> None:
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        fresh = target or QuantLinear(200, 24, group_size=64)
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(changed, strict=strict)
        if "PackedWeight" in message:
            assert not bool(fresh.dequantize().any())  # a weight that cannot be trusted is not taken over

    for strict in (True, False):
        fails(
            r"PackedWeight: codes must have shape.*got \(24, 63\); .* truncated", strict, codes=state["codes"][:, :-1]
        )
        fails(r"PackedWeight: version must be 1 to 3, got 4.*upgrade", strict, format=torch.tensor([4, 2, 64, 200, 24]))
        fails(r"PackedWeight: .* five tensors.*missing scales; the checkpoint is incomplete", strict, scales=None)
        fails(r"PackedWeight: scales must be torch.float16, got torch.float32", strict, scales=state["scales"].float())
        fails(r"PackedWeight: levels must be ascending.*sort", strict, levels=state["levels"].flip(-1))
        stored = "of the stored weight must be the layer's"
        fails(rf"bits {stored}, 3, got 2; construct", strict, QuantLinear(200, 24, 3, 64))
        fails(rf"group_size {stored}, 128, got 64; construct", strict, QuantLinear(200, 24))
        fails(rf"in_features {stored}, 192, got 200; construct", strict, QuantLinear(192, 24, group_size=64))
        fails(rf"out_features {stored}, 25, got 24; construct", strict, QuantLinear(200, 25, group_size=64, bias=False))
    missing = ", ".join(f'"{name}"' for name in PackedWeight.KEYS)
    fails(rf"Missing key\(s\) in state_dict: {missing}", **dict.fromkeys(PackedWeight.KEYS))
    fails(r'Missing key\(s\) in state_dict: "bias"', bias=None)
    fails(r'Unexpected key\(s\) in state_dict: "weight"', weight=torch.zeros(24, 200))
    fails(r'Unexpected key\(s\) in state_dict: "packed"', packed=layer.packed)
    fails(r'Unexpected key\(s\) in state_dict: "bias"', target=QuantLinear(200, 24, group_size=64, bias=False))


def test_loading_names_the_layer() -> None:
    model = nn.Sequential(make_layer())
    state = model.state_dict()
    state["0.codes"] = state["0.codes"][:-1]
    with pytest.raises(RuntimeError, match=r"0: PackedWeight: codes must have shape \(24, 64\).*got \(23, 64\)"):
        model.load_state_dict(state)


def test_loading_without_strict_keeps_what_is_absent() -> None:
    layer = make_layer()
    before = layer.dequantize()
    result = layer.load_state_dict({"bias": torch.ones(24), "other": torch.ones(1)}, strict=False)
    assert result.missing_keys == list(PackedWeight.KEYS)
    assert result.unexpected_keys == ["other"]
    assert torch.equal(layer.dequantize(), before)
    assert bool((layer.bias == 1).all())


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        copy.copy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(_saved(layer), weights_only=False),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies(clone) -> None:
    layer = make_layer(bits=3, act_bits=8, act_clip=0.9).eval()
    twin = clone(layer)
    assert same_function(twin, layer)
    assert twin.packed.data_ptr() != layer.packed.data_ptr()
    assert repr(twin) == repr(layer)
    assert not twin.training
    assert sorted(twin.state_dict()) == KEYS
    assert list(dict(twin.named_buffers())) == ["packed"]


def _saved(layer: QuantLinear) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_pickle_holds_the_canonical_tensors() -> None:
    layer = make_layer()
    state = layer.__getstate__()
    assert "packed" not in state["_buffers"]
    assert sorted(state["packed_weight"]) == sorted(PackedWeight.KEYS)
    assert "packed" in layer._buffers
