"""The 4-bit key-value cache: operators against references, and models that decode on it against fake quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rcp_kernels import OnlineRotation, ops

transformers = pytest.importorskip("transformers", reason="QuantizedKVCache is a transformers Cache")

from rcp_kernels.models.hf import cache_argument  # noqa: E402
from rcp_kernels.nn.kv_cache import ATTENTION, QuantizedKVCache  # noqa: E402

# No call of ours uses a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ISAS = range(min(torch.ops.rcp_kernels.cpu_isa_supported(), 2) + 1)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(keys: torch.Tensor, values: torch.Tensor, capacity: int, clip: float = 1.0) -> ops.KVStorage:
    """Caches of keys and values; what is beyond them would read as NaN."""
    storage = []
    for x in (keys, values):
        batch, heads, _, head_dim = x.shape
        codes, scales = ops.empty_kv_cache(batch, heads, capacity, head_dim)
        codes.fill_(0xFF)
        scales.fill_(float("nan"))
        ops.kv_cache_append(x, codes, scales, 0, clip)
        storage += [codes, scales]
    return ops.KVStorage(*storage)


# --- the operators


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("head_dim", [1, 7, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("clip", [1.0, 0.95])
def test_append_is_the_reference_and_fake_quantize(head_dim, dtype, clip):
    x = (random(2, 70, 3, head_dim) + 0.3).to(dtype).transpose(1, 2)
    codes, scales = ops.empty_kv_cache(2, 3, 100, head_dim)
    expected = [codes.clone(), scales.clone()]
    ops.reference.kv_cache_append(x, *expected, 20, clip)
    for isa in ISAS:
        before = torch.ops.rcp_kernels.set_cpu_isa(isa)
        try:
            codes.fill_(0)
            ops.kv_cache_append(x, codes, scales, 20, clip)
            read = ops.kv_cache_dequantize(codes, scales, 90, head_dim, dtype)
        finally:
            torch.ops.rcp_kernels.set_cpu_isa(before)
        assert torch.equal(codes, expected[0])
        assert torch.equal(scales, expected[1])
        assert torch.equal(read[:, :, 20:], ops.fake_quantize_kv(x, 4, clip))
        assert torch.equal(read, ops.reference.kv_cache_dequantize(codes, scales, 90, head_dim, dtype))


@given(st.integers(2, 8), st.integers(1, 100), st.floats(-5, 5), st.integers(-5, 3), st.integers(0, 2**31))
def test_fake_quantize_is_within_half_a_step(bits, head_dim, shift, exponent, seed):
    x = (random(4, head_dim, seed=seed) + shift) * 10.0**exponent
    step = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / (2**bits - 1)
    # float16 rounds the step by 2**-11 and the zero-point by as much of up to 2**bits - 1 steps.
    assert ((ops.fake_quantize_kv(x, bits) - x).abs() <= step * (0.5 + 2**bits * 2.0**-11) + 2.0**-17).all()


def test_fake_quantize_of_degenerate_vectors():
    for value in (0.0, -0.0, 1e-40, 1e-9):
        assert (ops.fake_quantize_kv(torch.full((3, 8), value)).abs() <= 2.0**-20).all()
    for value in (3.3, -3.3, 1e4):
        torch.testing.assert_close(
            ops.fake_quantize_kv(torch.full((3, 8), value)), torch.full((3, 8), value), rtol=1e-3, atol=0
        )
    assert ops.fake_quantize_kv(torch.ones(2, 0)).shape == (2, 0)
    assert ops.fake_quantize_kv(torch.tensor([float("nan"), 1.0])).isnan().all()


def test_fake_quantize_gradient_is_straight_through():
    x = random(3, 16).requires_grad_()
    grad = random(3, 16, seed=1)
    ops.fake_quantize_kv(x, 4, 0.5).backward(grad)
    assert torch.equal(x.grad, grad)


def test_append_bumps_the_version():
    codes, scales = ops.empty_kv_cache(1, 1, 2, 4)
    ops.kv_cache_append(random(1, 1, 1, 4), codes, scales, 0)
    assert codes._version == scales._version == 1


@settings(max_examples=25)
@given(data=st.data())
def test_attention_is_the_reference(data):
    batch, kv_heads, groups, queries = (data.draw(st.integers(1, n)) for n in (3, 3, 5, 3))
    head_dim = data.draw(st.sampled_from([1, 33, 64, 80, 96, 128, 256]))
    length = queries + data.draw(st.integers(0, 600))
    dtype, causal = data.draw(st.sampled_from(FLOATS)), data.draw(st.booleans())
    window, seed = data.draw(st.sampled_from([0, 0, 1, 300])), data.draw(st.integers(0, 2**31))
    kv = [random(batch, kv_heads, length, head_dim, seed=seed + i) for i in range(2)]
    storage = filled(*kv, length + data.draw(st.integers(0, 2)))
    query = random(batch, queries, kv_heads * groups, head_dim, dtype=dtype, seed=seed + 2).transpose(1, 2)
    mask = None
    if data.draw(st.booleans()):
        mask = random(data.draw(st.sampled_from([1, batch])), 1, queries, length, seed=seed + 3) < 0.5
        mask[0, :, 0] = False
    arguments = (storage, length, head_dim**-0.5, causal, window, mask)
    out = ops.kv_cache_attention(query, *arguments)
    assert out.dtype == dtype
    error = (out.double() - ops.reference.kv_cache_attention(query, *arguments)).abs().max()
    assert error <= {torch.float32: 3e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype] * 4
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(out, ops.kv_cache_attention(query, *arguments))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_is_within_the_bound_of_the_float_cache(head_dim):
    """Keys and values are off by half a step each; what that makes of softmax and of the mean, to the full."""
    keys, values = random(1, 2, 1500, head_dim), random(1, 2, 1500, head_dim, seed=1)
    query = random(1, 4, 1, head_dim, seed=2)
    found = ops.kv_cache_attention(query, (storage := filled(keys, values, 1500)), 1500)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, keys, values)), enable_gqa=True)
    key_step, value_step = (storage[i][..., 0].double().amax() * 0.51 for i in (1, 3))
    score = head_dim**-0.5 * key_step * query.abs().sum(-1, keepdim=True).double()
    bound = torch.expm1(2 * score) * values.abs().max() + value_step
    error = (found - exact).abs()
    assert (error <= bound).all()
    # The worst case hardly happens: the errors of many keys and values cancel.
    assert error.max() < 0.05
    assert error.max() > 1e-4


def test_attention_of_a_long_context_is_deterministic_on_every_isa():
    keys, values = random(1, 1, 20000, 64), random(1, 1, 20000, 64, seed=1)
    storage, query = filled(keys, values, 20000), random(1, 3, 1, 64, seed=2)
    results = []
    for isa in ISAS:
        before = torch.ops.rcp_kernels.set_cpu_isa(isa)
        try:
            results += [ops.kv_cache_attention(query, storage, 20000) for _ in range(2)]
        finally:
            torch.ops.rcp_kernels.set_cpu_isa(before)
    assert all(torch.equal(result, results[0]) for result in results)
    assert (results[0] - ops.reference.kv_cache_attention(query, storage, 20000)).abs().max() < 1e-6


def test_empty():
    storage = filled(random(2, 1, 0, 8), random(2, 1, 0, 8), 3)
    assert (ops.kv_cache_attention(random(2, 2, 1, 8), storage, 0, causal=False) == 0).all()
    assert ops.kv_cache_attention(random(2, 2, 0, 8), storage, 0).shape == (2, 2, 0, 8)
    assert ops.kv_cache_dequantize(*storage[:2], 0, 8).shape == (2, 1, 0, 8)
    nobody = filled(random(0, 1, 2, 8), random(0, 1, 2, 8), 3)
    assert ops.kv_cache_attention(random(0, 2, 1, 8), nobody, 2).shape == (0, 2, 1, 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    storage = filled(random(2, 2, 5, 7), random(2, 2, 5, 7), 6)
    op = torch.ops.rcp_kernels
    torch.library.opcheck(op.kv_cache_append.default, (random(2, 2, 1, 7, dtype=dtype), *storage[:2], 5, 0.95))
    torch.library.opcheck(op.kv_cache_dequantize.default, (*storage[:2], torch.empty(2, 2, 4, 7, dtype=dtype)))
    query, mask = random(2, 6, 2, 7, dtype=dtype), torch.ones(2, 1, 2, 5, dtype=torch.bool)
    torch.library.opcheck(op.kv_cache_attention.default, (query, *storage, 5, 0.3, False, 3, mask))


def test_compiled_decoding_step_is_bit_equal():
    def step(x, query, *storage):
        ops.kv_cache_append(x, *storage[:2], 9)
        ops.kv_cache_append(-x, *storage[2:], 9)
        return ops.kv_cache_attention(query * 2, ops.KVStorage(*storage), 10) + 1

    eager = filled(random(1, 2, 9, 32), random(1, 2, 9, 32, seed=1), 12)
    traced = [x.clone() for x in eager]
    x, query = random(1, 2, 1, 32, seed=2), random(1, 4, 1, 32, seed=3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, query, *traced), step(x, query, *eager))
    assert all(torch.equal(a, b) for a, b in zip(traced[::2], eager[::2], strict=True))


GOOD = {"x": torch.ones(1, 2, 3, 8), "position": 1, "clip": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.ones(2, 3, 8)},
            r"x must be \[batch, kv_heads, tokens, head_dim\].*got shape \[2, 3, 8\]; reshape",
        ),
        ({"x": torch.ones(1, 2, 3, 8, dtype=torch.int32)}, "must be float32, float16 or bfloat16, got Int"),
        ({"x": torch.ones(1, 3, 3, 8)}, r"must have the batch and kv_heads of codes.*got shape \[1, 3, 3, 8\]; append"),
        ({"x": torch.ones(1, 2, 3, 10)}, r"codes must be \[batch, kv_heads, capacity, 5\] for head_dim 10, got"),
        ({"position": 2}, r"position \+ tokens must be 3 to 4, got 5; .*allocate"),
        ({"position": -1}, r"position \+ tokens must be 3 to 4, got 2"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\], got 0"),
        ({"x": torch.tensor([1.0, torch.nan]).repeat(1, 2, 3, 4)}, "batch 0, head 0, token 0 holds NaN, Inf or more"),
        ({"x": torch.full((1, 2, 3, 8), 1e6)}, "more than 65504; find its source"),
    ],
)
def test_bad_appends(change, message):
    call = GOOD | change
    with pytest.raises(ValueError, match=message):
        ops.kv_cache_append(call["x"], *ops.empty_kv_cache(1, 2, 4, 8), call["position"], call["clip"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(1, 3, 1, 8)}, r"multiple of its heads, \[1, 2, 4, 4\], got shape \[1, 3, 1, 8\]; pass"),
        ({"query": torch.ones(1, 2, 5, 8)}, "the number of queries must be 0 to 4, got 5; causal.*append first"),
        ({"query": torch.full((1, 2, 1, 8), torch.inf)}, "query must be finite, but holds NaN or Inf"),
        ({"length": 5}, "length must be 0 to 4, got 5; pass the number of positions appended"),
        ({"window": -1}, "window must not be negative, got -1"),
        ({"mask": torch.ones(1, 1, 1, 3, dtype=torch.bool)}, r"mask must be bool .*1, 4\].*got Bool \[1, 1, 1, 3\]"),
        ({"mask": torch.ones(1, 1, 1, 4)}, r"mask must be bool .* got Float \[1, 1, 1, 4\]; slice or convert"),
    ],
)
def test_bad_attention(change, message):
    call = {"query": torch.ones(1, 2, 1, 8), "length": 4} | change
    storage = filled(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), 4)
    with pytest.raises(ValueError, match=message):
        ops.kv_cache_attention(call.pop("query"), storage, **call)


def test_bad_storage():
    codes, scales = ops.empty_kv_cache(1, 2, 4, 8)
    x = torch.ones(1, 2, 1, 8)
    for bad, message in (
        ((codes.int(), scales), "codes must be Byte, got Int"),
        ((codes, scales.float()), "scales must be Half, got Float"),
        ((codes, scales[:, :, :3]), r"scales must have shape \[1, 2, 4, 2\], got \[1, 2, 3, 2\]"),
        ((codes[:, :, ::2], scales[:, :, ::2]), "codes and scales must be contiguous, got other strides"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.kv_cache_append(x, *bad, 0)
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 1; leave"):
        ops.fake_quantize_kv(x, 1)
    with pytest.raises(ValueError, match=r"got torch\.float64; convert"):
        ops.fake_quantize_kv(x.double())


# --- the cache of a model


class FakeQuantizedCache(transformers.DynamicCache):
    """Keys and values in float, after fake quantization: what QuantizedKVCache has to equal."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(ops.fake_quantize_kv(key_states), ops.fake_quantize_kv(value_states), *args, **kwargs)


def tiny_model(head_dim: int = 16, model_type: str = "llama", **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(model_type, **(fields | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompts(batch: int = 2, length: int = 20, padded: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model, cache, implementation: str = "sdpa", prompt=None, **arguments):
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {**cache_argument(model, cache), **arguments}
    out = model.generate(**(prompt or prompts()), **options)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("queries", [1, 40])
def test_attention_with_a_cap_is_refused_for_prompts_too(queries):
    x = torch.zeros(1, 2, queries, 32)
    with pytest.raises(ValueError, match="attention must have no softcap"):
        transformers.AttentionInterface()[ATTENTION](torch.nn.Identity(), x, x, x, None, softcap=50.0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", ATTENTION])
@pytest.mark.parametrize(("model_type", "head_dim"), [("llama", 16), ("llama", 80), ("qwen3", 96), ("llama", 256)])
def test_generate_equals_fake_quantization(model_type, head_dim, implementation):
    """Batch of two, one padded on the left.

    The same attention gives the same bits. Another one rounds its sums in another order, and then a key or value next
    to a rounding boundary may take the neighbouring code: a small part of what four bits do.
    """
    model = tiny_model(head_dim, model_type)
    expected, expected_logits = generated(model, FakeQuantizedCache())
    cache = QuantizedKVCache(model.config)
    found, logits = generated(model, cache, implementation)
    assert torch.equal(found, expected)
    if implementation == "sdpa":
        assert torch.equal(logits, expected_logits)
    _, float_logits = generated(model, transformers.DynamicCache(), max_new_tokens=1)
    four_bits = (float_logits[0] - expected_logits[0]).norm()
    assert four_bits > 0.1
    assert (logits - expected_logits).norm(dim=(1, 2)).max() < 0.02 * four_bits
    assert cache.get_seq_length() == found.shape[1] - 1


@pytest.mark.parametrize("implementation", ["sdpa", ATTENTION])
def test_beams(implementation):
    model = tiny_model()
    expected, _ = generated(model, FakeQuantizedCache(), num_beams=4, max_new_tokens=12)
    found, _ = generated(model, QuantizedKVCache(model.config), implementation, num_beams=4, max_new_tokens=12)
    assert torch.equal(found, expected)


def test_sliding_window():
    model = tiny_model(16, "mistral", sliding_window=8)
    expected, expected_logits = generated(model, FakeQuantizedCache())
    found, logits = generated(model, QuantizedKVCache(model.config), ATTENTION)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [3, 17])
def test_a_prompt_in_pieces(chunk):
    """Several queries at once, few enough for the packed kernel and too many for it, without any mask."""
    model = tiny_model()
    ids = prompts(1, 60)["input_ids"]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids, **cache_argument(model, FakeQuantizedCache())).logits
        model.set_attn_implementation(ATTENTION)
        cache = QuantizedKVCache(model.config)
        found = [model(piece, **cache_argument(model, cache)).logits for piece in ids.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", ATTENTION])
def test_key_rotation_is_undone(implementation):
    """R3 changes what is rounded, not what is computed: far closer to the unrotated cache than to nothing."""
    model = tiny_model(64)
    rotated = QuantizedKVCache(model.config, key_rotation=OnlineRotation(64))
    found, logits = generated(model, rotated, implementation, max_new_tokens=1)
    _, exact = generated(model, transformers.DynamicCache(), max_new_tokens=1)
    _, plain = generated(model, QuantizedKVCache(model.config), max_new_tokens=1)
    assert not torch.equal(logits, plain)
    assert (logits - exact).norm() < 2 * (plain - exact).norm()
    assert found.shape[1] == 21


def test_clip_reaches_the_cache():
    model, cache = tiny_model(), QuantizedKVCache(clip=0.5)
    generated(model, cache, max_new_tokens=2)
    keys = random(1, 2, 3, 16)
    layer = QuantizedKVCache(clip=0.5)
    read, _ = layer.update(keys, keys, 0)
    assert torch.equal(read, ops.fake_quantize_kv(keys, 4, 0.5))
