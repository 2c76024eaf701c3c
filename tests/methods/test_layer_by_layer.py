"""Models larger than the device: one decoder layer at a time, the results of the CPU, and the memory that it takes."""

import copy
import sys

import pytest
import torch
import transformers
from emulated_device import extension

from rcp_kernels import quantize_model
from rcp_kernels.methods.gptq import gptq_quantize_model
from rcp_kernels.methods.gptq.memory import device_bytes as gptq_bytes
from rcp_kernels.methods.laquant import LaquantConfig, laquant_quantize_model
from rcp_kernels.methods.laquant.memory import device_bytes as laquant_bytes
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.methods.rotate.rotate_model import device_bytes as rotate_bytes
from rcp_kernels.models import describe
from rcp_kernels.nn.quantize_model import device_bytes as rtn_bytes

# The package has a function of this name.
rotate_module = sys.modules["rcp_kernels.methods.rotate.rotate_model"]
IDS = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(0))
LAQUANT = LaquantConfig(bits=3, group_size=32, epochs=1, batch_size=2)


def tiny(layers=2, hidden=64, intermediate=96, **kwargs):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        # torch's fused attention takes another route on the CPU than elsewhere.
        attn_implementation="eager",
        **kwargs,
    )
    return transformers.LlamaForCausalLM(config).eval()


def rtn(model, device=None, **_):
    quantize_model(model, 2, 32, device=device)


def gptq(model, device=None, ids=IDS, **budget):
    gptq_quantize_model(model, ids, bits=2, group_size=32, act_bits=4, kv_bits=4, device=device, **budget)


def laquant(model, device=None, ids=IDS, **budget):
    laquant_quantize_model(model, ids, LAQUANT, device=device, **budget)


METHODS = {"rtn": rtn, "gptq": gptq, "laquant": laquant}


def assert_same(model, other):
    """The same tensors, on the CPU."""
    tensors, others = model.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert others[name].device.type == "cpu", name
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("rotation", ["gsr", "hadamard"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_on_the_device_is_that_of_the_cpu(rotation, tied, device, emulated_only):
    model = tiny(tie_word_embeddings=tied, attention_bias=True)
    other = copy.deepcopy(model)
    records = [rotate_model(each, rotation, group_size=32, device=on) for each, on in ((model, None), (other, device))]
    assert records[0] == records[1]
    assert_same(model, other)


@pytest.mark.parametrize("budget", [None, 1 << 30])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_the_cpu_is_quantized_on_the_device(method, budget, device, emulated_only):
    model = tiny(attention_bias=True)
    if method != "laquant":
        rotate_model(model, "gsr", group_size=32)
    other = copy.deepcopy(model)
    METHODS[method](model)
    METHODS[method](other, device, ids=IDS.to(device) if budget else IDS, device_budget=budget)
    assert_same(model, other)


@pytest.mark.parametrize("method", METHODS)
def test_the_device_holds_one_layer(method, device, emulated_only):
    peaks = [peak(METHODS[method], tiny(layers, 128, 256), device) for layers in (2, 8)]
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 704), (512, 512)])
def test_gptq_takes_the_stated_memory(hidden, intermediate, device, emulated_only):
    model = tiny(2, hidden, intermediate)
    expected = gptq_bytes(describe(model), *IDS.shape)
    assert peak(gptq, model, device) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("levels", ["uniform", "clip", "kmeans"])
def test_rounding_to_nearest_takes_the_stated_memory(levels, device, emulated_only):
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1536))
    found = peak(lambda model, device: quantize_model(model, 2, levels=levels, device=device), model, device)
    assert found == pytest.approx(rtn_bytes(1024 * 1536, levels), rel=0.1)


@pytest.mark.parametrize("rotation", ["gsr", "hadamard"])
@pytest.mark.parametrize("part", [1 << 24, 1 << 13])
def test_a_rotation_takes_the_stated_memory(rotation, part, device, emulated_only, monkeypatch):
    monkeypatch.setattr(rotate_module, "_PART_WEIGHTS", part)
    model = tiny(2, 256, 768)
    found = peak(lambda model, device: rotate_model(model, rotation, group_size=64, device=device), model, device)
    assert found == pytest.approx(rotate_bytes(describe(model), 97, rotation), rel=0.1)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_laquant_takes_the_stated_memory(lookahead, device, emulated_only):
    model = tiny(2, 256, 704)
    config = LaquantConfig(group_size=64, epochs=1, batch_size=4, lookahead=lookahead)
    expected = laquant_bytes(describe(model), config, IDS.shape[1])
    found = peak(lambda model, device: laquant_quantize_model(model, IDS, config, device=device), model, device)
    assert found == pytest.approx(expected, rel=0.1)


def test_shapes_are_those_of_the_modules():
    model = tiny()
    architecture = describe(model)
    layer = vars(architecture.layers[0])
    for part, shape in architecture.shapes.items():
        assert tuple(model.get_submodule(layer[part]).weight.shape) == shape
    assert architecture.layer_weights == sum(
        model.get_submodule(name).weight.numel() for name in architecture.layers[0].linears
    )


@pytest.fixture
def emulated_only(device):
    if device.type != "emulated":
        pytest.skip("bit for bit and to the byte on the emulated device only")


def peak(method, model, device):
    """Bytes on the device at the peak, beyond those before the call."""
    before = extension().memory_allocated()
    extension().reset_peak_memory_stats()
    method(model, device)
    assert extension().memory_allocated() - before < 1 << 14  # tables of the transforms are cached
    return extension().max_memory_allocated() - before
