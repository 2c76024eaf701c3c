"""Text that a model writes: the distribution of samples, batches against single prompts, and the cache."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from rcp_kernels.data import by_name as sources
from rcp_kernels.data import corpus
from rcp_kernels.data import generated as generated_text
from rcp_kernels.data.generated import cached_texts, chat_prompts, generate_texts, opening_prompts

SPECIAL = 95


class Tokenizer:
    """A token is a character of two digits; 95 ends a text."""

    all_special_ids = (SPECIAL,)
    chat_template = None

    def __call__(self, text, **_):
        return SimpleNamespace(input_ids=[int(text[i : i + 2]) for i in range(0, len(text) - 1, 2)])

    def decode(self, ids):
        return "".join(f"{int(i):02d}" for i in ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=128,
        eos_token_id=SPECIAL,
        pad_token_id=SPECIAL,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # with small weights the next token would not depend on the tokens before
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return model


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(95, (length,), generator=generator) for length in lengths]


# --- sampling


def test_no_impossible_token_is_sampled():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]]).repeat(1000, 1)
    sampler = generated_text._Sampler(1.0, 1.0, torch.Generator().manual_seed(0))
    assert set(sampler(torch.zeros(1000, 1, dtype=torch.int64), logits).argmax(-1).tolist()) == {1, 2}


@pytest.mark.parametrize("spread", [4.0, 0.01])
def test_top_p_keeps_the_smallest_set_of_that_probability(spread):
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * spread
    order = logits[0].argsort(descending=True)
    cumulative = logits.double().softmax(-1)[0, order].cumsum(0)
    nucleus = order[: int((cumulative < 0.5).sum()) + 1]
    sampler = generated_text._Sampler(1.0, 0.5, torch.Generator().manual_seed(0))
    chosen = sampler(torch.zeros(20000, 1, dtype=torch.int64), logits.repeat(20000, 1)).argmax(-1)
    assert set(chosen.tolist()) == set(nucleus.tolist())


# --- batches


def test_greedy_text_is_that_of_transformers_for_prompts_of_any_lengths(model):
    texts = generate_texts(model, Tokenizer(), prompts(1, 9, 4, 4, 17), max_new_tokens=12, temperature=0, batch_size=3)
    for prompt, text in zip(prompts(1, 9, 4, 4, 17), texts, strict=True):
        expected = model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0]
        assert torch.equal(text, expected[: len(text)])
        assert len(text) == len(prompt) + 12 or text[-1] == SPECIAL


def test_the_same_seed_gives_the_same_text_with_any_number_of_workers(model, one_thread):
    options = {"max_new_tokens": 10, "temperature": 1.0, "batch_size": 2}
    one, again, other = (
        generate_texts(model, Tokenizer(), prompts(3, 5, 4, 6, 2), **options, **more)
        for more in ({}, {"workers": 2}, {"seed": 1})
    )
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_a_text_ends_with_its_first_special_token(model):
    done = []
    texts = generate_texts(
        model, Tokenizer(), prompts(*[3] * 200), max_new_tokens=60, temperature=1.5, progress=lambda *a: done.append(a)
    )
    ended = [text for text in texts if text[-1] == SPECIAL]
    assert 20 < len(ended) < 200
    assert all(not (text[3:-1] == SPECIAL).any() for text in texts)
    assert all(len(text) == 63 for text in texts if text[-1] != SPECIAL)
    assert [row[:2] for row in done] == [(128, 200), (200, 200)]


def test_sampled_tokens_have_the_distribution_of_the_model(model):
    prompt = prompts(5)[0]
    texts = generate_texts(model, Tokenizer(), [prompt] * 4000, max_new_tokens=1, temperature=0.7, batch_size=2000)
    counts = torch.bincount(torch.stack(texts)[:, -1], minlength=96).double()
    with torch.no_grad():
        expected = (model(prompt[None]).logits[0, -1].double() / 0.7).softmax(-1) * 4000
    # Five standard deviations of each count.
    assert bool(((counts - expected).abs() <= 5 * expected.sqrt() + 1).all())


def test_prompts_may_be_text_and_the_models_own_settings_neither_count_nor_change(model, monkeypatch):
    prompts = ["0102", torch.tensor([1, 2])]
    plain = generate_texts(model, Tokenizer(), prompts, max_new_tokens=20, temperature=0)
    assert torch.equal(*plain)
    own = transformers.GenerationConfig(repetition_penalty=100.0, do_sample=True, top_k=3, max_length=5)
    monkeypatch.setattr(model, "generation_config", own)
    assert all(map(torch.equal, generate_texts(model, Tokenizer(), prompts, max_new_tokens=20, temperature=0), plain))
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("given_prompts", "options", "message"),
    [
        ([""], {}, r"every prompt must have at least one token, got shape \(0,\) for prompt 0"),
        (["01"], {"max_new_tokens": 0}, "max_new_tokens and batch_size must be at least 1"),
        (["01"], {"temperature": -1.0}, r"got 4, 128, -1\.0 and 1\.0"),
        (["01"], {"top_p": 0.0}, r"top_p in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_named(model, given_prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate_texts(model, Tokenizer(), given_prompts, **{"max_new_tokens": 4, **options})


# --- prompts and cache


def test_openings_are_the_first_tokens_of_documents_that_have_enough():
    documents = ["0102030405", "060708", "1112131415"]
    found = opening_prompts(Tokenizer(), documents, 5, 4)
    assert sorted(row.tolist() for row in found) == [[1, 2, 3, 4], [11, 12, 13, 14]]
    assert len(opening_prompts(Tokenizer(), documents, 1, 2)) == 1


def test_chat_prompts_need_a_template():
    with pytest.raises(ValueError, match="must have a chat template, got none"):
        chat_prompts(Tokenizer(), ["why?"])


def test_questions_are_of_the_running_python_and_differ():
    questions = corpus.python_questions()
    assert len(set(questions)) == len(questions) > 1000
    assert "Explain the keyword `with` of Python." in questions


def test_texts_are_written_once_for_the_same_conditions(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return ["one", "zwölf"]

    for _ in range(2):
        assert cached_texts(tmp_path / "new", {"seed": 0}, make) == ["one", "zwölf"]
    assert len(calls) == 1
    cached_texts(tmp_path / "new", {"seed": 1}, make)
    assert len(calls) == 2
    for path in (tmp_path / "new").iterdir():
        assert "conditions" in json.loads(path.read_text())
        path.write_text('{"conditions": {')
    assert cached_texts(tmp_path / "new", {"seed": 0}, make) == ["one", "zwölf"]
    assert len(calls) == 3


def test_a_folder_that_cannot_be_is_found_before_the_texts_are_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        cached_texts(tmp_path / "file" / "text", {}, lambda: pytest.fail("made for nothing"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        cached_texts(tmp_path, {}, lambda: ["text"])
    assert list(tmp_path.iterdir()) == []


# --- the mix


class WordTokenizer(Tokenizer):
    """A token is a word."""

    def __call__(self, text, return_tensors=None, **_):
        return SimpleNamespace(input_ids=torch.zeros(1, len(text.split()), dtype=torch.int64))


def document(kind, number):
    return "\n\n".join(f"{kind} {number} {part} " + "word " * 27 for part in range(4))


@pytest.fixture
def few_documents(monkeypatch):
    for kind in ("docstring", "comment"):
        found = corpus.Corpus(tuple(document(kind, i) for i in range(40)), 0)
        monkeypatch.setattr(corpus, f"{kind}_corpus", lambda found=found: found)
    stolen = " ".join(corpus.held_out_default().split()[1000:1040])
    written = [f"{document('generated', i)}\n\n{stolen}" for i in range(40)]
    monkeypatch.setattr(sources, "_generated", lambda *_: written)
    return stolen


def test_mixed_text_has_its_shares_and_none_of_the_held_out_text(model, few_documents):
    text, facts = sources.training_text("mixed", 6000, model=model, tokenizer=WordTokenizer())
    assert [facts[kind]["tokens"] // 121 for kind in ("docstrings", "comments", "generated")] == [20, 20, 10]
    assert [text.count(f"{kind} 0 0") for kind in ("docstring", "comment", "generated")] == [1, 1, 1]
    assert facts["generated"]["dropped_paragraphs"] == 1  # the other 39 are repetitions, which do not count
    assert few_documents not in text
    only, facts = sources.training_text("generated", 6000, model=model, tokenizer=WordTokenizer())
    assert "docstrings" not in facts
    assert only.count("generated") == 160


def test_written_text_needs_a_model_and_one_process(model, monkeypatch):
    with pytest.raises(ValueError, match="mixed needs a model that writes it, got none"):
        sources.training_text("mixed", 100)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="generated must be written by one process, got 2"):
        sources.training_text("generated", 100, model=model, tokenizer=WordTokenizer())


def test_what_the_model_writes_is_kept_for_the_next_run(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RCP_CACHE_DIR", str(tmp_path))
    found = corpus.Corpus(tuple(f"{i:02d}" * 20 for i in range(10, 30)), 0)
    phases = []
    writer = sources._Writer(model, Tokenizer(), 0, torch.device("cpu"), lambda *row: phases.append(row[0]))
    first = sources._generated(found, 1500, writer)
    assert len(first) == 10
    assert all(len(text) > 32 for text in first)
    assert phases == ["writing text"]
    assert sources._generated(found, 1500, writer) == first
    assert len(phases) == 1
