"""The 4-bit cache of fixed capacity: its steps compile once, never dequantize, and equal the growing cache's."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rcp_kernels import OnlineRotation, quantize_model

transformers = pytest.importorskip("transformers", reason="QuantizedKVCache is a transformers Cache")

from test_kv_cache import generated, prompts, tiny_model  # noqa: E402

from rcp_kernels.models.hf import cache_argument, position_argument  # noqa: E402
from rcp_kernels.nn import fuse_decoder, kv_layer  # noqa: E402
from rcp_kernels.nn.kv_cache import ATTENTION, QuantizedKVCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

STEPS = 50
FAMILIES = [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 8})]


@pytest.fixture(autouse=True)
def forget_compilations():
    yield
    torch._dynamo.reset()  # later tests count their own compilations


@pytest.fixture
def dequantized(monkeypatch):
    """A list that grows by one with each call that dequantizes the cache."""
    calls = []
    original = kv_layer.kv_cache_dequantize

    def call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(kv_layer, "kv_cache_dequantize", call)
    return calls


def decode_compiled(model, backend, dequantized):
    """Compare compiled steps on the static cache with eager steps on the growing one."""
    model.set_attn_implementation(ATTENTION)
    ids = prompts(2, 20, 0)["input_ids"].to(model.device)
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, fullgraph=True, backend=counter)
    growing = QuantizedKVCache(model.config)
    static = QuantizedKVCache(model.config, capacity=20 + STEPS, static=True)
    with torch.inference_mode():
        token = model(ids, **cache_argument(model, growing)).logits[:, -1:].argmax(-1)
        model(ids, **cache_argument(model, static))
        dequantized.clear()
        for i in range(STEPS):
            expected = model(token, **cache_argument(model, growing)).logits
            position = position_argument(model, torch.tensor([[20 + i]], device=model.device))
            found = step(input_ids=token, **position, **cache_argument(model, static)).logits
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            token = expected[:, -1:].argmax(-1)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert dequantized == []
    assert int(static.get_seq_length()) == growing.get_seq_length() == 20 + STEPS
    return static


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_one_compilation_serves_fifty_tokens(device, family, changes, dequantized):
    model = tiny_model(16, family, **changes).to(device)
    static = decode_compiled(model, "inductor" if device.type == "cuda" else "aot_eager", dequantized)
    assert static.layers[0].storage.key_codes.device == static.get_seq_length().device == device
    token = torch.zeros(2, 1, dtype=torch.int64, device=device)
    with torch.inference_mode():
        if device.type == "cuda":
            assert model(token, **cache_argument(model, static)).logits.isnan().all()
        else:
            with pytest.raises(ValueError, match=r"must be 1 to 70, got 71.*larger capacity"):
                model(token, **cache_argument(model, static))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fused_layers(device, family, dequantized):
    model = tiny_model(16, family, hidden_size=64)
    quantize_model(model, bits=4, group_size=32, act_bits=16, skip=("lm_head",))
    fuse_decoder(model)
    decode_compiled(model.to(device), "aot_eager", dequantized)


def test_inductor_on_the_cpu(dequantized):
    decode_compiled(tiny_model(16), "inductor", dequantized)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", ATTENTION])
def test_generate_of_transformers(implementation):
    """A batch with left padding, under any attention."""
    model = tiny_model(16)
    expected, logits = generated(model, QuantizedKVCache(model.config), implementation)
    static = QuantizedKVCache(model.config, capacity=44, static=True)
    found, found_logits = generated(model, static, implementation)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)


def test_beams():
    model = tiny_model(16)
    expected, _ = generated(model, QuantizedKVCache(model.config), ATTENTION, num_beams=3, max_new_tokens=8)
    static = QuantizedKVCache(model.config, capacity=40, static=True)
    found, _ = generated(model, static, ATTENTION, num_beams=3, max_new_tokens=8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [3, 17])
def test_a_prompt_in_pieces_with_a_rotation(chunk):
    model = tiny_model(16)
    model.set_attn_implementation(ATTENTION)
    ids = prompts(1, 40)["input_ids"]
    rotation = OnlineRotation(16)
    found = []
    with torch.inference_mode():
        for static in (False, True):
            cache = QuantizedKVCache(model.config, capacity=64, key_rotation=rotation, static=static)
            pieces = [model(piece, **cache_argument(model, cache)).logits for piece in ids.split(chunk, dim=1)]
            found.append(torch.cat(pieces, 1))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_crop_and_reset_count_once():
    """All layers share one length: cropping the cache does not crop once a layer."""
    x = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    cache = QuantizedKVCache(capacity=8, static=True)
    for layer in range(3):
        cache.update(x, x, layer)
    assert [layer.length for layer in cache.layers] == [6, 6, 6]
    cache.crop(-2)
    assert int(cache.get_seq_length()) == 4
    for layer in range(3):
        cache.update(x[:, :, :1], x[:, :, 1:2], layer)
    assert [layer.length for layer in cache.layers] == [5, 5, 5]
    keys, values = cache.dequantize(2)
    growing = QuantizedKVCache()
    expected = growing.update(torch.cat([x[:, :, :4], x[:, :, :1]], 2), torch.cat([x[:, :, :4], x[:, :, 1:2]], 2), 0)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert cache.layers[0].get_max_length() == 8


def test_growing_storage_doubles():
    cache, x = QuantizedKVCache(capacity=4), torch.ones(1, 1, 3, 8)
    sizes = []
    for _ in range(6):
        cache.update(x, x, 0)
        sizes.append(cache.layers[0].storage.key_codes.shape[2])
    assert sizes == [4, 8, 16, 16, 16, 32]


@pytest.mark.parametrize("tokens", [3, 16, 17])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", {"sliding_window": 8})])
def test_a_padded_prompt_of_few_tokens(family, changes, tokens):
    """The first mask has the width of the prompt, later masks that of the capacity."""
    model = tiny_model(16, family, **changes)
    prompt = prompts(2, tokens, 2)
    expected, _ = generated(model, QuantizedKVCache(model.config), ATTENTION, prompt)
    found, _ = generated(model, QuantizedKVCache(model.config, capacity=64, static=True), ATTENTION, prompt)
    assert torch.equal(found, expected)
