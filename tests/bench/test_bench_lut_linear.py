"""The benchmark of lut_linear: its competitors, its rows, and what happens where a competitor cannot do a shape."""

import csv
import math
import sys

import pytest
import torch

from rcp_kernels.bench import driver, ggml, lut_linear
from rcp_kernels.bench.driver import Row
from rcp_kernels.bench.lut_linear import CudaLutLinear, LutLinear


def example():
    seconds = {"lut_linear": 1e-3, "plain read": 5e-4, "torch fp32": 8e-3, "torch bf16": 4e-3, "ggml Q2_K": 2e-3}
    seconds[lut_linear.UNIFORM] = 0.9e-3
    case = {"threads": 1, "batch": 1, "out_features": 4096, "in_features": 4096}
    return Row(case, "lut_linear", 5_000_000, seconds)


def test_line_and_summary():
    benchmark = LutLinear()
    assert [cell.strip() for cell in benchmark.line(example()).split("|")] == [
        "1     1   4096   4096",
        "1000.0",
        "5.00",
        "0.50",
        "8.00",
        "4.00",
        "-",
        "2.00 x ggml Q2_K",
        "0.90 x lut_linear, uniform groups",
    ]
    assert "0.50 of plain read, 4.00 x torch float, 8.00 x torch fp32" in benchmark.summary([example()])


def test_competitors_compute_the_same_product():
    """The competitors are what they claim to be: each call is one x W^T of the right shape."""
    for name, build in LutLinear(group_size=64).competitors().items():
        call = build(64, 128).bind(3)
        if name != lut_linear.READ:
            assert call(0).shape == (3, 64)
            assert call(10**6).isfinite().all()


def test_the_roof_is_scaled_to_the_bytes_of_the_weight():
    benchmark = LutLinear(sizes=((64, 128),), batches=(1,), threads=(1,), rounds=1)
    buffer = 1 << 16

    def timer(self, calls, rounds):
        return {name: 1e-3 if name == lut_linear.READ else 2e-3 for name in calls}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LutLinear, "timer", timer)
        (row,) = benchmark.measure()
    assert row.bytes_per_second == pytest.approx(row.nbytes / 2e-3)
    assert row.speedup(lut_linear.READ) == pytest.approx(row.bytes_per_second / (buffer / 1e-3))


def test_a_competitor_that_cannot_do_a_shape_leaves_its_column_blank(capsys):
    """32 is the smallest group and does not divide 100: torch's int4 kernel has no padding."""
    benchmark = LutLinear(sizes=((48, 100), (64, 128)), batches=(1, 2), threads=(1,), rounds=1)
    first, *_, last = driver.run(benchmark)
    assert first.speedup(lut_linear.TORCH_INT4) is None
    assert last.speedup(lut_linear.TORCH_INT4) > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "torch int4 cannot do" in line]
    assert len(lines) == 1
    assert lines[0].startswith("# torch int4 cannot do 48 x 100: ")
    assert benchmark.line(first).split("|")[6].strip() == "-"


def test_our_own_failure_stops_the_run(monkeypatch):
    def fail(*arguments):
        raise NotImplementedError("ours")

    monkeypatch.setattr(lut_linear.ops, "pack_weight", fail)
    with pytest.raises(NotImplementedError, match="ours"):
        next(LutLinear(sizes=((64, 128),)).measure())


@pytest.mark.parametrize(("in_features", "expected"), [(4096, 128), (576, 64), (11008, 128), (100, 32)])
def test_group_size_for(in_features, expected):
    assert lut_linear.group_size_for(in_features, 128) == expected


@pytest.mark.parametrize("kind", ["table", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_random_packed_weight_is_valid(bits, kind):
    weight = lut_linear.random_packed_weight(24, 256, bits, 64, kind).validate()
    std = weight.dequantize().std().item()
    assert 0.3 < std * math.sqrt(256) < 3


def test_the_gpu_columns(tmp_path, monkeypatch):
    """The arithmetic of the columns, on the CPU with times that are made up. The competitors are built and called."""
    nbytes = 48 * 256 // 4 + 48 * 2 * (4 + 2) + 4

    def timer(self, calls, rounds):
        for call, count in calls.values():
            assert {tuple(call(i).shape) for i in range(min(count, 3))} <= {(2, 48), (nbytes,)}
        return {lut_linear.OURS: 2e-6, lut_linear.COPY: 3e-6, lut_linear.CUBLAS: 10e-6}

    monkeypatch.setattr(CudaLutLinear, "timer", timer)
    benchmark = CudaLutLinear(sizes=((48, 256),), batches=(2,), act_bits=8, device=torch.device("cpu"))
    (row,) = benchmark.measure()
    assert row.nbytes == nbytes
    assert row.bytes_per_second == pytest.approx(nbytes / 2e-6)
    assert row.speedup(lut_linear.COPY) == pytest.approx(3 / 2 / 2)  # a copy moves twice the bytes
    assert row.speedup(lut_linear.CUBLAS) == pytest.approx(5)
    assert row.speedup(lut_linear.HUMMING) is None
    titles, line = benchmark.heading(), benchmark.line(row)
    assert [len(cell) for cell in titles.split("|")] == [len(cell) for cell in line.split("|")]
    assert line.split("|")[-1].strip() == "-"
    assert "batch 2: 0.75 of device copy, 5.00 x cuBLAS fp16" in benchmark.summary([row.__class__(
        {**row.case, "out_features": 4096, "in_features": 4096}, row.ours, row.nbytes, row.seconds)])  # fmt: skip
    benchmark.write_csv([row], tmp_path / "out.csv")
    header, values = (text.split(",") for text in (tmp_path / "out.csv").read_text().splitlines())
    columns = dict(zip(header, values, strict=True))
    assert columns["x cuBLAS fp16"] == "5"
    assert columns["x_device_copy"] == "0.75"


def test_write_csv_leaves_a_missing_column_empty(tmp_path):
    driver.write_csv([{"a": 1, "b": 1 / 3}, {"a": 2, "c": None}], tmp_path / "x.csv")
    with (tmp_path / "x.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["a"], first["b"], first["c"]) == ("1", "0.33333", "")
    assert (second["a"], second["b"], second["c"]) == ("2", "", "")
    assert first["torch"] == torch.__version__


def test_ggml_is_found_below_a_folder_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert ggml.find_library() is None
    assert ggml.find_library(tmp_path) is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libggml-cpu.so").write_bytes(b"")
    assert ggml.find_library(tmp_path) == tmp_path / "lib" / "libggml-cpu.so"
    with pytest.raises(OSError, match="libggml-cpu"):
        ggml.Ggml(tmp_path / "lib" / "libggml-cpu.so")


@pytest.mark.skipif(ggml.find_library() is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(("type_name", "tolerance"), [("Q2_K", 0.45), ("Q4_0", 0.15), ("TQ2_0", 1.0)])
def test_ggml_multiplies(type_name, tolerance):
    library = ggml.find_library()
    assert library is not None
    weights = torch.randn(256, 512)
    x = torch.randn(3, 512)
    product = ggml.Weights(ggml.Ggml(library), type_name, weights, 300, copies=2).bind(3, 1, x)
    product(1)
    expected = x @ weights.repeat(2, 1)[:300].T
    assert (product.output() - expected).norm() < tolerance * expected.norm()


@pytest.mark.skipif(ggml.find_library() is None, reason="llama-cpp-python is not installed")
def test_ggml_takes_part_where_its_blocks_divide_a_row():
    competitors = LutLinear(ggml=ggml.find_library()).competitors()
    assert competitors["ggml Q2_K"](64, 576) is None
    competitors["ggml Q4_0"](64, 576).bind(2)(0)
