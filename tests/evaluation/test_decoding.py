"""The decode loop against transformers' own: greedy and sampled tokens, ends, caches and devices."""

import contextlib
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import StaticLayer  # noqa: E402

from rcp_kernels import quantize_model  # noqa: E402
from rcp_kernels.evaluation.decoding import Decoder, _can_capture, decode_loop, greedy_tokens  # noqa: E402
from rcp_kernels.models.hf import cache_argument, cache_keyword  # noqa: E402
from rcp_kernels.nn import fuse_decoder  # noqa: E402
from rcp_kernels.nn.kv_cache import ATTENTION, QuantizedKVCache  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

PROMPT, NEW = 7, 20
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}


def make_model(family="llama", **changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = transformers.AutoConfig.for_model(family, **(fields | changes))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_prompts(batch=3, device="cpu"):
    return torch.randint(1, 61, (batch, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)


def caches(model):
    """A new cache of each kind."""
    return {
        "the model's own": None,
        "static": transformers.StaticCache(config=model.config, max_cache_len=PROMPT + NEW),
        "4 bits": QuantizedKVCache(model.config),
        "4 bits, static": QuantizedKVCache(model.config, capacity=PROMPT + NEW - 1, static=True),
    }


def both(model, prompts, cache="the model's own", seed=3, **options):
    """The tokens of transformers' loop and of ours."""
    model.set_attn_implementation(ATTENTION if "4 bits" in cache else "sdpa")
    found = []
    for loop in ({}, {"custom_generate": decode_loop}):
        torch.manual_seed(seed)
        arguments = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": NEW, **options, **loop}
        chosen = caches(model)[cache]
        arguments |= {} if chosen is None else cache_argument(model, chosen)
        found.append(model.generate(prompts, **arguments))
    return found


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cache", ["the model's own", "static", "4 bits", "4 bits, static"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_are_those_of_transformers(family, cache, options):
    model = make_model(family)
    expected, found = both(model, make_prompts(), cache, **options)
    assert torch.equal(found, expected)
    assert found.shape == (3, PROMPT + NEW)
    if options is SAMPLING:
        assert not torch.equal(both(model, make_prompts(), cache, seed=4, **options)[1], found)


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLING], ids=["greedy", "sampled"])
def test_prompts_end_at_their_own_time(options):
    model, prompts = make_model(), make_prompts(6)
    text = both(model, prompts, **options)[0][:, PROMPT:]
    ends = [int(text[0, 4]), int(text[1, 7]), int(text[2, 2])]
    expected, found = both(model, prompts, eos_token_id=ends, pad_token_id=0, **options)
    assert torch.equal(found, expected)
    assert (found[0, PROMPT + 5 :] == 0).all()
    one, stopped = both(model, prompts[:1], eos_token_id=ends, **options)
    assert torch.equal(stopped, one)
    assert options is SAMPLING or stopped.shape[1] <= PROMPT + 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cache", ["the model's own", "4 bits, static"])
def test_on_another_device(device, cache, fused):
    model = make_model()
    quantize_model(model, bits=4, group_size=32, act_bits=16, skip=("lm_head",))
    if fused:
        fuse_decoder(model)
    here = both(model, make_prompts(), cache, do_sample=False)[1]
    model.to(device)
    expected, there = both(model, make_prompts(device=device), cache, do_sample=False)
    assert there.device == device
    assert torch.equal(there, expected)
    assert torch.equal(there.cpu(), here)
    # Prompts follow the model.
    model.set_attn_implementation("sdpa")
    assert greedy_tokens(model, make_prompts(), 3).device == device


def test_one_call_of_the_model_a_token(monkeypatch):
    model = make_model()
    calls = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **arguments: calls.append(1) or original(**arguments))
    model.generate(make_prompts(), custom_generate=decode_loop, max_new_tokens=NEW, do_sample=False)
    assert len(calls) == NEW


def test_a_compiled_step():
    model = make_model()
    model.set_attn_implementation(ATTENTION)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend=counter)
    decoders = [
        Decoder(model, make_prompts(), cache=caches(model)["4 bits, static"], forward=function)
        for function in (None, forward)
    ]
    for _ in range(NEW - 1):
        for decoder in decoders:
            decoder.step()
        assert torch.equal(decoders[0].token, decoders[1].token)
    assert counter.frame_count == 1
    torch._dynamo.reset()  # later tests count their own compilations


def test_a_full_cache_is_refused_before_the_step():
    model = make_model()
    model.set_attn_implementation(ATTENTION)
    for cache in (
        QuantizedKVCache(model.config, capacity=PROMPT + 2, static=True),
        transformers.StaticCache(config=model.config, max_cache_len=PROMPT + 2),
    ):
        model.set_attn_implementation(ATTENTION if isinstance(cache, QuantizedKVCache) else "sdpa")
        decoder = Decoder(model, make_prompts(), cache=cache)
        decoder.step()
        decoder.step()
        before = decoder.logits
        with pytest.raises(ValueError, match=f"a full cache with a capacity of {PROMPT + 2} positions; make it"):
            decoder.step()
        assert decoder.logits is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "must be greedy_search or sample, got beam_search; leave out custom_generate"),
        ({"attention_mask": torch.tensor([[0, 0, *[1] * 5]])}, "must have no padding, got 2 padded tokens; decode"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(make_prompts(1), custom_generate=decode_loop, max_new_tokens=4, **options)


def test_refuses_arguments_that_it_does_not_pass_on():
    model, types = make_model(), torch.zeros(1, PROMPT, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"no further arguments of the model, got \['token_type_ids'\]"):
        decode_loop(model, make_prompts(1), None, None, model.generation_config, token_type_ids=types)


class Graph:
    """A CUDA graph that runs on the CPU: the capture is taken back, and a replay runs the step again."""

    decoder: Decoder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.decoder._cache.crop(-1)
        self.decoder._position.sub_(1)

    def replay(self):
        self.decoder.logits.copy_(self.decoder._run(self.decoder._tokens))


@pytest.mark.parametrize("kind", ["static", "4 bits, static"])
def test_a_capture_takes_its_warm_up_back(kind, monkeypatch):
    """Only the CUDA calls are replaced: positions and cache have to be those of decoding without a capture."""
    if kind == "static" and not hasattr(StaticLayer, "crop"):
        pytest.skip("this release of transformers cannot crop its StaticCache")
    model = make_model()
    model.set_attn_implementation(ATTENTION if "4 bits" in kind else "sdpa")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: types.SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    plain, captured = (Decoder(model, make_prompts(), cache=caches(model)[kind]) for _ in range(2))
    captured._captures = True
    Graph.decoder = captured
    for _ in range(NEW - 1):
        plain.step()
        captured.step()
        assert torch.equal(captured.logits, plain.logits)
    assert int(captured._cache.get_seq_length()) == int(plain._cache.get_seq_length()) == PROMPT + NEW - 1


@pytest.mark.parametrize(
    ("kind", "rope", "captures"),
    [
        ("the model's own", "default", False),
        ("4 bits", "default", False),
        ("static", "default", hasattr(StaticLayer, "crop")),
        ("4 bits, static", "default", True),
        ("4 bits, static", "dynamic", False),
    ],
)
def test_which_steps_are_captured(kind, rope, captures):
    model = make_model(rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 2.0})
    model.set_attn_implementation(ATTENTION if "4 bits" in kind else "sdpa")
    assert _can_capture(model, Decoder(model, make_prompts(), cache=caches(model)[kind])._cache) == captures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("kind", ["static", "4 bits, static"])
def test_a_captured_step_cuda(kind, monkeypatch):
    model = make_model().cuda()
    model.set_attn_implementation(ATTENTION if "4 bits" in kind else "sdpa")
    expected = greedy_tokens(model, make_prompts(), NEW)
    decoder = Decoder(model, make_prompts(), cache=caches(model)[kind])
    tokens = [decoder.token.clone()]
    calls = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **arguments: calls.append(1) or original(**arguments))
    for _ in range(NEW - 1):
        decoder.step()
        tokens.append(decoder.token.clone())
    assert len(calls) == 3  # two to warm up, and the capture
    if kind == "static":
        assert torch.equal(torch.cat(tokens, 1), expected)
    else:
        eager = QuantizedKVCache(model.config)
        found = model.generate(
            make_prompts(device="cuda"), max_new_tokens=NEW, do_sample=False, **{cache_keyword(model): eager}
        )
        assert torch.equal(torch.cat(tokens, 1), found[:, PROMPT:])
