"""The divergence point of greedy decoding, against decoding both models token by token."""

import copy
from types import SimpleNamespace

import pytest
import torch

from rcp_kernels.evaluation import divergence as module
from rcp_kernels.evaluation.decoding import greedy_tokens
from rcp_kernels.evaluation.divergence import Divergence, divergence, prompt_windows

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts():
    return torch.randint(31, (6, 5), generator=torch.Generator().manual_seed(1))


def slow_greedy(model, prompts, new_tokens):
    ids = prompts
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[:, prompts.shape[1] :]


def test_greedy_tokens_are_those_of_decoding_without_a_cache(model, prompts):
    seen = []
    tokens = greedy_tokens(model, prompts, 9, seen.append)
    assert torch.equal(tokens, slow_greedy(model, prompts, 9))
    assert seen == list(range(1, 10))


@pytest.mark.parametrize("chunk", [1, 40, 1024])
def test_positions_are_those_of_two_decodings(model, prompts, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_TOKENS", chunk)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.01)
    tokens = greedy_tokens(model, prompts, 24)
    found = divergence(lambda ids: other(ids, use_cache=False), prompts, tokens)
    theirs = slow_greedy(other, prompts, 24)
    expected = [next((i for i in range(24) if a[i] != b[i]), 24) for a, b in zip(tokens, theirs, strict=True)]
    assert list(found.positions) == expected
    assert len(set(expected)) > 2
    assert found.agreement >= sum(expected) / (6 * 24)
    assert found.new_tokens == 24


def test_a_model_does_not_diverge_from_itself(model, prompts):
    found = divergence(model, prompts, greedy_tokens(model, prompts, 12))
    assert found == Divergence((12,) * 6, 1.0, 12)
    assert (found.mean, found.median) == (12.0, 12.0)


def test_agreement_counts_what_comes_after_the_first_difference():
    def model(ids):  # always writes the next number
        return SimpleNamespace(logits=torch.nn.functional.one_hot((ids + 1) % 8, 8).float())

    prompts = torch.tensor([[3], [3], [3]])
    tokens = torch.tensor([[4, 5, 6, 7], [4, 0, 1, 2], [0, 1, 2, 3]])
    found = divergence(model, prompts, tokens)
    assert found.positions == (4, 1, 0)
    assert found.agreement == (4 + 3 + 3) / 12
    assert (found.mean, found.median) == (5 / 3, 1)


def test_prompt_windows_are_spread_over_the_text():
    assert prompt_windows(torch.arange(11), 3, 2).tolist() == [[0, 1], [3, 4], [6, 7]]
    for ids, count, length in ((torch.arange(5), 3, 2), (torch.arange(6).view(2, 3), 1, 1), (torch.arange(6), 0, 1)):
        with pytest.raises(ValueError, match="prompt_windows: ids must be 1-D with at least"):
            prompt_windows(ids, count, length)


def test_bad_arguments_are_refused(model, prompts):
    with pytest.raises(ValueError, match=r"new_tokens at least 1, got \(6, 5\) and 0"):
        greedy_tokens(model, prompts, 0)
    with pytest.raises(ValueError, match=r"prompts must be \[prompts, tokens\].*got \(5,\)"):
        greedy_tokens(model, prompts[0], 3)
    with pytest.raises(ValueError, match=r"with as many rows, got \(6, 5\) and \(2, 4\)"):
        divergence(model, prompts, torch.zeros(2, 4, dtype=torch.int64))
