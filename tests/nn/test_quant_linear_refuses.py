"""QuantLinear on the meta device, with bad arguments and with bad input."""

import copy
import dataclasses
import pickle

import pytest
import torch
from test_quant_linear import _saved, make_layer, same_function
from torch import nn

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops, quantize_weight
from rcp_kernels.nn import RotatedLinear


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
