"""The ablation table: cells measured once, resumed only as they began, and the claims checked on their numbers."""

import json

import pytest

pytest.importorskip("transformers")

import ablation
from language_of_numbers import write_model, write_text

from rcp_kernels.data import corpus
from rcp_kernels.methods import student


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    words = write_text(folder / "numbers.txt").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "WINDOW", 16)
        patch.setattr(ablation, "CALIBRATION", 2)
        patch.setattr(ablation, "held_out_text", lambda *_: (words, "numbers"))
        patch.setattr(corpus, "docstring_corpus", lambda *_: corpus.Corpus((words * 20,), 0))
        yield {"model": str(write_model(folder / "model")), "steps": 1, "tokens": 64}


@pytest.fixture(scope="module")
def cells(arguments, tmp_path_factory):
    """Cells of every method; with a second seed of one."""
    folder = tmp_path_factory.mktemp("cells")
    for only in ("FP", "W2A16_gptq_gsr", "W2A4_rtn", "rcp_plus_partition"):
        ablation.run(folder, only=only, **arguments)
    ablation.run(folder, only="W2A16_gptq_gsr", seed=3, **arguments)
    return folder


def test_cells_are_measured(cells):
    found = ablation.read(cells)
    assert len(found) == 8
    rows = [row for rows in found.values() for row in rows]
    assert {row["tokens"] for row in rows} == {64}
    assert min(row["perplexity"] for row in rows) > 1
    assert [row["seed"] for row in found["W2A16", "gptq", "gsr"]] == [0, 3]
    # The same columns in each group, and the same activations in another order (docs/rotate.md): up to float sums.
    same = [found["W2A4", "rtn", name][0]["perplexity"] for name in ("gsr", "local_hadamard")]
    assert same[0] == pytest.approx(same[1], rel=1e-2)


def test_a_cell_that_is_there_is_not_measured_again(cells, arguments, monkeypatch):
    monkeypatch.setattr(ablation, "measure", None)
    for only in ("FP", "W2A16_gptq_gsr", "W2A4_rtn", "rcp_plus_partition"):
        ablation.run(cells, only=only, **arguments)


def test_one_run_and_several_give_the_same(cells, arguments, tmp_path):
    """The model and the texts are read once for all cells of a run: no cell may change them for the next one."""
    for only in ("W2A16_gptq_gsr", "W2A4_rtn_walsh"):
        ablation.run(tmp_path, only=only, **arguments)
    for path in tmp_path.iterdir():
        values = [json.loads((folder / path.name).read_text())["perplexity"] for folder in (tmp_path, cells)]
        assert values[0] == values[1], path.name


def test_a_cell_with_a_cache_is_calibrated_with_it(arguments, tmp_path, monkeypatch):
    caches = []

    class Counted(student.FakeQuantKV):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(student, "FakeQuantKV", Counted)
    ablation.run(tmp_path, only="W2A4_gptq_gsr", **arguments)
    assert caches == []
    ablation.run(tmp_path, only="W2A4KV4_gptq_gsr", **arguments)
    assert len(caches) == 2  # a layer each
    assert min(cache.updates for cache in caches) > 0
    assert {cache.bits for cache in caches} == {4}


def test_cells_of_other_conditions_are_refused(cells, arguments):
    with pytest.raises(ValueError, match="must be measured on 32 tokens as this run is, got 64"):
        ablation.run(cells, only="FP", **{**arguments, "tokens": 32})
    with pytest.raises(ValueError, match=r"training of .*plus_partition.json must be .*'steps': 2.* got .*'steps': 1"):
        ablation.run(cells, only="rcp_plus_partition", **{**arguments, "steps": 2})
    for name in ("FP", "W2A4_rtn_gsr"):
        with pytest.raises(ValueError, match=r"must be of the model 'demo' as this run is, got"):
            ablation.run(cells, only=name, **{**arguments, "model": "demo"})
    with pytest.raises(ValueError, match="--only must be part of a cell's name, got 'W2A5'; the names are FP_float"):
        ablation.run(cells, only="W2A5", **arguments)


def test_a_folder_with_other_files_is_refused_before_anything_is_measured(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "measure", None)
    for other in ('{"results": 1}', "[", "[1]"):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(ValueError, match=r"other\.json must be a cell that ablation wrote, got another file"):
            ablation.run(tmp_path, only="FP", **arguments)


def test_the_table_and_the_plot_have_every_cell(cells, tmp_path):
    pytest.importorskip("matplotlib")
    text = ablation.table(cells)
    assert "GSR equals LH under RTN" in text
    assert text.count(" / ") == 1, "two seeds of one cell"
    ablation.write(cells, tmp_path / "results")
    lines = (tmp_path / "results" / "ablation.csv").read_text().splitlines()
    assert len(lines) == 1 + 9
    assert sum(line.startswith("W2A16,gptq,gsr,3,") for line in lines) == 1
    assert (tmp_path / "results" / "ablation.png").stat().st_size > 1000


def test_claims_are_checked_on_means_over_seeds():
    def rows(*values):
        order = ablation.CLAIMS[0][1]
        return {
            ("W2A16", "gptq", name): [{"perplexity": value} for value in seeds]
            for name, seeds in zip(order, values, strict=True)
        }

    assert "under GPTQ (GSR, table 1): holds" in ablation.checks(rows([1.0], [2.0], [2.0], [3.0]))[0]
    assert "does not hold" in ablation.checks(rows([2.0], [1.0], [2.0], [3.0]))[0]
    assert "does not hold (gsr 4, local_hadamard 3" in ablation.checks(rows([2.0, 8.0], [3.0], [4.0], [5.0]))[0]
    assert ablation.checks({}) == []
