"""``rcp-kernels check --bench``: every section gives times, the budget is kept, and a wrong result is no time."""

import itertools
import json
import time

import pytest
import torch

from rcp_kernels import ops
from rcp_kernels.bench import card, graph_decode, timing
from rcp_kernels.bench.card import Measured, Section, measure_card, plan
from rcp_kernels.check import run as check_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Little data, few rounds and no checks: these tests are about what is timed."""
    monkeypatch.setattr(card, "_SMALL_ROTATION", 1 << 16)
    monkeypatch.setattr(card, "_SMALL_LINEAR", ((64, 128),))
    monkeypatch.setattr(timing, "_TURN_SECONDS", 1e-5)
    monkeypatch.setattr(
        graph_decode,
        "SMALL_SHAPE",
        {**graph_decode.SMALL_SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
    )


@pytest.fixture
def no_checks(monkeypatch):
    monkeypatch.setattr(check_run, "all_cases", list)


def test_the_command_writes_times(run, no_checks, tmp_path):
    pytest.importorskip("matplotlib")
    code, out, err = run("check", "--device", "cpu", "--bench", "--seconds", 60, "--out", tmp_path)
    assert code == 0, out + err
    written = json.loads((tmp_path / "check.json").read_text())
    titles = [section["title"].split()[0] for section in written["bench"]]
    assert titles == ["lut_linear", "decoding", "walsh_transform", "attention"]
    for section in written["bench"]:
        assert section["error"] is None
        assert section["left_out"] == []
        assert all(section["peer"] in row["us"] and row["us"][row["ours"]] > 0 for row in section["rows"])
    text = (tmp_path / "check.md").read_text()
    assert "64 x 128, batch 8" in text
    assert "64 x 128, batch 8" in out
    assert "walsh_transform of float32 [rows, n]" in out
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_result_is_an_error_and_no_time(run, no_checks, monkeypatch, tmp_path):
    true = ops.kv_cache_attention
    monkeypatch.setattr(ops, "kv_cache_attention", lambda *a, **o: true(*a, **o) + 0.1)
    code, out, _ = run("check", "--device", "cpu", "--bench", "--seconds", 60, "--out", tmp_path)
    assert code == 1
    assert "FAILED attention of one float32 query token" in out
    section = json.loads((tmp_path / "check.json").read_text())["bench"][-1]
    assert section["rows"] == []
    assert section["left_out"] == ["9 heads on 3 of 64, 512 positions"]


def test_seconds_without_bench_is_wrong_usage(run):
    code, _, err = run("check", "--seconds", 60)
    assert code == 2
    assert "--bench" in err


def endless(name, seconds):
    """A section that takes `seconds` a case."""

    def cases():
        for i in itertools.count():
            time.sleep(seconds)
            yield f"{name} {i}", "ours", {"ours": 1e-6, "peer": 2e-6}

    return Section(name, "peer", [f"{name} {i}" for i in range(100)], cases, 0.5)


def test_the_budget_is_kept_and_what_is_left_out_is_named():
    start = time.monotonic()
    first, second = measure_card(CPU, 0.4, sections=[endless("a", 0.02), endless("b", 0.02)])
    assert time.monotonic() - start < 5
    for name, result in (("a", first), ("b", second)):
        assert result.rows
        assert result.rows[0]["us"] == {"ours": 1.0, "peer": 2.0}
        assert [row["case"] for row in result.rows] + result.left_out == [f"{name} {i}" for i in range(100)]
        assert f"left out for lack of time, {len(result.left_out)} cases" in result.remarks()[-1]


def test_a_section_that_fails_does_not_end_the_run():
    def broken():
        yield "# a peer cannot do this"
        raise RuntimeError("CUDA error\nsecond line")

    bad = Section("bad", "peer", ["x"], broken, 0.5)
    results = measure_card(CPU, 1.0, sections=[bad, endless("b", 0.01)])
    assert results[0].error == "RuntimeError: CUDA error"
    assert results[0].remarks() == [
        "FAILED bad: RuntimeError: CUDA error",
        "a peer cannot do this",
        "left out after the error, 1 cases: x",
    ]
    assert results[1].rows


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"seconds must be .* got 0"):
        measure_card(CPU, 0)


def test_a_table_has_a_dash_where_a_peer_has_no_time():
    rows = [{"case": "a", "ours": "o", "us": {"o": 2.0, "p": 4.0}}, {"case": "b", "ours": "o", "us": {"o": 1.0}}]
    assert Measured("t", "p", rows).cells() == (["case", "us", "x p"], [["a", "2.00", "2.00"], ["b", "1.00", "-"]])


def test_every_section_measures_another_device(device, monkeypatch):
    """The classes that a GPU takes, at little shapes. Without a GPU the clock of the CPU times them."""
    monkeypatch.setattr(card, "LARGE_SHAPES", ((64, 128),))
    monkeypatch.setattr(card, "BATCHES", (1, 33))
    monkeypatch.setattr(graph_decode, "fitting_layers", lambda device: 1)
    monkeypatch.setitem(card.SHAPES, "llama-2-7b", dict(graph_decode.SMALL_SHAPE))
    monkeypatch.setattr(card, "CUDA_WALSH_SIZES", (64, 96))
    monkeypatch.setattr(card, "CUDA_CACHES", {"attentions": ((4, 2, 64),), "contexts": (40,)})
    results = measure_card(device, 60.0)
    assert [result.error for result in results] == [None] * 6
    assert [result.left_out for result in results] == [[]] * 6
    for result in results:
        assert all(result.peer in row["us"] for row in result.rows)
    assert {section.title for section in plan(device, 60.0)} == {result.title for result in results}


def test_a_graph_reads_16_to_256_copies(monkeypatch):
    """Four times L2, but a million copies of one short row would never be captured."""

    class Card:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    for nbytes, copies in ((0, 256), (256, 256), (5 << 20, 40), (1 << 30, 16)):
        assert timing.copies_needed(nbytes, torch.device("cuda")) == copies


def test_as_many_layers_as_fit_on_the_card(monkeypatch):
    free = {"bytes": 140 << 30}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 0))
    assert graph_decode.fitting_layers(torch.device("cuda")) == 32
    free["bytes"] = 8 << 30
    assert 8 <= graph_decode.fitting_layers(torch.device("cuda")) <= 14
    free["bytes"] = 1 << 30
    assert graph_decode.fitting_layers(torch.device("cuda")) == 1
