"""QuantLinear with an input order: computing, storing, copying, moving and refusing."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops, quantize_weight
from rcp_kernels.integrations.importers import ImportedWeight
from rcp_kernels.nn import rotate_inputs

IN, OUT = 200, 24


def permutation(size: int = IN, seed: int = 0) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def ordered_layer(bits: int = 3, act_bits: int = 8, bias: bool = True, kind: str = "table", seed: int = 0):
    """The layer, and the float weight that it stands for, its columns in the order of the input."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((OUT, IN), generator=generator)
    order = permutation(seed=seed)
    packed = quantize_weight(weight[:, order], bits, 64, "uniform" if kind == "uniform" else "kmeans")
    if kind == "uniform":
        first = packed.levels[..., :1].clamp(max=2 ** (7 - bits) - 1)
        packed = PackedWeight(
            packed.codes, first, packed.scales, packed.tensor_scale, bits, 64, IN, OUT, "uniform"
        ).validate()
    layer = QuantLinear.from_packed(
        packed, torch.randn(OUT, generator=generator) if bias else None, act_bits, 0.9, input_order=order
    )
    source = torch.empty((OUT, IN))
    source[:, order] = packed.dequantize()
    return layer, source


def same(a: QuantLinear, b: QuantLinear) -> bool:
    x = torch.randn((5, IN), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (3, 7, IN), (0, IN)])
def test_forward_takes_x_as_it_comes(act_bits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, source = ordered_layer(act_bits=act_bits)
    assert torch.equal(layer.dequantize(), source)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = QuantLinear.from_packed(layer.packed_weight(), layer.bias, act_bits, 0.9)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(y, plain(x[..., layer.input_order]))
    assert y.dtype == dtype
    expected = ops.reference.lut_linear(x, layer.packed_weight(), layer.bias, act_bits, 0.9, layer.input_order)
    tolerance = {torch.float32: 1e-5, torch.float16: 2.0**-11 + 1e-5, torch.bfloat16: 2.0**-8 + 1e-5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * 10)
    if act_bits == 16 and dtype == torch.float32:
        torch.testing.assert_close(y, nn.functional.linear(x, source, layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(IN,), (2, 3, IN), (0, IN)])
def test_gradient_goes_back_through_the_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer, source = ordered_layer()
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    layer.requires_grad_(True)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    grad_y = torch.randn_like(y)
    y.backward(grad_y)
    torch.testing.assert_close(x.grad, (grad_y.float() @ source).to(dtype))
    torch.testing.assert_close(layer.bias.grad, grad_y.float().reshape(-1, OUT).sum(0))


def test_gradient_of_the_gradient_and_functional_transforms() -> None:
    layer, source = ordered_layer()
    x = torch.randn((3, IN), requires_grad=True)
    grad_y = torch.randn((3, OUT), requires_grad=True)
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y, create_graph=True)
    grad_x.sum().backward()
    torch.testing.assert_close(grad_y.grad, source.sum(1).expand(3, OUT))
    grad = torch.func.grad(lambda x: layer(x).sum())(x.detach())
    torch.testing.assert_close(grad, source.sum(0).expand(3, IN))


@pytest.mark.parametrize("kind", ["table", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_version_3(tmp_path, kind: str, bits: int, bias: bool) -> None:
    layer, _ = ordered_layer(bits, kind=kind, bias=bias)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == {*PackedWeight.KEYS, "input_order", *(["bias"] if bias else [])}
    assert state["format"].tolist() == [3, bits, 64, IN, OUT, int(kind == "uniform")]
    assert torch.equal(state["input_order"], permutation())
    assert layer.format_version == 3
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        fresh = QuantLinear(IN, OUT, bits, 64, 8, bias, 0.9, device=device)
        assert fresh.input_order is None
        assert str(fresh.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert same(fresh, layer)
        assert fresh.kind == kind
    fresh = QuantLinear.from_state_dict(state, act_bits=8, act_clip=0.9)
    assert same(fresh, layer)
    assert repr(fresh) == repr(layer)
    assert "input_order=True" in repr(layer)
    # The order is that of the weight last loaded.
    plain = QuantLinear.from_packed(layer.packed_weight(), layer.bias, 8, 0.9)
    assert plain.state_dict()["format"][0] == (2 if kind == "uniform" else 1)
    assert plain.format_version == (2 if kind == "uniform" else 1)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.input_order is None
    assert same(fresh, plain)
    assert not same(fresh, layer)


@pytest.mark.parametrize("kind", ["table", "uniform"])
@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        copy.copy,
        lambda layer: pickle.loads(pickle.dumps(layer)),
        lambda layer: torch.load(_saved(layer), weights_only=False),
        lambda layer: nn.Sequential(copy.deepcopy(layer)).to("cpu")[0],
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "to"],
)
def test_copies(clone, kind: str) -> None:
    layer, _ = ordered_layer(kind=kind)
    twin = clone(layer)
    assert same(twin, layer)
    assert torch.equal(twin.input_order, layer.input_order)
    assert set(twin.state_dict()) == set(layer.state_dict())


def test_casts_and_the_meta_device() -> None:
    layer, _ = ordered_layer()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        twin = cast(copy.deepcopy(layer))
        assert twin.input_order.dtype == torch.int64
        assert torch.equal(twin.input_order, layer.input_order)
    meta = copy.deepcopy(layer).to("meta")
    assert meta(torch.empty((3, IN), device="meta")).shape == (3, OUT)
    assert meta.state_dict()["input_order"].is_meta
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert same(meta, layer)
    assert same(empty, layer)


def _saved(layer: QuantLinear) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def test_layers_pickled_before_there_were_orders() -> None:
    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), 3, 64)
    state = layer.__getstate__()
    del state["_buffers"]["input_order"]
    state["_non_persistent_buffers_set"] = {"packed"}
    old = QuantLinear.__new__(QuantLinear)
    old.__setstate__(state)
    assert same(old, layer)
    ordered, _ = ordered_layer()
    old.load_state_dict(ordered.state_dict())
    assert set(old.state_dict()) == set(ordered.state_dict())


def test_the_order_is_a_copy() -> None:
    order = permutation()
    layer = QuantLinear.from_packed(quantize_weight(torch.randn(OUT, IN), 2, 64), input_order=order)
    order.zero_()
    assert torch.equal(layer.input_order, permutation())
    state = layer.state_dict()
    twin = QuantLinear.from_state_dict(state)
    state["input_order"].zero_()
    assert torch.equal(twin.input_order, permutation())


def test_loading_names_what_is_wrong() -> None:
    layer, _ = ordered_layer()
    state = layer.state_dict()
    twice = permutation()
    twice[3] = twice[4]
    missing = int((torch.arange(IN) != twice.sort().values).nonzero()[0])
    plain = QuantLinear.from_packed(layer.packed_weight(), layer.bias).state_dict()
    rotation = OnlineRotation(IN, group_size=4)
    for change, message in (
        ({"input_order": None}, "a weight of version 3 must have an input_order beside it, got none"),
        ({**plain, "input_order": twice}, "a weight of version 1 must have no input_order beside it, got one"),
        ({"input_order": twice}, rf"each of 0 to 199 once, got values where {missing} is missing"),
        ({"input_order": -permutation()}, r"each of 0 to 199 once, got values where 0 is missing"),
        ({"input_order": permutation().int()}, r"input_order must be int64 \[200\].*got torch.int32"),
        ({"input_order": permutation(199)}, r"input_order must be int64 \[200\].*got torch.int64 of shape \(199,\)"),
        ({"input_order": [0, 1]}, r"input_order must be int64 \[200\].*got list"),
    ):
        bad = {key: value for key, value in {**state, **change}.items() if value is not None}
        for strict in (True, False):
            fresh = QuantLinear(IN, OUT, 3, 64)
            with pytest.raises(RuntimeError, match=message):
                fresh.load_state_dict(bad, strict=strict)
            assert fresh.input_order is None
        with pytest.raises(ValueError, match=f"up: .*{message}"):
            QuantLinear.from_state_dict({f"up.{key}": value for key, value in bad.items()}, "up.")
    # A part without its weight: the order alone is part of a packed weight.
    with pytest.raises(RuntimeError, match=r"five tensors.*missing codes"):
        QuantLinear(IN, OUT, 3, 64).load_state_dict({"input_order": permutation()}, strict=False)
    rotated = QuantLinear(IN, OUT, 3, 64, input_rotation=rotation)
    with pytest.raises(RuntimeError, match="input_rotation of the stored weight must be the layer's"):
        rotated.load_state_dict(state)
    with pytest.raises(RuntimeError, match="input_order must be None in a layer with an input_rotation"):
        rotated.load_state_dict({**state, "rotation": rotation.state()})
    with pytest.raises(ValueError, match="input_order must be None in a layer with an input_rotation"):
        QuantLinear.from_state_dict({**state, "rotation": rotation.state()})
    with pytest.raises(ValueError, match="input_order must be None in a layer with an input_rotation"):
        QuantLinear.from_packed(layer.packed_weight(), input_rotation=rotation, input_order=permutation())
    with pytest.raises(ValueError, match=r"QuantLinear: input_order must be int64 \[200\].*got torch.int64 of shape"):
        QuantLinear.from_packed(layer.packed_weight(), input_order=permutation(100))
    with pytest.raises(ValueError, match="must have no input_order, got one of 200"):
        PackedWeight.from_state_dict(state)


def test_from_imported() -> None:
    layer, source = ordered_layer(bits=4, act_bits=16)
    imported = ImportedWeight(layer.packed_weight(), 0.0, layer.input_order, torch.arange(OUT, dtype=torch.float16))
    assert torch.equal(imported.dequantize(), source)
    made = QuantLinear.from_imported(imported, act_bits=16, act_clip=0.9)
    assert (made.act_bits, made.act_clip) == (16, 0.9)
    assert torch.equal(made.bias, imported.bias)
    assert torch.equal(made.dequantize(), source)
    plain = QuantLinear.from_imported(ImportedWeight(layer.packed_weight(), 0.0))
    assert (plain.bias, plain.input_order, plain.act_bits) == (None, None, 4)
    with pytest.raises(TypeError, match=r"imported must be an ImportedWeight, got PackedWeight; .* use from_packed"):
        QuantLinear.from_imported(layer.packed_weight())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("signs", [True, False])
def test_from_state_dict_reads_a_rotation(bias: bool, signs: bool) -> None:
    torch.manual_seed(0)
    rotation = OnlineRotation(192, 64, "natural", signs=torch.randint(2, (192,)) * 2 - 1 if signs else None)
    linear = rotate_inputs(nn.Linear(192, OUT, bias=bias).bfloat16(), rotation)[1]
    layer = QuantLinear.from_packed(quantize_weight(linear.weight, 2, 32), linear.bias, 8, 0.9, rotation)
    state = {f"a.{key}": value for key, value in layer.state_dict().items()}
    made = QuantLinear.from_state_dict(state, "a.", act_bits=8, act_clip=0.9)
    x = torch.randn(3, 192)
    with torch.no_grad():
        assert torch.equal(made(x), layer(x))
    assert repr(made) == repr(layer)
    if bias:
        assert made.bias.dtype == torch.bfloat16
        assert made.bias.requires_grad
    if signs:
        del state["a.rotation"]
        with pytest.raises(ValueError, match=r"a: QuantLinear: input_rotation.signs must come with a rotation"):
            QuantLinear.from_state_dict(state, "a.")


def test_from_state_dict_of_a_mixed_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "a": QuantLinear.from_linear(nn.Linear(64, 8), 2, 32),
            "b": QuantLinear.from_linear(nn.Linear(70, 5, bias=False), 3, 70, levels="uniform"),
            "c": ordered_layer(4)[0],
        }
    )
    state = model.state_dict()
    for name, layer in model.items():
        made = QuantLinear.from_state_dict(state, f"{name}.", layer.act_bits, layer.act_clip)
        assert repr(made) == repr(layer)
        assert all(torch.equal(value, state[f"{name}.{key}"]) for key, value in made.state_dict().items())
    with pytest.raises(ValueError, match=r"d: PackedWeight: .* five tensors.*missing d.codes"):
        QuantLinear.from_state_dict(state, "d.")
    with pytest.raises(ValueError, match=r"a: QuantLinear: bias must have shape \(8,\)"):
        QuantLinear.from_state_dict({**state, "a.bias": torch.ones(7)}, "a.")
