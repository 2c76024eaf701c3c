"""Loading a quantized directory to a device places packed layers only, never their float weights."""

import pytest
import torch
import transformers
from emulated_device import extension

from rcp_kernels import quantize_model
from rcp_kernels.checkpoint import QuantizationConfig, load_quantized, save_quantized


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_model(model, 2, 128, 4)
    save_quantized(model, tmp_path / "model", QuantizationConfig(2, 128, 4))
    return tmp_path / "model", model


def load_ours(directory, device):
    return load_quantized(directory, device)[0]


def load_by_transformers(directory, device):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, device_map={"": device})


@pytest.mark.parametrize("load", [load_ours, load_by_transformers])
def test_no_float_layer_is_placed(load, saved, device):
    if device.type != "emulated":
        pytest.skip("counted to the byte on the emulated device only")
    directory, model = saved
    before = extension().memory_allocated()
    extension().reset_peak_memory_stats()
    loaded = load(directory, device)
    peak = extension().max_memory_allocated() - before
    tensors = [*loaded.state_dict().values()]
    assert {tensor.device for tensor in [*loaded.parameters(), *loaded.buffers()]} == {device}
    assert peak <= 1.1 * (directory / "model.safetensors").stat().st_size + max(tensor.nbytes for tensor in tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].cpu(), tensor), name
