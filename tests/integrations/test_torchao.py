"""torchao's own quantize_ on models of this package's layers."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rcp_kernels
from rcp_kernels import extras
from rcp_kernels.nn import OnlineRotation, QuantLinear, RotatedLinear

pytest.importorskip("torchao")

from torchao.quantization import FqnToConfig, quantize_

from rcp_kernels.integrations.torchao import RcpWeightConfig


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Sequential(nn.Linear(40, 33, bias=False)), nn.LayerNorm(33))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("group_size", "act_bits", "levels"), [(32, 16, "kmeans"), (-1, 8, "uniform"), (128, 4, "kmeans")]
)
def test_linear_layers_become_what_from_linear_makes(bits, group_size, act_bits, levels):
    quantized, reference = model().eval(), model().eval()
    quantize_(quantized, RcpWeightConfig(bits, group_size, act_bits, levels, act_clip=0.9))
    for parent, name in ((reference, "0"), (reference[2], "0")):
        linear = getattr(parent, name)
        size = linear.in_features if group_size == -1 else group_size
        setattr(parent, name, QuantLinear.from_linear(linear, bits, size, act_bits, levels, act_clip=0.9).eval())
    assert repr(quantized) == repr(reference)
    x = torch.randn(5, 96)
    assert torch.equal(quantized(x), reference(x))
    state = quantized.state_dict()
    assert state.keys() == reference.state_dict().keys()
    again = copy.deepcopy(quantized)
    again.load_state_dict(state)
    assert torch.equal(again(x), quantized(x))
    assert not any(module.training for module in quantized.modules())


def test_the_model_itself_and_shared_layers():
    linear = nn.Linear(64, 8)
    values = linear.weight.detach().clone()
    quantize_(linear, RcpWeightConfig(bits=3, group_size=64))
    assert isinstance(linear, QuantLinear)
    expected = rcp_kernels.quantize_weight(values, 3, 64).dequantize()
    assert torch.equal(linear.dequantize(), expected)
    shared = nn.Linear(32, 32)
    tied = nn.ModuleDict({"a": shared, "b": shared, "c": nn.ModuleList([shared])})
    quantize_(tied, RcpWeightConfig(bits=4, group_size=32))
    assert tied["a"] is tied["b"] is tied["c"][0]
    assert isinstance(tied["a"], QuantLinear)


def test_a_filter_and_names_choose_the_layers():
    chosen = model()
    quantize_(chosen, RcpWeightConfig(), filter_fn=lambda module, name: name == "2.0")
    assert type(chosen[0]) is nn.Linear
    assert isinstance(chosen[2][0], QuantLinear)
    chosen = model()
    quantize_(chosen, FqnToConfig({"0": RcpWeightConfig(bits=2), r"re:2\.\d": RcpWeightConfig(bits=4)}), filter_fn=None)
    assert (chosen[0].bits, chosen[2][0].bits) == (2, 4)


def test_a_rotated_layer_keeps_its_rotation():
    rotation = OnlineRotation(64, group_size=64)
    linear = nn.Linear(64, 16)
    layers = nn.Sequential(RotatedLinear.from_linear(linear, rotation))
    weight = linear.weight.detach().clone()
    quantize_(layers, RcpWeightConfig(bits=4, group_size=64))
    assert layers[0].input_rotation is rotation
    x = torch.randn(3, 64)
    plain = QuantLinear.from_packed(rcp_kernels.quantize_weight(weight, 4, 64), linear.bias, act_bits=16)
    assert torch.equal(layers(x), QuantLinear.from_packed(plain.packed_weight(), linear.bias, 16, 1.0, rotation)(x))


def test_other_modules_and_wrong_settings_are_refused():
    class Adapted(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear, got Adapted"):
        quantize_(nn.Sequential(Adapted(32, 32)), RcpWeightConfig(group_size=32))
    hooked = nn.Linear(32, 32)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="with 1 hooks; leave it out by quantize_"):
        quantize_(nn.Sequential(hooked), RcpWeightConfig(group_size=32))
    for config, message in (
        (RcpWeightConfig(bits=5), "bits must be one of"),
        (RcpWeightConfig(group_size=48), "group_size must be one of"),
        (RcpWeightConfig(act_bits=6), "act_bits must be one of \\(4, 8, 16\\)"),
        (RcpWeightConfig(levels="nf4"), "levels must be one of"),
    ):
        layers = model()
        with pytest.raises(ValueError, match=message):
            quantize_(layers, config)
        assert type(layers[0]) is nn.Linear


def test_a_missing_torchao_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    monkeypatch.delitem(sys.modules, "rcp_kernels.integrations.torchao")
    with pytest.raises(extras.MissingExtra, match="not installed: torchao; run: pip install torchao"):
        importlib.import_module("rcp_kernels.integrations.torchao")


def test_a_compiled_model_gives_the_same():
    layers = model().eval()
    quantize_(layers, RcpWeightConfig(bits=4, group_size=32, act_bits=8))
    x = torch.randn(4, 96)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layers(x), rtol=0, atol=0)


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/integrations/torchao.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "torchao.md", "exec"), {})
