"""A model that is quantized already, and one whose weights are not in memory, are refused by name."""

import pytest
import torch
from torch import nn

from rcp_kernels import QuantLinear, quantize_model
from rcp_kernels.methods.gptq import gptq_quantize_model

transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gptq(model: nn.Module) -> None:
    gptq_quantize_model(model, IDS, bits=4, group_size=32)


@pytest.mark.parametrize("first", [gptq, lambda model: quantize_model(model, 4, 32)], ids=["gptq", "rtn"])
def test_quantizing_twice_says_so(first) -> None:
    model = tiny()
    first(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="1 linear layers to be kept, but 14 QuantLinear: it is quantized already"):
        quantize_model(model, 4, 32)
    with pytest.raises(ValueError, match=r"q_proj must be an nn.Linear, got QuantLinear, which is quantized already"):
        gptq(model)
    with pytest.raises(TypeError, match=r"linear must be an nn.Linear, got QuantLinear, which is quantized already"):
        QuantLinear.from_linear(model.model.layers[0].mlp.up_proj)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # What the first pass kept may still be quantized by a second one.
    assert [layer.name for layer in quantize_model(model, 4, 32, skip=()).layers] == ["lm_head"]


@pytest.mark.parametrize("how", ["meta", "cpu", "disk"])
def test_gptq_refuses_weights_that_are_not_in_memory(how: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, name = tiny(), r"model\.embed_tokens\.weight"
    if how == "meta":
        model.to("meta")
    elif how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        name = r"model\.layers\.1\.self_attn\.q_proj\.weight"
        places = dict.fromkeys(
            ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu"
        )
        accelerate.dispatch_model(model, {**places, "model.layers.1": "disk"}, "cpu", offload_dir=str(tmp_path))
    expected = None if how == "meta" else model(IDS).logits
    with pytest.raises(ValueError, match=rf"{name} must have values, got a parameter on the meta device, where acc"):
        gptq(model)
    if expected is not None:
        assert torch.equal(model(IDS).logits, expected)


def test_gptq_keeps_a_forward_that_hooks_have_put_there() -> None:
    """accelerate wraps ``forward`` of each module it has hooks in; an error must leave these as they were."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = tiny(), tiny()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    wrapped = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert sum(forward is not None for forward in wrapped.values()) == 15

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq_quantize_model(model, IDS, bits=4, group_size=32, progress=stop)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == wrapped
    gptq(model)
    gptq(plain)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
