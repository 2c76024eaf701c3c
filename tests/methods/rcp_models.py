"""A tiny model, its text and its training for the tests of RCP."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from rcp_kernels.methods import rcp
from rcp_kernels.methods.rcp.block_reconstruction import BlockConfig
from rcp_kernels.methods.rotate import rotate_model

VOCABULARY = 96


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


CONFIG = rcp.RcpConfig(
    group_size=32,
    blocks=BlockConfig(sequences=4, epochs=1, batch=2),
    steps=6,
    batch=4,
    micro_batch=2,
    warmup=2,
    validate_every=3,
    checkpoint_every=2,
    bf16=False,
)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with torch.no_grad():  # large weights make activations and attention clearly nonlinear
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model.eval()


def rotated_tiny_model(rotation, **options):
    model = tiny_model()
    rotate_model(model, rotation, group_size=32, **options)
    return model


def tiny_windows(count=12, seed=1, length=16):
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def student_values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
