"""QuantLinear: construction, forward, gradients, every way of storing and moving it, bad input."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops, quantize_weight
from rcp_kernels.nn import RotatedLinear

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
    # All of one sign, so that nothing cancels: docs/numerics.md, the linear layer.
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


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, lambda layer: layer.to(torch.float64)])
def test_casting_casts_the_bias_only(cast) -> None:
    layer = make_layer()
    before = layer.packed_weight()
    dtype = cast(layer).bias.dtype
    assert dtype != torch.float32
    after = layer.packed_weight()
    for name in PackedWeight.TENSORS:
        assert torch.equal(getattr(before, name), getattr(after, name))
    if dtype != torch.float64:
        with torch.no_grad():
            assert layer(torch.randn((2, 200), dtype=dtype)).dtype == dtype
            assert layer(torch.randn(2, 200)).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:for bias. copying from a non-meta parameter")
def test_meta_checkpoints() -> None:
    layer = make_layer()
    pickled = torch.load(_saved(layer), weights_only=False, map_location="meta")
    assert pickled.packed.is_meta
    pickled.load_state_dict(layer.state_dict(), assign=True)
    assert same_function(pickled, layer)
    state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"format must be int64.*got a tensor on the meta device.*load it on the CPU"
    ):
        make_layer().load_state_dict(state)


@pytest.mark.filterwarnings("ignore:for bias. copying from a non-meta parameter")
def test_meta_device() -> None:
    layer = make_layer()
    with torch.device("meta"):
        meta = QuantLinear(200, 24, group_size=64)
    assert meta.packed.is_meta
    assert meta(torch.empty((3, 200), device="meta")).shape == (3, 24)
    assert meta.state_dict()["codes"].shape == layer.state_dict()["codes"].shape
    for twin in (copy.deepcopy(meta), pickle.loads(pickle.dumps(meta))):
        assert twin.packed.is_meta
    with pytest.warns(UserWarning, match=r"loading into a layer on the meta device does nothing; pass assign=True"):
        meta.load_state_dict(layer.state_dict())
    assert meta.packed.is_meta
    meta.load_state_dict(copy.deepcopy(layer).to("meta").state_dict(), assign=True)
    assert meta.packed.is_meta
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert same_function(meta, layer)

    moved = make_layer().to("meta")
    assert moved.packed.is_meta
    moved.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert same_function(moved, layer)
    empty = QuantLinear(200, 24, group_size=64, device="meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"lut_linear: weight must .*make it with pack_weight"), torch.no_grad():
        empty(torch.randn(1, 200))


def test_repr() -> None:
    text = repr(QuantLinear(200, 24, bits=3, group_size=200, act_bits=8, bias=False, act_clip=0.9))
    assert text == (
        "QuantLinear(in_features=200, out_features=24, bits=3, group_size=200, act_bits=8, act_clip=0.9, bias=False)"
    )


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 3, 4\), got 8; choose"):
        QuantLinear(200, 24, bits=8)
    with pytest.raises(ValueError, match=r"group_size must be one of .* \(200\), got 100; pass in_features"):
        QuantLinear(200, 24, group_size=100)
    with pytest.raises(ValueError, match=r"act_bits must be one of \(4, 8, 16\), got 6; 16 leaves"):
        QuantLinear(200, 24, act_bits=6)
    for act_bits in (4.0, "4", True):
        with pytest.raises(ValueError, match=rf"act_bits must be one of \(4, 8, 16\), got {act_bits!r}; 16 leaves"):
            QuantLinear(200, 24, act_bits=act_bits)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"act_clip must be in \(0, 1\], got '1'; 1.0 keeps"):
        QuantLinear(200, 24, act_clip="1")  # type: ignore[arg-type]
    for size in ("64", 48.0, True):
        with pytest.raises(ValueError, match=rf"in_features must be an int of at least 1, got {size!r}; an empty"):
            QuantLinear(size, 24)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"out_features must be an int of at least 1, got {size!r}; an empty"):
            QuantLinear(24, size)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dtype must be float32, float16 or bfloat16, got torch.int8; dtype is that of the bias"
    ):
        QuantLinear(200, 24, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"dtype must be a torch.dtype, got 'float32'; pass"):
        QuantLinear(200, 24, dtype="float32")  # type: ignore[arg-type]
    for clip in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"act_clip must be in \(0, 1\], got {clip}; 1.0 keeps"):
            QuantLinear(200, 24, act_clip=clip)
    with pytest.raises(ValueError, match=r"in_features must be an int of at least 1, got 0; an empty layer"):
        QuantLinear(0, 24)
    weight = quantize_weight(torch.randn(24, 200))
    with pytest.raises(ValueError, match=r"bias must have shape \(24,\) \(out_features\), got \(23,\); pass"):
        QuantLinear.from_packed(weight, bias=torch.zeros(23))
    with pytest.raises(TypeError, match=r"bias must be a floating point tensor or None, got torch.int64; convert"):
        QuantLinear.from_packed(weight, bias=torch.zeros(24, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"bias must be a floating point tensor or None, got list; convert"):
        QuantLinear.from_packed(weight, bias=[0.0] * 24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias is on the meta device and has no values; load the checkpoint"):
        QuantLinear.from_packed(weight, bias=torch.zeros(24, device="meta"))
    with pytest.raises(TypeError, match=r"weight must be a PackedWeight, got Tensor; make one with quantize_weight"):
        QuantLinear.from_packed(torch.zeros(24, 200))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got Tensor; for a weight by itself"):
        QuantLinear.from_linear(torch.zeros(24, 200))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"pack_weight: codes must have 25 rows \(out_features\), got shape \(24, .*trunc"
    ):
        ops.pack_weight(dataclasses.replace(weight, out_features=25))


def test_bad_input() -> None:
    layer = make_layer()
    x = torch.randn((2, 200))
    for bad in (None, x.numpy(), [1.0]):
        for grad in (True, False):
            with (
                pytest.raises(TypeError, match=rf"x must be a tensor \[..., 200\], got {type(bad).__name__}; convert"),
                torch.set_grad_enabled(grad),
            ):
                layer(bad)
    for bad in (x[:, :-1], x.T, torch.randn(3, 2, 199), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"lut_linear: .*200.*got"), torch.no_grad():
            layer(bad)
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(ValueError, match=r"x must be float32, float16 or bfloat16, got .*; convert"):
            layer(x.to(dtype))
    for value in (float("nan"), float("inf")):
        broken = x.clone()
        broken[1, 3] = value
        with pytest.raises(ValueError, match=r"must be finite"), torch.no_grad():
            layer(broken)
        with pytest.raises(ValueError, match=r"must be finite, got NaN or Inf; check"):
            ops.reference.lut_linear(broken, layer.packed_weight())
    with pytest.raises(ValueError, match=r"200 features.*got shape \(2, 199\)"):
        ops.reference.lut_linear(x[:, :-1], layer.packed_weight())
    with pytest.raises(ValueError, match=r"act_bits must be one of \(4, 8, 16\), got 2"):
        ops.reference.lut_linear(x, layer.packed_weight(), act_bits=2)


def test_from_linear_takes_the_rotation_of_a_rotated_linear():
    torch.manual_seed(0)
    rotation = OnlineRotation(64, group_size=32)
    rotated = RotatedLinear.from_linear(nn.Linear(64, 48), rotation)
    layer = QuantLinear.from_linear(rotated, bits=4, group_size=32, act_bits=8)
    assert layer.input_rotation is rotated.input_rotation
    x = torch.randn(5, 64)
    assert (layer(x) - rotated(x)).norm() < 0.1 * rotated(x).norm()
    with pytest.raises(
        ValueError, match=r"must have no input_rotation where a second one is passed, got a RotatedLinear and"
    ):
        QuantLinear.from_linear(rotated, input_rotation=rotation)
