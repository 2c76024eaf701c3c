"""Public functions and classes on a device that is not the CPU: the CPU's codes, and no tensor left behind."""

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from rotated_models import IDS, logits, make_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import rcp_kernels.integrations.transformers
from rcp_kernels import QuantLinear, quantize_model, quantize_weight
from rcp_kernels.checkpoint import QuantizationConfig, load_quantized, save_quantized, verify
from rcp_kernels.evaluation.perplexity import perplexity
from rcp_kernels.methods.gptq import gptq_quantize_weight
from rcp_kernels.methods.ldp import LearnableDirectPartitioning
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.methods.student import export_student, make_student
from rcp_kernels.methods.uniform import UniformQuantizer

assert rcp_kernels.integrations.transformers


@pytest.fixture
def weight():
    return torch.randn(24, 128, generator=torch.Generator().manual_seed(0))


def equal(found, expected):
    """Two packed weights: the same integers, and scales up to float sums."""
    found, expected = found.state_dict(""), expected.state_dict("")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name].cpu(), tensor, rtol=2e-3, atol=0)
        else:
            assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("levels", ["uniform", "clip", "kmeans"])
def test_weights_round_to_the_same_codes(device, weight, levels):
    found = quantize_weight(weight.to(device), 3, 64, levels)
    assert found.codes.device == device
    equal(found, quantize_weight(weight, 3, 64, levels))
    hessian = torch.eye(128) + 0.1
    here = gptq_quantize_weight(weight, hessian, bits=3, group_size=64, levels=levels)
    equal(gptq_quantize_weight(weight.to(device), hessian.to(device), bits=3, group_size=64, levels=levels), here)


@pytest.mark.parametrize("form", [LearnableDirectPartitioning, UniformQuantizer])
@pytest.mark.parametrize("init", ["init_uniform", "init_clip_search"])
def test_quantizers_train_and_export_there(device, weight, form, init):
    found = {}
    for where in (torch.device("cpu"), device):
        w = nn.Parameter(weight.to(where, copy=True))
        quantizer = form(weight.shape, 2, 64, device=where)
        getattr(quantizer, init)(w.detach())
        optimizer = torch.optim.AdamW([w, *quantizer.parameters()], lr=1e-3)
        quantizer(w).square().sum().backward()
        assert all(parameter.grad.device == where for parameter in quantizer.parameters())
        optimizer.step()
        found[where] = quantizer.export(w.detach())
    equal(found[device], found[torch.device("cpu")])


def test_a_student_is_made_measured_and_exported_there(device):
    found = {}
    for where in (torch.device("cpu"), device):
        model = make_model("llama").to(where)
        make_student(model, bits=2, group_size=32, act_bits=4)
        value = perplexity(model, IDS.flatten(), 8)
        export_student(model)
        assert {parameter.device for parameter in model.parameters()} == {where}
        found[where.type] = value, logits(model.to("cpu"))
    assert found[device.type][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    torch.testing.assert_close(found[device.type][1], found["cpu"][1], rtol=1e-3, atol=1e-3)


def test_a_model_of_the_device_is_saved_and_loaded_there(device, tmp_path):
    """The directory is the CPU's."""
    for where in (torch.device("cpu"), device):
        model = make_model("llama").to(where)
        rotated = rotate_model(model, "gsr", group_size=32)
        quantize_model(model, 3, 32, 4)
        save_quantized(model, tmp_path / where.type, QuantizationConfig(3, 32, 4, rotation=rotated))
        verify(tmp_path / where.type)
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", device.type))
    assert set(there) == set(here)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, rtol=2e-3, atol=1e-5)
    expected = logits(load_quantized(tmp_path / device.type)[0])
    for loaded in (
        load_quantized(tmp_path / device.type, device)[0],
        AutoModelForCausalLM.from_pretrained(tmp_path / device.type, device_map={"": device}),
    ):
        assert {tensor.device for tensor in (*loaded.parameters(), *loaded.buffers())} == {device}
        with torch.no_grad():
            found = loaded(IDS.to(device)).logits.cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_layers_move_between_devices(device, weight):
    layer = QuantLinear.from_packed(quantize_weight(weight, 4, 64), act_bits=8)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    expected = layer(x)
    moved = nn.Sequential(copy.deepcopy(layer)).to(device)
    torch.testing.assert_close(moved(x.to(device)).cpu(), expected)
    assert torch.equal(moved.to("cpu")(x), expected)
    with pytest.raises((ValueError, RuntimeError), match="device"):
        layer.to(device)(x)
