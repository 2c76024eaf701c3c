"""The bench command: usage, files, and both kinds of output on shapes small enough to take no time."""

import csv
import sys

import pytest

from rcp_kernels import hardware
from rcp_kernels.bench.lut_linear import LutLinear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--act-bits", "5"), "got 5"),
        (("bench", "--group-size", "48"), "got 48"),
        (("bench", "--bits", "5"), "--bits"),
        (("bench", "--shape", "4096"), "4096x4096"),
        (("bench", "--dtype", "int8"), "int8"),
        (("bench", "--model", "llama-2-7b", "--threads", "1", "--threads", "2"), "one --threads"),
        (("bench", "--model", "llama-2-7b", "--shape", "64x64"), "--shape does not apply with --model"),
        (("bench", "--model", "llama-2-7b", "--rounds", "2"), "--rounds does not apply with --model"),
        (("bench", "--new-tokens", "2"), "--new-tokens applies only with --model"),
        (("bench", "--save", "/tmp"), "--save applies only with --model"),
        (("bench", "--model", "llama-2-7b", "--out", "/proc/x"), "cannot create folder /proc/x"),
        (("bench", "--clock", "cpu"), "--clock applies only with --model"),
        (("bench", "--compile"), "--compile applies only with --model"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_the_output_folder_is_made_before_measuring(run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def measure(*arguments):
        assert (tmp_path / "a" / "b").is_dir()
        raise RuntimeError("reached")

    monkeypatch.setattr(LutLinear, "measure", measure)
    code, _, err = run("bench", "--out", tmp_path / "a" / "b")
    assert code == 1
    assert "reached" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--model", "gpt-9"), "unknown model 'gpt-9'; one of: llama-2-7b"),
        (("bench", "--ggml", "/nowhere"), "no libggml-cpu"),
    ],
)
def test_what_cannot_be_done_exits_with_1(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 1
    assert message in err


def test_an_instruction_set_that_the_cpu_lacks(run):
    if hardware.cpu_isa_supported() == "amx":
        pytest.skip("this CPU has them all")
    code, _, err = run("bench", "--isa", "amx")
    assert code == 1
    assert "amx" in err


def test_bench(run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    shapes = ("--shape", "64x128", "--shape", "96x576")
    arguments = ("--batch", 1, "--batch", 3, "--threads", 1, "--rounds", 2, "--isa", "scalar", "--out", tmp_path)
    code, out, err = run("bench", *shapes, *arguments)
    assert code == 0, err
    assert "ggml not installed" in out
    assert "kernels use scalar" in out
    rows = list(csv.DictReader((tmp_path / "lut_linear_w2a4_scalar.csv").open()))
    assert [(row["out_features"], row["batch"], row["group_size"]) for row in rows] == [
        ("64", "1", "128"),
        ("64", "3", "128"),
        ("96", "1", "64"),
        ("96", "3", "64"),
    ]
    # 2 bits, 4 bytes of levels and 2 of scale for each group of 128, and the tensor's own scale
    assert int(rows[0]["weight_bytes"]) == 64 * 128 * 2.375 / 8 + 4
    for row in rows:
        assert float(row["x torch bf16"]) == pytest.approx(
            float(row["us torch bf16"]) / float(row["us lut_linear"]), rel=1e-3
        )
        assert float(row["x_plain_read"]) == pytest.approx(
            float(row["gb_per_s"]) / float(row["plain_read_gb_per_s"]), rel=1e-3
        )
    assert (tmp_path / "lut_linear_w2a4_scalar.png").stat().st_size > 1000
