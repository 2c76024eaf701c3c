"""llama.cpp as a peer: its files, its decoding, and the comparison of whole models."""

import csv

import pytest
import torch

from rcp_kernels.bench import whole_model
from rcp_kernels.bench.gguf_files import KINDS, random_llama, requantize
from rcp_kernels.bench.llama_cpp import Library, LlamaCpp, find_library

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(find_library() is None, reason="neither xllamacpp nor llama-cpp-python is installed")

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320,
}  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return Library()


@pytest.fixture(scope="module")
def source(library, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "source.gguf"
    torch.manual_seed(0)
    random_llama(library, path, SHAPE, "Q4_0")
    return path


def values(path):
    return {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def test_decoding_is_deterministic_and_depends_on_the_prompt(library, source):
    model = LlamaCpp(library, source, 64)

    def tokens(prompt):
        model.start(prompt)
        found = [model.token]
        for _ in range(7):
            model.step()
            found.append(model.token)
        return found

    first = tokens(range(10))
    assert all(0 <= token < 320 for token in first)
    assert tokens(range(10)) == first
    assert tokens(range(40, 50)) != first


@pytest.mark.parametrize(("kind", "bound"), list(zip(KINDS, (0.01, 0.45, 0.25), strict=True)))
def test_requantized_weights_are_near_the_source(library, source, tmp_path, kind, bound):
    out = tmp_path / "out.gguf"
    requantize(library, source, out, kind)
    before, after = values(source), values(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] - value).norm() <= bound * value.norm(), name
    assert LlamaCpp(library, out, 32) is not None
    smaller = out.stat().st_size < source.stat().st_size
    assert smaller == (kind != "Q4_0")


def test_a_damaged_file_is_named(library, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"damaged\.gguf"):
        LlamaCpp(library, path, 32)


def test_a_table_of_all_competitors(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    names = ["W2A4", "llama.cpp Q4_0"]

    class Model:
        steps = 0

        def set_threads(self, threads):
            pass

        def start(self, prompt):
            pass

        def step(self):
            Model.steps += 1

    path = tmp_path / "weights.gguf"
    path.write_bytes(bytes(1000))
    monkeypatch.setattr(whole_model, "_make", lambda *_: str(path))
    monkeypatch.setattr(whole_model, "_load", lambda *_: Model())
    monkeypatch.setattr(whole_model, "_resident", lambda *_: 2_000_000)
    monkeypatch.setattr(whole_model, "find_demo_model", lambda: path)
    rows = whole_model.measure(names=names, threads=[1], new_tokens=16, rounds=1, log=lambda _: None)
    assert Model.steps == 2 * 2 * 9
    assert [(row.name, row.threads, row.disk_bytes, row.resident_bytes) for row in rows] == [
        (name, 1, 1000, 2_000_000) for name in names
    ]
    whole_model.write(rows, tmp_path)
    with (tmp_path / "whole_model.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == names
    assert "llama.cpp Q4_0" in whole_model.table(rows)
    with pytest.raises(ValueError, match=r"\.gguf"):
        whole_model.measure("some/model", log=lambda _: None)


def test_the_command(run, monkeypatch, tmp_path):
    rows = [whole_model.Row("W2A4", 1, 10.0, 9.0, 100.0, 90.0, 1000, 2000)]
    given = {}
    monkeypatch.setattr(whole_model, "measure", lambda model, **options: given.update(options, model=model) or rows)
    command = ("bench", "--model", "demo", "--peer", "llama.cpp", "--device", "cpu")
    code, out, _ = run(*command, "--threads", 1, "--threads", 2, "--out", tmp_path)
    assert code == 0
    assert "W2A4" in out
    assert given["threads"] == (1, 2)
    assert given["model"] == "demo"
    assert (tmp_path / "whole_model.csv").exists()
    code, _, err = run(*command, "--bits", 3)
    assert code == 2
    assert "--bits" in err
