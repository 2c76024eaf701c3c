"""QuantLinear layers that rotate their input: copies, the meta device, torch.compile and export, refusals."""

import copy
import pickle

import pytest
import torch
from test_online_rotation import each_rotation, make_layer, make_linear, random, same_function, saved, signs
from torch import nn

from rcp_kernels import OnlineRotation, QuantLinear, rotate_inputs
from rcp_kernels.nn import RotatedLinear


@each_rotation
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(saved(m), weights_only=False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_a_layer(rotation: OnlineRotation, clone) -> None:
    layer = make_layer(rotation)
    twin = clone(layer)
    assert same_function(twin, layer)
    assert repr(twin) == repr(layer)
    assert twin.input_rotation is not layer.input_rotation
    assert twin.half()(random(2, 96).half()).dtype == torch.float16


def test_layer_on_the_meta_device() -> None:
    rotation = OnlineRotation(96, 32, "natural", signs=signs(96))
    layer = make_layer(rotation)
    with torch.device("meta"):
        own = OnlineRotation(96, 32, "natural", signs=torch.ones(96))
        meta = QuantLinear(96, 24, group_size=32, input_rotation=own)
    assert own.signs.is_meta
    assert meta(torch.empty((3, 96), device="meta")).shape == (3, 24)
    assert meta.state_dict()["rotation"].tolist() == [1, 96, 32, 0, 0]
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert same_function(meta, layer)


@each_rotation
def test_compiled_layer_is_bit_equal(rotation: OnlineRotation) -> None:
    torch._dynamo.reset()
    layer = make_layer(rotation)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(random(5, 96)), layer(random(5, 96)))


def test_exported_layer_is_bit_equal() -> None:
    layer = make_layer(OnlineRotation(96, 32))
    with torch.no_grad():
        program = torch.export.export(layer, (random(5, 96),))
        assert torch.equal(program.module()(random(5, 96)), layer(random(5, 96)))


def test_a_layer_that_rotates_its_input_takes_no_second_rotation_there() -> None:
    rotation, x = OnlineRotation(96, 32), random(5, 96)
    layer = RotatedLinear.from_linear(make_linear(), rotation)
    expected = layer(x)
    for fold in (lambda: OnlineRotation(96).fuse_into(layer), lambda: rotate_inputs(layer)):
        with pytest.raises(
            ValueError, match=r"with an input_rotation cannot take a rotation of its input, got a RotatedLinear"
        ):
            fold()
    assert torch.equal(layer(x), expected)
    output = OnlineRotation(24)
    output.fuse_into(layer, "output")
    torch.testing.assert_close(layer(x), output(expected))


def test_layer_refuses_what_is_no_rotation_of_its_input() -> None:
    with pytest.raises(ValueError, match=r"input_rotation must have size 96 \(in_features\), got 64; make"):
        QuantLinear(96, 24, input_rotation=OnlineRotation(64))
    with pytest.raises(ValueError, match=r"a weight with 64 input features \(size\) is needed, got shape \(24, 96\)"):
        QuantLinear.from_linear(make_linear(), input_rotation=OnlineRotation(64))
    with pytest.raises(TypeError, match=r"input_rotation must be an OnlineRotation, got Identity; put"):
        QuantLinear(96, 24, input_rotation=nn.Identity())
