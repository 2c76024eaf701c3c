"""eval and generate as Python functions and from the command line: caches, sampling, lengths, on tiny models."""

import inspect
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from language_of_numbers import WORDS, write_model, write_text  # noqa: E402

from rcp_kernels import ops  # noqa: E402
from rcp_kernels.checkpoint import load_quantized  # noqa: E402
from rcp_kernels.evaluation import divergence as divergence_module  # noqa: E402
from rcp_kernels.models.hf import cache_keyword, output_cache  # noqa: E402
from rcp_kernels.nn import kv_cache, kv_layer  # noqa: E402
from rcp_kernels.pipeline import Recipe, evaluate, generate, quantize  # noqa: E402

module = sys.modules[evaluate.__module__]

# No call of ours uses a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

PROMPT = "one two three"
LONG_PROMPT = " ".join(WORDS[i % 10] for i in range(40))
LAYERS = 2


class FakeQuantizedCache(transformers.DynamicCache):
    """Keys and values in float, after fake quantization."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(ops.fake_quantize_kv(key_states), ops.fake_quantize_kv(value_states), *args, **kwargs)


def float_model(folder: Path, family: str) -> Path:
    """A tiny model of a family with the tokenizer of numbers; large weights, so that no two tokens are alike."""
    write_model(folder)
    fields = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 11,
    }
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(family, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "numbers.txt")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Directories by family and rotation, at 4 bits with a 4-bit cache."""
    made: dict[tuple[str, str], Path] = {}

    def make(family="llama", rotation="none"):
        if (family, rotation) not in made:
            folder = tmp_path_factory.mktemp(family)
            model = float_model(folder / "float", family)
            recipe = Recipe(str(model), "rtn", rotation=rotation, w_bits=4, kv_bits=4, group_size=32)
            quantize(recipe, folder / "out")
            made[family, rotation] = folder / "out"
        return made[family, rotation]

    return make


@pytest.fixture
def counts(monkeypatch):
    """How often the cache is dequantized (two calls are one layer), read packed, and asked to append."""
    seen = SimpleNamespace(dequantize=0, attention=0, append=0)
    for name in vars(seen):
        original = getattr(kv_layer, f"kv_cache_{name}")

        def call(*args, _name=name, _original=original, **kwargs):
            setattr(seen, _name, getattr(seen, _name) + 1)
            return _original(*args, **kwargs)

        monkeypatch.setattr(kv_layer, f"kv_cache_{name}", call)
    return seen


def expected_text(folder, prompt, new_tokens, clip=1.0):
    """Greedy decoding by one pass over all tokens a step, with fake-quantized keys and values and torch's attention."""
    model, _ = load_quantized(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(new_tokens):
            cache = {cache_keyword(model): FakeQuantizedCache()}
            ids = torch.cat([ids, model(ids, **cache).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_model_with_a_4_bit_cache_decodes_packed(quantized, counts, family, rotation):
    """With a rotation keys and queries are rotated by R3 as well, on their way into the cache."""
    folder = quantized(family, rotation)
    if rotation == "hadamard":
        assert hasattr(load_quantized(folder)[0].model.layers[0].self_attn, "qk_rotation")
    said = []
    found = generate(folder, PROMPT, new_tokens=12, log=said.append)
    assert counts.dequantize == 0
    # Each of 12 tokens, and one with which the model was asked whether it can.
    assert counts.attention == LAYERS * 13
    assert said == []
    assert found == expected_text(folder, PROMPT, 12)
    counts.attention = 0
    found = generate(folder, LONG_PROMPT, new_tokens=5, log=said.append)
    # More queries than the packed attention takes: dequantized once a layer, for keys and for values.
    assert (counts.dequantize, counts.attention) == (2 * LAYERS, LAYERS * 5)
    assert found == expected_text(folder, LONG_PROMPT, 5)


def test_attention_that_the_kernel_does_not_compute_keeps_the_cache(quantized, counts):
    """Gemma 2 caps its scores: the attention that transformers chose, on the same 4 bits, and a line that says so."""
    folder = quantized("gemma2")
    said = []
    found = generate(str(folder), PROMPT, new_tokens=6, log=said.append)
    assert counts.attention == 0
    assert counts.dequantize == 2 * LAYERS * 6
    assert len(said) == 1
    assert "softcap" in said[0]
    kept = load_quantized(folder)[0].config._attn_implementation
    assert f"attention {kept!r} dequantizes the 4-bit cache" in said[0]
    assert found == expected_text(folder, PROMPT, 6)


def test_a_model_that_does_not_use_its_attention_function_is_found_out(quantized):
    model, _ = load_quantized(quantized())
    assert kv_cache.use_packed_attention(model) is None
    assert model.config._attn_implementation == kv_cache.ATTENTION
    model.set_attn_implementation("sdpa")
    original = kv_cache.QuantizedKVLayer.update

    def changed(self, *args, **kwargs):
        keys, values = original(self, *args, **kwargs)
        return keys * 1.0, values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache.QuantizedKVLayer, "update", changed)
        reason = kv_cache.use_packed_attention(model)
        assert reason is not None
        assert "LlamaForCausalLM does not call the attention function" in reason
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation(kv_cache.ATTENTION)
        cache = kv_cache.QuantizedKVCache(model.config)
        ids = torch.zeros(1, 1, dtype=torch.int64)
        with torch.no_grad():
            model(ids, **{cache_keyword(model): cache})
            with pytest.raises(ValueError, match="got one that does not; use set_attn_implementation"):
                model(ids, **{cache_keyword(model): cache})


@pytest.mark.parametrize(
    ("changes", "kv_bits"),
    [
        *(({"cache_implementation": name}, 4) for name in ("static", "offloaded", "dynamic", "quantized")),
        ({"use_cache": False}, 4),
        ({"cache_implementation": "static"}, 16),
        *(({"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.9}, bits) for bits in (4, 16)),
    ],
)
def test_a_generation_config_does_not_break_it(quantized, tmp_path, counts, changes, kv_bits):
    folder = tmp_path / "model"
    shutil.copytree(quantized(), folder)
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["kv_bits"] = kv_bits
    (folder / "config.json").write_text(json.dumps(fields))
    plain = generate(folder, PROMPT, new_tokens=8)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, **changes}))
    counts.dequantize = counts.append = 0
    assert generate(folder, PROMPT, new_tokens=8) == plain
    assert counts.dequantize == 0
    assert (counts.append > 0) == (kv_bits == 4)


def test_greedy_without_an_option_of_sampling(quantized):
    assert generate(quantized(), PROMPT, new_tokens=20) == generate(quantized(), PROMPT, new_tokens=20)
    # So little is left of the likeliest token's rivals.
    assert generate(quantized(), PROMPT, new_tokens=20, temperature=1e-4) == generate(
        quantized(), PROMPT, new_tokens=20
    )
    assert generate(quantized(), PROMPT, new_tokens=20, top_p=1e-6) == generate(quantized(), PROMPT, new_tokens=20)


def test_sampling_is_that_of_transformers(quantized):
    folder = quantized()
    model, config = load_quantized(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model.set_attn_implementation(kv_cache.ATTENTION)
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        cache = {cache_keyword(model): kv_cache.QuantizedKVCache(model.config, clip=config.kv_clip)}
        sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.8, "top_k": 0}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **sampling, **cache)
        expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        found = generate(folder, PROMPT, new_tokens=20, temperature=1.5, top_p=0.8, seed=seed)
        assert found == expected
        texts.add(found)
    assert len(texts) > 1


def test_seeds(quantized):
    """The same seed draws the same tokens; none draws others, and leaves the generator of the process alone."""
    how = {"new_tokens": 30, "temperature": 3.0}
    state = torch.random.get_rng_state()
    assert generate(quantized(), PROMPT, seed=7, **how) == generate(quantized(), PROMPT, seed=7, **how)
    assert len({generate(quantized(), PROMPT, **how) for _ in range(3)}) > 1
    assert torch.equal(torch.random.get_rng_state(), state)
    # A seed alone asks for sampling.
    assert len({generate(quantized(), PROMPT, new_tokens=40, seed=seed) for seed in range(5)}) > 1


def test_only_the_options_that_are_given_narrow_the_choice(quantized, tmp_path):
    """Neither the model's own top_k and top_p nor transformers' top_k of 50 do."""
    folder = tmp_path / "model"
    shutil.copytree(quantized(), folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    changes = {"do_sample": True, "top_k": 1, "top_p": 0.01, "temperature": 0.01}
    (folder / "generation_config.json").write_text(json.dumps({**generation, **changes}))
    for how in ({"temperature": 3.0}, {"seed": 5}, {"top_p": 0.99}):
        how = {"new_tokens": 30, "seed": 4, **how}
        assert generate(folder, PROMPT, **how) == generate(quantized(), PROMPT, **how) != generate(folder, PROMPT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be a finite number above 0, got 0\.0; leave it out"),
        ({"temperature": -1.0}, r"temperature must be .* got -1\.0; leave it out"),
        ({"temperature": float("nan")}, "temperature must be .* got nan; leave it out"),
        ({"temperature": float("inf")}, "temperature must be .* got inf; leave it out"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0; 1 keeps"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5; 1 keeps"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], got nan; 1 keeps"),
        ({"seed": -1}, r"seed must be 0 to 2\*\*64 - 1, got -1; pass another"),
        ({"seed": 2**64}, r"seed must be 0 to 2\*\*64 - 1, got 18446744073709551616; pass another"),
        ({"new_tokens": 0}, "new_tokens must be at least 1, got 0; ask for one"),
    ],
)
def test_bad_sampling_is_refused_before_the_model_is_loaded(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate("/nowhere", PROMPT, **arguments)
    ((name, value),) = arguments.items()
    code, _, err = run("generate", "/nowhere", "--prompt", PROMPT, f"--{name.replace('_', '-')}={value}")
    assert code == 2
    assert f"--{name.replace('_', '-')}" in err or f"got {value};" in " ".join(err.replace("│", " ").split())


def test_a_short_text_is_refused_by_its_tokens(quantized, tmp_path):
    (tmp_path / "short.txt").write_text("one two three")
    with pytest.raises(ValueError, match=r"the text must have at least 64 tokens \(window\), got 3"):
        evaluate(quantized(), tmp_path / "short.txt", tokens=64, window=64)


def test_options_of_the_command_are_those_of_the_function(run, quantized):
    arguments = ["generate", quantized(), "--prompt", PROMPT, "--new-tokens", 15]
    sampling = ["--temperature", 2, "--top-p", 0.9, "--seed", 3]
    expected = generate(quantized(), PROMPT, new_tokens=15, temperature=2, top_p=0.9, seed=3)
    assert run(*arguments, *sampling) == (0, expected + "\n", "")
    assert run(*arguments)[1] == generate(quantized(), PROMPT, new_tokens=15) + "\n"
    from rcp_kernels.cli import generate as cli

    options = set(inspect.signature(cli.generate).parameters) - {"model", "threads"}
    assert options == set(inspect.signature(generate).parameters) - {"name", "log"}


def test_a_chat_template_is_used_or_not(run, quantized, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(quantized(), folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} nine nine nine nine")
    plain = generate(quantized(), PROMPT, new_tokens=10)
    chatted = generate(quantized(), f"{PROMPT} nine nine nine nine", new_tokens=10)
    assert plain != chatted
    assert generate(folder, PROMPT, new_tokens=10) == chatted
    assert generate(folder, PROMPT, new_tokens=10, chat=False) == plain
    arguments = ["generate", folder, "--prompt", PROMPT, "--new-tokens", 10]
    assert run(*arguments)[1] == chatted + "\n"
    assert run(*arguments, "--no-chat")[1] == plain + "\n"


def test_texts_longer_than_the_positions_of_the_model_are_said(run, quantized, text):
    said = []
    generate(quantized(), PROMPT, new_tokens=125, log=said.append)
    assert said == []
    # In the language of this model a prompt of three words has three tokens.
    code, _, err = run("generate", quantized(), "--prompt", PROMPT, "--new-tokens", 126)
    assert code == 0
    assert "generate: warning: prompt and new tokens should be at most 128 tokens" in err
    assert "max_position_embeddings, got 129" in err
    code, _, err = run("eval", quantized(), "--text", text, "--tokens", 400, "--window", 130)
    assert code == 0
    assert "eval: warning: window should be at most 128 tokens, the model's max_position_embeddings, got 130" in err
    assert "warning" not in run("eval", quantized(), "--text", text, "--tokens", 400, "--window", 128)[2]
    where = [
        quantized(),
        "--text",
        text,
        "--tokens",
        64,
        "--window",
        16,
        "--divergence-from",
        quantized().parent / "float",
    ]
    code, _, err = run("eval", *where, "--new-tokens", 125)
    assert code == 0
    assert "eval: warning: prompt and new tokens should be at most 128 tokens" in err
    assert "got 129" in err


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_reads_the_cache_packed(quantized, text, counts, family, monkeypatch):
    folder = quantized(family)
    said = []
    how = {"tokens": 640, "window": 16, "new_tokens": 40, "divergence_from": folder.parent / "float"}
    found = evaluate(folder, str(text), log=said.append, **how)
    prompt = 40  # 640 tokens in 16 parts
    assert found.divergence.prompt_tokens == prompt
    if family == "llama":
        # The prompt, dequantized once, and 39 tokens that follow in pieces of 16; one batch of all prompts.
        batches = -(-16 // (divergence_module._CHUNK_TOKENS // (prompt + 39)))
        assert counts.dequantize == batches * 2 * LAYERS
        assert counts.attention == LAYERS * (1 + 3 * batches)
        assert said == []
    else:
        assert counts.attention == 0
        assert counts.dequantize > 0
        assert "softcap" in said[0]
    monkeypatch.setattr(module, "_reading_packed", lambda model, clip, *_: module.with_quantized_cache(model, 4, clip))
    assert evaluate(folder, text, log=said.append, **how) == found


def test_perplexity_has_the_4_bit_cache(quantized, text, tmp_path):
    """The cache that the config asks for, under the keyword that transformers has for it."""
    folder = tmp_path / "model"
    shutil.copytree(quantized(), folder)
    found = evaluate(folder, text, tokens=128, window=32)
    assert (found.kv_bits, found.model) == (4, str(folder))
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"]["kv_bits"] = 16
    (folder / "config.json").write_text(json.dumps(fields))
    assert evaluate(folder, text, tokens=128, window=32).perplexity != found.perplexity
    model, _ = load_quantized(folder)
    ids = torch.tensor(transformers.AutoTokenizer.from_pretrained(folder)(text.read_text()).input_ids[:128])
    losses = []
    with torch.no_grad():
        for window in ids.view(-1, 32):
            logits = model(window[None], **{cache_keyword(model): FakeQuantizedCache()}).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    assert found.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)


def test_names_may_be_strings_or_paths(quantized, text):
    how = {"tokens": 64, "window": 16}
    assert evaluate(str(quantized()), str(text), **how) == evaluate(quantized(), text, **how)
    assert generate(str(quantized()), PROMPT, new_tokens=3) == generate(quantized(), PROMPT, new_tokens=3)
    with pytest.raises(ValueError, match="eval: new_tokens must be at least 1, got 0"):
        evaluate(quantized(), text, new_tokens=0, **how)


def test_what_transformers_calls_the_cache(quantized):
    def old(ids, past_key_values=None): ...
    def new(ids, cache=None): ...

    class Layer(torch.nn.Module):
        def forward(self, x, cache=None, **kwargs): ...

    assert (cache_keyword(old), cache_keyword(new), cache_keyword(Layer())) == ("past_key_values", "cache", "cache")
    assert output_cache(SimpleNamespace(past_key_values=3)) == 3
    assert output_cache(SimpleNamespace(cache=4)) == 4
    model, _ = load_quantized(quantized())
    cache = transformers.DynamicCache()
    output = model(torch.zeros(1, 3, dtype=torch.int64), **{cache_keyword(model): cache}, use_cache=True)
    assert output_cache(output) is cache
    assert cache.get_seq_length() == 3
