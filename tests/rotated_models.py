"""Tiny models of every family with nothing left at its default: gains, biases, tied heads, grouped queries."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5")

# hidden 96 = 12 * 8 and 160 = 20 * 8 are no powers of two; groups of 32 divide them and every intermediate size.
_COMMON = {
    "vocab_size": 61,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHAPES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}, (96, 160, 3, 1, 32), False),
    "llama_tied": ("Llama", {}, (160, 192, 4, 2, 40), True),
    "mistral": ("Mistral", {"sliding_window": 5}, (96, 224, 4, 2, 24), False),
    "qwen2": ("Qwen2", {}, (160, 96, 5, 5, 32), True),
    "qwen3": ("Qwen3", {"attention_bias": True}, (96, 192, 4, 2, 32), True),
    "gemma": ("Gemma", {}, (96, 192, 2, 1, 32), True),
    "gemma2": ("Gemma2", {"sliding_window": 5, "query_pre_attn_scalar": 32}, (96, 192, 4, 2, 32), True),
    "gemma3_text": ("Gemma3Text", {"sliding_window": 5, "query_pre_attn_scalar": 32}, (96, 160, 4, 1, 32), True),
}
NAMES = tuple(_SHAPES)
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3], [2, 7, 18, 28, 18, 28, 45, 9, 4, 52, 3, 5]])


def make_config(name: str):
    family, extra, (hidden, intermediate, heads, kv_heads, head_dim), tied = _SHAPES[name]
    return getattr(transformers, f"{family}Config")(
        **_COMMON,
        **extra,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
    )


def make_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make_config(name)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # gains and biases, which start as constants
                parameter += 0.5 * torch.randn_like(parameter)
                assert "norm" in parameter_name or "bias" in parameter_name
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def difference(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest difference between logits, relative to the largest logit."""
    return float((after - before).detach().abs().max() / before.detach().abs().max())


def random_rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
