"""torch.compile, torch.export and AOTInductor of whole quantized language models, rotations and caches included."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

from rotated_models import IDS, make_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import StaticCache

from rcp_kernels import quantize_model
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.models.hf import cache_argument


def quantized(act_bits):
    """Two layers with biases, R1 and R2 in the weights, R3 after RoPE and R4 before down."""
    model = make_model("llama")
    rotate_model(model, "gsr", group_size=32)
    quantize_model(model, 3, 32, act_bits)
    return model


@torch.no_grad()
def decode(model, forward, steps):
    """Logits of some steps after a prompt, each with a token of its own, by a static cache."""
    cache = StaticCache(model.config, max_cache_len=32)
    model(input_ids=IDS, **cache_argument(model, cache))
    found = []
    for step in range(steps):
        position = IDS.shape[1] + step
        token = torch.full((2, 1), 7 + step)
        out = forward(
            input_ids=token,
            position_ids=torch.tensor([[position]]),
            attention_mask=None,
            **cache_argument(model, cache),
        )
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decode_is_one_graph_compiled_once(backend):
    # Attention's sums come in another order, after which a quantized activation could round to the next code.
    model = quantized(act_bits=16)
    expected = decode(model, model, 6)
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    found = decode(model, torch.compile(model, fullgraph=True, backend=counter), 6)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_is_exported_saved_and_loaded(tmp_path):
    model = quantized(act_bits=4)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    tokens = torch.export.Dim("tokens", min=2, max=32)
    with torch.no_grad():
        program = torch.export.export(Logits(), (IDS,), dynamic_shapes={"ids": {1: tokens}})
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for ids in (IDS, IDS[:, :5]):
            assert torch.equal(loaded(ids), model(input_ids=ids, use_cache=False).logits)


@pytest.mark.slow
@pytest.mark.slow
def test_aot_inductor_runs_what_was_compiled(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 48), nn.LayerNorm(48)).eval()
    quantize_model(model, 2, 32, 16)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    x = torch.randn(5, 96)
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=({0: tokens},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = torch._inductor.aoti_load_package(path)
        for rows in (5, 33):
            x = torch.randn(rows, 96)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
