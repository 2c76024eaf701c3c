"""fuse_decoder on tiny models of every family: bit-equal to the same steps apart, close to transformers' own."""

import copy
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rotated_models import IDS, NAMES, logits, make_model, transformers
from torch.utils._python_dispatch import TorchDispatchMode

from rcp_kernels import OnlineRotation, QuantLinear, ops, quantize_model
from rcp_kernels.formats import merge_rows
from rcp_kernels.methods.rotate import rotate_model
from rcp_kernels.models.architecture import describe
from rcp_kernels.models.hf import cache_keyword
from rcp_kernels.nn import fuse_decoder, is_fused, storage_report, unfuse_decoder
from rcp_kernels.nn.fused_plan import _activation, _epsilon
from rcp_kernels.nn.kv_cache import QuantizedKVCache
from rcp_kernels.nn.merged_linear import MergedPart, merge_linears, split_linears
from rcp_kernels.ops.quantize_weight import quantize_weight


def quantized(name, act_bits=8, rotation="none", bits=4, r3=False, dtype=torch.float32):
    model = make_model(name)
    if rotation != "none":
        rotate_model(model, rotation, group_size=32, r3=r3)
    quantize_model(model, bits=bits, group_size=32, act_bits=act_bits, skip=("lm_head",))
    return model.to(dtype).eval()


def fused(model, attention=False):
    model = copy.deepcopy(model)
    fuse_decoder(model, attention=attention)
    return model


def with_reference_steps(model):
    """A copy whose norms before packed layers, and whose gated activations, are those of ops.reference."""
    model = copy.deepcopy(model)
    architecture = describe(model)
    for layer in architecture.layers:
        for name in (layer.attention_norm, layer.mlp_norm):
            norm = model.get_submodule(name)

            def normalize(x, norm=norm):
                return ops.reference.rms_norm(x, norm.weight, _epsilon(norm), architecture.gain_offset)

            norm.forward = normalize
        mlp = model.get_submodule(layer.gate.rpartition(".")[0])

        activation = _activation("mlp", mlp)

        def run(x, mlp=mlp, activation=activation):
            both = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1)
            return mlp.down_proj(ops.reference.gated_activation(both, activation))

        mlp.forward = run
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_bit_equal_to_separate_steps(name, act_bits):
    model = quantized(name, act_bits)
    assert torch.equal(logits(fused(model)), logits(with_reference_steps(model)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bit_equal_to_separate_steps_in_half_precision(name, dtype):
    model = quantized(name, dtype=dtype)
    assert torch.equal(logits(fused(model)), logits(with_reference_steps(model)))


@pytest.mark.parametrize("name", NAMES)
def test_close_to_the_model_itself(name):
    """Without quantized activations nothing amplifies the rounding of the norms."""
    model = quantized(name, act_bits=16)
    torch.testing.assert_close(logits(fused(model)), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rotation", ["gsr", "walsh"])
def test_rotated_models(name, rotation):
    """R3 between RoPE and the cache, R4 before down; Gemma's rotated output norms."""
    model = quantized(name, act_bits=8, rotation=rotation, r3=True)
    assert torch.equal(logits(fused(model)), logits(with_reference_steps(model)))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "kv4", "static"])
@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}])
def test_generate_with_left_padding(name, cache, search):
    model = quantized(name)
    ids = torch.cat([torch.tensor([[0, 0, 0], [5, 6, 7]]), IDS], 1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    outputs = []
    for candidate in (fused(model), with_reference_steps(model)):
        options = {cache_keyword(candidate): QuantizedKVCache(candidate.config)} if cache == "kv4" else {}
        if cache == "static":
            options = {"cache_implementation": "static"}
        outputs.append(
            candidate.generate(
                ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, disable_compile=True,
                **search, **options,
            )
        )  # fmt: skip
    assert outputs[0].shape[1] == ids.shape[1] + 12
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_one_token_at_a_time_is_the_prompt_at_once(name):
    model = fused(quantized(name, act_bits=16))
    cache = {cache_keyword(model): transformers.DynamicCache(config=model.config)}
    with torch.no_grad():
        steps = [model(input_ids=IDS[:, i : i + 1], **cache).logits for i in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_dict_stays_and_unfuse_brings_all_back(name):
    model = quantized(name)
    state, before = model.state_dict(), logits(model)
    classes = {path: type(module) for path, module in model.named_modules()}
    fuse_decoder(model)
    assert is_fused(model)
    assert any(isinstance(module, MergedPart) for module in model.modules())
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    unfuse_decoder(model)
    assert not is_fused(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert torch.equal(logits(model), before)


def test_a_fused_model_is_saved_as_the_model_it_was(tmp_path):
    model = quantized("llama_tied")
    model.save_pretrained(tmp_path / "before")
    fused(model).save_pretrained(tmp_path / "fused")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "fused" / path.name).read_bytes(), path.name
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert torch.equal(logits(loaded), logits(model))


def test_copies_casts_and_autocast():
    model = quantized("qwen2")
    expected = logits(fused(model))
    twice = copy.deepcopy(fused(model))
    assert torch.equal(logits(twice), expected)
    assert torch.equal(logits(twice.to(torch.bfloat16)), logits(fused(model.to(torch.bfloat16))))
    model = quantized("qwen2")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fused(model)), logits(model))


def test_gradients_flow_to_the_embeddings():
    model = quantized("llama", act_bits=16)
    grads = []
    for candidate in (fused(model), with_reference_steps(model)):
        candidate(input_ids=IDS).logits.square().mean().backward()
        grads.append(candidate.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiles(name):
    model = fused(quantized(name))
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(input_ids=IDS).logits, logits(model))


@pytest.fixture
def calls(monkeypatch):
    """How often ops.decode_attention ran."""
    from rcp_kernels.nn import fused_decoder

    count = []
    original = fused_decoder.decode_attention
    monkeypatch.setattr(fused_decoder, "decode_attention", lambda *a: count.append(1) or original(*a))
    return count


def decoded(model, cache, split=6, ids=IDS, **options):
    """Logits of a prompt of `split` tokens, then of one token at a time."""
    keyword = cache_keyword(model)
    out = [model(input_ids=ids[:, :split], **{keyword: cache}, **options).logits]
    for i in range(split, ids.shape[1]):
        out.append(model(input_ids=ids[:, i : i + 1], **{keyword: cache}, **options).logits)
    return torch.cat(out, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_attention_is_that_of_transformers(name, dtype, calls):
    """16-bit activations: nothing amplifies the rounding of the attention."""
    model = quantized(name, act_bits=16, dtype=dtype)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    y = decoded(fused(model, attention=True), caches[0])
    assert len(calls) == 6 * model.config.num_hidden_layers
    expected = decoded(fused(model), caches[1])
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert mine.get_seq_length() == IDS.shape[1]
    # The first layer's keys and values depend on no attention: the rotary embedding has the same bits.
    assert torch.equal(caches[0].layers[0].keys, caches[1].layers[0].keys)
    assert torch.equal(caches[0].layers[0].values, caches[1].layers[0].values)


@torch.no_grad()
def test_a_cache_that_others_change_is_followed(calls, monkeypatch):
    """Cropped, reordered, copied (deeply or not) and reset between tokens, and grown beyond its storage."""
    from rcp_kernels.nn import fused_decoder

    original = quantized("llama_tied", act_bits=16)
    model = fused(original, attention=True)
    keyword = cache_keyword(model)

    def step(cache, token, model=model):
        return model(input_ids=token, **{keyword: cache}).logits

    def fresh(ids):
        cache = transformers.DynamicCache(config=model.config)
        for i in range(ids.shape[1]):
            out = step(cache, ids[:, i : i + 1])
        return cache, out

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    cache, _ = fresh(IDS)
    cache.crop(-4)
    same(step(cache, IDS[:, 8:9]), fresh(IDS[:, :9])[1])
    cache.reorder_cache(torch.tensor([1, 0]))
    same(step(cache, IDS[:, 9:10].flip(0)).flip(0), fresh(IDS[:, :10])[1])
    cache, _ = fresh(IDS[:, :8])
    for copied in (copy.deepcopy(cache), copy.copy(cache)):
        copied.layers = [copy.copy(layer) for layer in copied.layers]
        other = torch.cat([IDS[:, :8], IDS[:, 9:10], IDS[:, 3:4]], 1)
        same(step(copied, IDS[:, 9:10]), fresh(other[:, :9])[1])
        same(step(copied, IDS[:, 3:4]), fresh(other)[1])
    same(step(cache, IDS[:, 8:9]), fresh(IDS[:, :9])[1])
    after_reset = []  # what is left then depends on the release of transformers
    for candidate in (model, original):
        cache = transformers.DynamicCache(config=model.config)
        for end in (0, 5, 9):
            for i in range(end, end + 3):
                out = step(cache, IDS[:, i : i + 1], candidate)
            cache.reset()
        after_reset.append(out)
    same(*after_reset)
    assert calls
    monkeypatch.setattr(fused_decoder, "_GROWTH", 4)
    same(fresh(IDS)[1], logits(model)[:, -1:])


def test_a_cache_leaves_inference_mode(calls):
    model = fused(quantized("llama_tied", act_bits=16), attention=True)
    cache = transformers.DynamicCache(config=model.config)
    keyword = cache_keyword(model)
    with torch.inference_mode():
        first = decoded(model, cache, ids=IDS[:, :9])
    with torch.no_grad():
        rest = decoded(model, cache, split=1, ids=IDS[:, 9:])
        torch.testing.assert_close(torch.cat([first, rest], 1), logits(model), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        again = model(input_ids=IDS[:, :1], **{keyword: cache}).logits
    assert torch.isfinite(again).all()
    assert calls


def test_a_storage_report_is_the_same():
    model = quantized("qwen2")
    before = str(storage_report(model))
    fuse_decoder(model)
    assert str(storage_report(model)) == before


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_the_default_cache(name, calls):
    """Left padding and windows go through transformers; all give what attention=False gives."""
    model = quantized(name, act_bits=16)
    ids = torch.cat([torch.tensor([[0, 0, 0], [5, 6, 7]]), IDS], 1)
    for mask in (torch.ones_like(ids), (ids != 0).long()):
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        for beams in (1, 3):
            del calls[:]
            tokens = fused(model, attention=True).generate(ids, **options, num_beams=beams)
            plain = name in ("llama", "llama_tied", "qwen2", "qwen3", "gemma") and bool(mask.all())
            assert bool(calls) == plain
            assert torch.equal(tokens, fused(model).generate(ids, **options, num_beams=beams))


@torch.no_grad()
@pytest.mark.parametrize("change", ["eager", "kv4", "r3", "train"])
def test_what_the_operator_does_not_compute_stays_with_transformers(change, calls):
    model = quantized("llama_tied", act_bits=16, rotation="gsr" if change == "r3" else "none", r3=change == "r3")
    model = fused(model, attention=True)
    cache = transformers.DynamicCache(config=model.config)
    if change == "eager":
        model.set_attn_implementation("eager")
    if change == "kv4":
        cache = QuantizedKVCache(model.config)
    if change == "train":
        model.train()
    decoded(model, cache)
    assert not calls


def linears(rows=(32, 17, 48), **changes):
    torch.manual_seed(0)
    options = {"bits": 2, "group_size": 32, "act_bits": 4, "levels": "kmeans"} | changes
    return [QuantLinear.from_linear(torch.nn.Linear(96, n, bias=False), **options).requires_grad_(False) for n in rows]


@given(
    rows=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    bits=st.sampled_from([2, 3, 4]),
    act_bits=st.sampled_from([4, 8, 16]),
    scales=st.lists(st.sampled_from([1e-3, 1.0, 3e2]), min_size=4, max_size=4),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_merged_layers_are_bit_equal_and_split_again(rows, bits, act_bits, scales, bias, seed):
    torch.manual_seed(seed)
    layers = []
    for n, scale in zip(rows, scales, strict=False):
        linear = torch.nn.Linear(70, n, bias=bias)
        linear.weight.data *= scale
        layers.append(QuantLinear.from_linear(linear, bits, 64, act_bits, "uniform").requires_grad_(False))
    x = torch.randn(3, 70)
    expected = [layer(x) for layer in layers]
    states = [layer.state_dict() for layer in layers]
    assert merge_linears(layers)
    assert sum(layer.packed.nbytes for layer in layers) == 0
    for layer, y, state in zip(layers, expected, states, strict=True):
        assert torch.equal(layer(x), y)
        found = layer.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())
    split_linears(layers)
    for layer, y in zip(layers, expected, strict=True):
        assert type(layer) is QuantLinear
        assert torch.equal(layer(x), y)


def test_what_cannot_be_exact_stays_apart():
    layers = linears()
    weights = [layer.packed_weight() for layer in layers]
    far = weights[0]
    far.tensor_scale.mul_(2.0**-12)
    far.scales.fill_(2.0**-14 + 2.0**-24)
    layers[0] = QuantLinear.from_packed(far)
    assert merge_rows([far, *weights[1:]]) is None
    assert not merge_linears(layers)
    assert all(type(layer) is QuantLinear for layer in layers)
    for change in ({"bits": 3}, {"act_bits": 8}, {"act_clip": 0.9}, {"input_rotation": OnlineRotation(96, 32)}):
        assert not merge_linears([*linears((16,)), *linears((16,), **change)]), change
    with pytest.raises(ValueError, match="bits must be the same"):
        merge_rows([quantize_weight(torch.randn(4, 32), bits, 32) for bits in (2, 3)])


def test_a_frozen_head_is_not_copied_for_the_last_token_of_a_prompt():
    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    model = quantized("llama", dtype=torch.bfloat16).requires_grad_(False)
    head = model.lm_head
    hidden = torch.randn(1, 7, head.in_features, dtype=torch.bfloat16)[:, -1:]
    with torch.no_grad():
        expected = head(hidden)
        fuse_decoder(model)
        with Calls():
            found = head(hidden)
    assert "aten::bmm" not in Calls.names
    assert "aten::mm" in Calls.names
    torch.testing.assert_close(found, expected)
    unfuse_decoder(model)
    assert type(model.lm_head) is torch.nn.Linear
