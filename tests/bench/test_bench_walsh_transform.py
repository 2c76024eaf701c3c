"""The benchmark of walsh_transform: its peers are what they claim to be, and its numbers are derived as documented."""

import csv
import math
import sys
import types

import pytest
import torch

from rcp_kernels import extras, hardware, walsh_matrix
from rcp_kernels.bench import peers
from rcp_kernels.bench.driver import Row, WrongResult
from rcp_kernels.bench.walsh_transform import (
    BUTTERFLY,
    DENSE,
    HADAMARD_TRANSFORM,
    MEMCPY,
    PYFWHT,
    WalshTransform,
)

OURS = ["natural out", "natural in", "sequency out", "sequency in"]


@pytest.fixture
def no_packages(monkeypatch):
    for name in ("hadamard_transform", "pyfwht"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 12, 64, 576, 1024])
def test_every_peer_computes_the_transform(size, dtype):
    for name, build in WalshTransform(dtype=dtype).competitors().items():
        peer = build(size)
        if peer is None:
            assert name in (HADAMARD_TRANSFORM, PYFWHT)
            continue
        for rows in (1, 7):
            x = torch.randn(rows, size).to(dtype)
            before = x.clone()
            call = peer.bind(x)
            assert call(1).shape == x.shape
            assert torch.equal(x, before), f"{name} overwrote the x of its competitors"


@pytest.mark.parametrize("module", ["hadamard_transform", "pyfwht"])
def test_packages_take_part_where_they_are_installed(module):
    if not extras.EXTRAS[module].found:
        pytest.skip(f"{module} is not installed")
    peer = WalshTransform().competitors()[extras.EXTRAS[module].distribution](256)
    for rows in (1, 3, 40):
        peer.bind(torch.randn(rows, 256))


def test_a_peer_that_computes_something_else_is_refused(monkeypatch):
    matrix = walsh_matrix(16).float() / 4
    package = types.ModuleType("hadamard_transform")
    package.hadamard_transform = lambda x: x @ matrix
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "hadamard_transform", package)
    benchmark = WalshTransform(sizes=(16,), rows=(2,), threads=(1,), rounds=1)
    with pytest.raises(WrongResult, match="hadamard-transform does not compute the natural-order transform of size 16"):
        list(benchmark.measure())


def test_a_result_that_is_not_finite_is_refused():
    peer = peers.transform("nothing", lambda x: lambda i: x * math.nan)
    with pytest.raises(WrongResult, match="nothing"):
        peer.bind(torch.randn(2, 16))


def test_packages_are_left_out_where_they_cannot_do_it(no_packages):
    built = WalshTransform().competitors()
    assert built[HADAMARD_TRANSFORM](64) is None
    assert built[PYFWHT](64) is None
    text = WalshTransform().header()
    assert "hadamard-transform not installed: pip install 'rcp-kernels[bench]'" in text
    assert "pyfwht not installed: pip install pyfwht" in text


def test_the_dense_product_stays_out_of_a_small_memory(monkeypatch):
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda *_: 1 << 30)
    assert peers.dense_matmul(DENSE, 16384, torch.float32) is None
    assert peers.dense_matmul(DENSE, 256, torch.float32) is not None


def test_measure(no_packages):
    rows = list(WalshTransform(sizes=(64, 12), rows=(1, 3), threads=(1,), rounds=1).measure())
    assert [(row.case["size"], row.case["rows"]) for row in rows[::4]] == [(64, 1), (64, 3), (12, 1), (12, 3)]
    for row in rows:
        # the four variants of one case and its peers come from the same run
        assert list(row.seconds) == [*OURS, MEMCPY, DENSE, BUTTERFLY]
        assert row.nbytes == 2 * 4 * row.case["rows"] * row.case["size"]
    assert [row.ours for row in rows[:4]] == OURS
    assert [f"{row.case['order']} {row.case['place']}" for row in rows[:4]] == OURS
    assert rows[0].seconds is rows[3].seconds


def example(order="sequency", place="out", rows=512, seconds=1e-3):
    case = {"threads": 1, "rows": rows, "size": 4096, "order": order, "place": place}
    times = dict.fromkeys(OURS, seconds) | {MEMCPY: 8e-4, DENSE: 0.5, BUTTERFLY: 4e-2, PYFWHT: 5e-4}
    times["natural out"] = 5e-4
    return Row(case, f"{order} {place}", 16_000_000, times)


def test_line():
    benchmark = WalshTransform()
    assert [cell.strip() for cell in benchmark.line(example()).split("|")] == [
        "1  512   4096 sequency   out",
        "1000.0",
        "16.0",
        "0.80",
        "500.00",
        "40.00",
        "-",
        "0.50",
    ]
    assert len(benchmark.line(example())) == len(benchmark.heading())
    assert benchmark.line(example("natural")).split("|")[3].strip() == "1.60"


def test_summary_has_one_line_for_each_thread_and_row_count():
    rows = [
        example(order, place, count, seconds)
        for count, seconds in ((1, 1e-3), (512, 1e-3), (512, 4e-3))
        for order in ("natural", "sequency")
        for place in ("out", "in")
    ]
    _, first, second = WalshTransform().summary(rows).splitlines()
    assert first == (
        "threads 1 rows   1: of memcpy 1.60 natural out, 0.80 natural in, 0.80 sequency out, 0.80 sequency in; "
        "500.0 x dense matmul; 40.0 x torch butterfly; 0.5 x pyfwht"
    )
    assert "0.40 sequency out" in second  # the geometric mean of 0.8 and 0.2
    assert "250.0 x dense" in second


def test_command_line(no_packages, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from typer import testing

    from rcp_kernels.cli import app as cli

    arguments = ["bench", "--op", "walsh_transform", "--dtype", "bfloat16", "--isa", "scalar", "--rounds", 1]
    arguments += ["--size", 64, "--size", 48, "--batch", 2, "--threads", 1, "--out", tmp_path]
    result = testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "walsh_transform of bfloat16" in result.output
    assert "kernels use scalar" in result.output
    assert "allocates its result" in result.output
    with (tmp_path / "walsh_transform_bfloat16_scalar.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], f"{row['order']} {row['place']}") for row in rows] == [
        (size, name) for size in ("64", "48") for name in OURS
    ]
    for row in rows:
        us = float(row["us walsh_transform"])
        assert float(row["x memcpy"]) == pytest.approx(float(row["us memcpy"]) / us, rel=1e-3)
        assert float(row["x torch butterfly"]) == pytest.approx(float(row["us torch butterfly"]) / us, rel=1e-3)
        assert float(row["gb_per_s"]) == pytest.approx(2 * 2 * 2 * int(row["size"]) / us / 1e3, rel=1e-3)
        assert row["cpu"] == hardware.cpu_name()
    assert (tmp_path / "walsh_transform_bfloat16_scalar.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "walsh_transform", "--act-bits", "8"), "--act-bits"),
        (("--op", "walsh_transform", "--model", "llama-2-7b"), "--model"),
        (("--size", "64"), "--size"),
    ],
)
def test_options_of_the_other_op_are_wrong_usage(arguments, message):
    from typer import testing

    from rcp_kernels.cli import app as cli

    result = testing.CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert "does not apply" in result.output
