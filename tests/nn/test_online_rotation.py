"""OnlineRotation: its matrix, folding it into weights, and QuantLinear layers that rotate their input."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rcp_kernels import OnlineRotation, QuantLinear, gsr_matrix, quantize_weight, rotate_inputs, walsh_matrix


def signs(size: int) -> torch.Tensor:
    return torch.randint(2, (size,), generator=torch.Generator().manual_seed(7)) * 2 - 1


ROTATIONS = [
    OnlineRotation(96),
    OnlineRotation(96, order="natural"),
    OnlineRotation(96, 32),
    OnlineRotation(96, 24, "natural"),
    OnlineRotation(96, heads=12),
    OnlineRotation(96, heads=8, order="natural"),
    OnlineRotation(96, 4, heads=12),
    OnlineRotation(96, order="natural", signs=signs(96)),
    OnlineRotation(96, 32, "natural", signs=signs(96)),
    OnlineRotation(96, 2, "natural", 12, signs(96)),
]
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS, ids=repr)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(in_features: int = 96, out_features: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias)


@each_rotation
def test_forward_is_the_matrix(rotation: OnlineRotation) -> None:
    matrix = rotation.matrix()
    assert (matrix.dtype, matrix.shape) == (torch.float64, (96, 96))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-13)
    x = random(2, 3, 96)
    torch.testing.assert_close(rotation(x).double(), x.double() @ matrix.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.inverse(x).double(), x.double() @ matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=0, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        assert rotation(x.to(dtype)).dtype == dtype
        assert rotation.to(dtype)(x.to(dtype)).dtype == dtype
    assert rotation(x[0, 0]).shape == (96,)
    assert rotation(x[:0]).shape == (0, 3, 96)
    assert torch.equal(rotation(x.transpose(0, 1)), rotation(x).transpose(0, 1))


def test_matrices_of_the_papers() -> None:
    assert torch.equal(OnlineRotation(256, 128).matrix(), gsr_matrix(256))
    assert torch.equal(OnlineRotation(64).matrix(), walsh_matrix(64).double() / 8)


def test_heads_are_mixed_coordinate_by_coordinate() -> None:
    rotation = OnlineRotation(8 * 5, heads=8)
    x = random(3, 8, 5)
    mixed = torch.einsum("gh,nhd->ngd", walsh_matrix(8).float() / 8**0.5, x)
    torch.testing.assert_close(rotation(x.flatten(1)), mixed.flatten(1), rtol=0, atol=1e-6)


@each_rotation
@pytest.mark.parametrize("bias", [True, False])
def test_fused_into_the_input_side(rotation: OnlineRotation, bias: bool) -> None:
    linear = make_linear(bias=bias)
    fused = copy.deepcopy(linear)
    parameters = list(fused.parameters())
    assert rotation.fuse_into(fused) is None
    assert all(a is b for a, b in zip(fused.parameters(), parameters, strict=True))
    assert not torch.equal(fused.weight, linear.weight)
    x = random(5, 96)
    torch.testing.assert_close(fused(rotation(x)), linear(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(fused.weight.double(), linear.weight.double() @ rotation.matrix().T, rtol=0, atol=1e-7)


@each_rotation
@pytest.mark.parametrize("bias", [True, False])
def test_fused_into_the_output_side(rotation: OnlineRotation, bias: bool) -> None:
    linear = make_linear(24, 96, bias)
    fused = copy.deepcopy(linear)
    rotation.fuse_into(fused, side="output")
    x = random(5, 24)
    torch.testing.assert_close(fused(x), rotation(linear(x)), rtol=0, atol=1e-5)


@each_rotation
def test_fusing_is_done_in_float64(rotation: OnlineRotation) -> None:
    first, second = make_linear(24, 96).double(), make_linear(96, 24).double()
    x = random(5, 24).double()
    expected = second(first(x))
    rotation.fuse_into(first, "output")
    rotation.fuse_into(second, "input")
    torch.testing.assert_close(second(first(x)), expected, rtol=0, atol=1e-13)
    low = make_linear().to(torch.bfloat16)
    weight = low.weight.double() @ rotation.matrix().T
    rotation.fuse_into(low)
    assert low.weight.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's eight bits: rounded once, and not before.
    assert bool(((low.weight.double() - weight).abs() <= weight.abs() * 2.0**-8 + 1e-12).all())


def test_rotate_inputs() -> None:
    linear = make_linear().eval()
    before = linear.weight.clone()
    for rotation in (None, OnlineRotation(96, 32)):
        model = rotate_inputs(linear, rotation)
        assert [type(module) for module in model] == [OnlineRotation, nn.Linear]
        assert rotation is None or model[0] is rotation
        assert (model[0].group_size, model[0].order) == (32 if rotation else 96, "sequency")
        assert not model[1].training
        x = random(5, 96)
        torch.testing.assert_close(model(x), linear(x), rtol=0, atol=1e-5)
        assert torch.equal(linear.weight, before)
        assert sorted(model.state_dict()) == ["1.bias", "1.weight"]
    with pytest.raises(ValueError, match=r"OnlineRotation: .*got 100 = 25 \* 4"):
        rotate_inputs(make_linear(100))


def test_gradients_go_through() -> None:
    linear = make_linear()
    model = rotate_inputs(linear)
    x, y = random(5, 96).requires_grad_(), random(5, 96).requires_grad_()
    model(x).square().sum().backward()
    linear(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-4)


@each_rotation
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_and_state(rotation: OnlineRotation, clone) -> None:
    x = random(5, 96)
    twin = clone(rotation)
    assert torch.equal(twin(x), rotation(x))
    assert repr(twin) == repr(rotation)
    assert list(twin.parameters()) == []
    state = twin.state_dict()
    assert list(state) == ([] if rotation.signs is None else ["signs"])
    if state:
        fresh = OnlineRotation(96, rotation.group_size, "natural", rotation.heads, torch.ones(96))
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), rotation(x))
        with pytest.raises(RuntimeError, match=r"every sign must be \+1 or -1; the checkpoint is damaged"):
            fresh.load_state_dict({"signs": torch.zeros(96, dtype=torch.int8)})
        assert torch.equal(fresh(x), rotation(x))
        with pytest.raises(RuntimeError, match="Missing key"):
            fresh.load_state_dict({})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            OnlineRotation(96).load_state_dict(state)


@each_rotation
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(rotation: OnlineRotation, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rotation, fullgraph=True, backend=backend)
    for rows in (2, 5):
        x = random(rows, 96)
        assert torch.equal(compiled(x), rotation(x))


@each_rotation
def test_described_by_its_state(rotation: OnlineRotation) -> None:
    twin = OnlineRotation.from_state(rotation.state())
    assert torch.equal(twin.state(), rotation.state())
    if rotation.signs is None:
        assert repr(twin) == repr(rotation)


def test_repr() -> None:
    assert repr(OnlineRotation(96)) == "OnlineRotation(size=96, group_size=96, order='sequency')"
    rotation = OnlineRotation(96, 4, "natural", 8, signs(96))
    assert repr(rotation) == "OnlineRotation(size=96, group_size=4, order='natural', heads=8, signs=True)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 100}, r"got 100 = 25 \* 4, .* the largest group_size that works is 20"),
        ({"size": 90, "heads": 9}, r"got 9 = 9 \* 1, .* no group_size above 1"),
        ({"size": 96, "heads": 7}, r"heads must divide size, got 7 heads and size 96; pass"),
        ({"size": 96, "heads": 0}, r"heads must divide size, got 0 heads"),
        ({"size": 96, "group_size": 64}, r"group_size must divide size, got group_size 64 and 96; choose"),
        ({"size": 96, "group_size": 0}, r"group_size must divide size, got group_size 0"),
        ({"size": 96, "group_size": 32, "heads": 12}, r"group_size must divide heads, got group_size 32 and 12"),
        ({"size": 0}, r"size must be at least 1, got 0"),
        ({"size": 96, "order": "gray"}, r"order must be one of .* got 'gray'; check the spelling"),
        ({"size": 4, "signs": [1, 1, -1, 1]}, r'signs need order="natural", got "sequency"; signs scatter'),
        ({"size": 4, "order": "natural", "signs": [1, 1, -1]}, r"one for each of 4 entries, got shape \(3,\)"),
        ({"size": 4, "order": "natural", "signs": [1, 0, -1, 1]}, r"\+1 or -1, .* with \[-1, 0, 1\]; pass"),
        ({"size": 2, "order": "natural", "signs": [0.5, 1.0]}, r"\+1 or -1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"OnlineRotation: .*{message}"):
        OnlineRotation(**arguments)


def test_bad_input() -> None:
    rotation = OnlineRotation(96)
    for x in (torch.ones(2, 95), torch.ones(96, 2), torch.tensor(1.0)):
        for function in (rotation, rotation.inverse):
            with pytest.raises(ValueError, match=r"OnlineRotation: x must have 96 features.*\(size\), got shape"):
                function(x)
    with pytest.raises(ValueError, match=r"96 input features \(size\) is needed, got shape \(24, 64\)"):
        rotation.fuse_into(make_linear(64))
    with pytest.raises(ValueError, match=r"96 output features \(size\) is needed, got shape \(24, 96\)"):
        rotation.fuse_into(make_linear(), side="output")
    with pytest.raises(ValueError, match=r"side must be one of \('input', 'output'\), got 'left'; check"):
        rotation.fuse_into(make_linear(), side="left")
    with pytest.raises(TypeError, match=r"only an nn.Linear .* got QuantLinear; fuse before quantizing"):
        rotation.fuse_into(QuantLinear(96, 24))


# ---- QuantLinear(..., input_rotation=...)


@each_rotation
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_layer_rotates_its_input(rotation: OnlineRotation, act_bits: int) -> None:
    linear = make_linear()
    layer = QuantLinear.from_linear(linear, 3, 32, act_bits, input_rotation=rotation)
    by_hand = rotate_inputs(linear, rotation)[1]
    assert torch.equal(layer.dequantize(), quantize_weight(by_hand.weight, 3, 32).dequantize())
    plain = QuantLinear.from_packed(layer.packed_weight(), layer.bias, act_bits)
    x = random(5, 96)
    with torch.no_grad():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(layer(x.to(dtype)), plain(rotation(x.to(dtype))))
    assert layer.input_rotation is rotation


@each_rotation
def test_layer_stands_for_the_linear(rotation: OnlineRotation) -> None:
    linear = make_linear(out_features=200)
    layer = QuantLinear.from_linear(linear, 4, 32, act_bits=16, input_rotation=rotation)
    x = random(50, 96)
    with torch.no_grad():
        y = linear(x)
        assert (layer(x) - y).norm() < 0.1 * y.norm()
        assert (layer(x) - linear(rotation(x))).norm() > y.norm()


def test_gradient_of_a_layer_is_straight_through() -> None:
    rotation = OnlineRotation(96, 32)
    layer = QuantLinear.from_linear(make_linear(), 3, 32, input_rotation=rotation)
    x = random(5, 96).requires_grad_()
    grad_y = random(5, 24, seed=1)
    layer(x).backward(grad_y)
    expected = (grad_y @ layer.dequantize()).double() @ rotation.matrix()
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("levels", ["kmeans", "uniform"])
@pytest.mark.parametrize("act_bits", [4, 16])
def test_order_inside_a_quantization_group_does_not_matter_to_rounding(levels: str, act_bits: int) -> None:
    """With the group of the rotation that of the weight, both orders give the same columns in another order.

    Rounding to nearest sees each column by itself, so the layers are the same function; only a quantizer that depends
    on the order of columns (GPTQ) can tell them apart. With integer activations even the bits are the same.
    """
    linear = make_linear(192)
    walsh, natural = (
        QuantLinear.from_linear(linear, 2, 64, act_bits, levels, input_rotation=OnlineRotation(192, 64, order))
        for order in ("sequency", "natural")
    )
    permutation = torch.cat([torch.argsort(walsh_order(64)) + 64 * i for i in range(3)])
    assert torch.equal(walsh.dequantize()[:, permutation], natural.dequantize())
    x = random(9, 192)
    if act_bits == 4:
        assert torch.equal(walsh(x), natural(x))
    else:
        torch.testing.assert_close(walsh(x), natural(x), rtol=1e-5, atol=1e-5)
    # Over the whole row the groups hold other columns in each order, and the layers differ.
    walsh, natural = (
        QuantLinear.from_linear(linear, 2, 64, act_bits, levels, input_rotation=OnlineRotation(192, order=order))
        for order in ("sequency", "natural")
    )
    assert not torch.allclose(walsh(x), natural(x), rtol=1e-2, atol=1e-2)


def walsh_order(size: int) -> torch.Tensor:
    return (OnlineRotation(size).matrix() @ OnlineRotation(size, order="natural").matrix().T).argmax(1)


def make_layer(rotation: OnlineRotation | None, **keywords) -> QuantLinear:
    return QuantLinear.from_linear(make_linear(), 2, 32, input_rotation=rotation, **keywords)


def same_function(a: QuantLinear, b: QuantLinear) -> bool:
    with torch.no_grad():
        return torch.equal(a(random(5, 96)), b(random(5, 96)))


@each_rotation
def test_state_dict_of_a_layer(rotation: OnlineRotation, tmp_path) -> None:
    layer = make_layer(rotation)
    state = layer.state_dict()
    names = {"bias", "codes", "format", "levels", "rotation", "scales", "tensor_scale"}
    assert set(state) == names | (set() if rotation.signs is None else {"input_rotation.signs"})
    assert torch.equal(state["rotation"], rotation.state())
    save_file(state, tmp_path / "layer.safetensors")
    own_signs = None if rotation.signs is None else torch.ones(96)
    own = OnlineRotation(96, rotation.group_size, rotation.order, rotation.heads, own_signs)
    fresh = QuantLinear(96, 24, group_size=32, input_rotation=own)
    assert not same_function(fresh, layer)
    fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert same_function(fresh, layer)


@pytest.mark.parametrize("strict", [True, False])
def test_loading_another_rotation_fails(strict: bool) -> None:
    def fails(message: str, stored: dict, own: OnlineRotation | None) -> None:
        fresh = QuantLinear(96, 24, group_size=32, input_rotation=own)
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(stored, strict=strict)
        assert not bool(fresh.dequantize().any())  # a weight for another input is not taken over

    stored = make_layer(OnlineRotation(96, 32)).state_dict()
    described = r"OnlineRotation\(size=96, group_size=32, order='sequency'\)"
    fails(rf"input_rotation of the stored weight must be the layer's, none, got {described}; construct", stored, None)
    for own in (OnlineRotation(96), OnlineRotation(96, 32, "natural"), OnlineRotation(96, 12, heads=12)):
        fails(rf"must be the layer's, OnlineRotation\(.*\), got {described}; construct", stored, own)
    plain = make_layer(None).state_dict()
    fails(rf"must be the layer's, {described}, got none; construct", plain, OnlineRotation(96, 32))

    signed = OnlineRotation(96, 32, "natural", signs=signs(96))
    unsigned = OnlineRotation(96, 32, "natural")
    fails(
        r"must be the layer's, .*order='natural'\), got .*, signs=True\); construct",
        make_layer(signed).state_dict(),
        unsigned,
    )
    fails(
        r"must be the layer's, .*, signs=True\), got .*order='natural'\); construct",
        make_layer(unsigned).state_dict(),
        signed,
    )

    own = OnlineRotation(96, 32)
    future = {**stored, "rotation": torch.tensor([2, 96, 32, 1, 0, 5])}
    fails(r"version must be 1, got 2; .*upgrade", future, own)
    for damaged in ([1, 96, 32, 1], [1, 96, 32, 2, 0]):
        fails(
            r"\[version, size, group_size, order, heads\].*damaged", {**stored, "rotation": torch.tensor(damaged)}, own
        )
    fails(r"must be int64 .*, got torch.float32", {**stored, "rotation": torch.ones(5)}, own)
    only = {"rotation": stored["rotation"], "bias": stored["bias"]}
    fails(r"PackedWeight: .* missing codes", only, own)
    fails(r"PackedWeight: .* missing codes", only, None)


def test_a_layer_left_out_of_a_checkpoint() -> None:
    layer = make_layer(OnlineRotation(96, 32))
    names = ["codes", "levels", "scales", "tensor_scale", "format", "rotation"]
    with pytest.raises(RuntimeError, match=", ".join(f'"{name}"' for name in names)):
        layer.load_state_dict({"bias": torch.ones(24)})
    before = layer.dequantize()
    assert sorted(layer.load_state_dict({"bias": torch.ones(24)}, strict=False).missing_keys) == sorted(names)
    assert torch.equal(layer.dequantize(), before)


def saved(layer: QuantLinear) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file
