"""The benchmarks on a device that is not the CPU: what they run and write. No timing is judged."""

import csv
import json

import pytest
import torch

from rcp_kernels.bench import decode, kv_cache, lut_linear, timing, walsh_transform

OPS = {
    "lut_linear": (["--shape", "64x128"], ["us lut_linear", "device_copy_gb_per_s", "us cuBLAS fp16"]),
    "walsh_transform": (["--size", 64, "--size", 96], ["us walsh_transform", "us memcpy", "us dense matmul"]),
    "kv_cache": (
        ["--positions", 40],
        ["us kv_cache_attention", "device_copy_gb_per_s", "us sdpa fp16", "us dequantize + sdpa"],
    ),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(timing, "rotated_bytes", lambda: 1 << 16)
    monkeypatch.setattr(kv_cache.CudaKVCache, "attentions", ((4, 2, 16),), raising=False)


@pytest.mark.parametrize("op", OPS)
def test_bench_runs_there(run, device, monkeypatch, tmp_path, op):
    pytest.importorskip("matplotlib")
    options, columns = OPS[op]
    if op != "kv_cache":
        options = [*options, "--batch", 2]
    code, out, err = run("bench", "--op", op, *options, "--rounds", 1, "--device", device, "--out", tmp_path)
    assert code == 0, err
    assert "threads" not in out.splitlines()[3]
    (path,) = tmp_path.glob("*.csv")
    assert path.stem.endswith(device.type)
    for row in csv.DictReader(path.open()):
        assert all(float(row[name]) > 0 for name in columns)
        assert row["dtype"] == "float16"
        assert str(device) in row["device"] or device.type == "cuda"


def test_no_competitor_leaves_the_device(device):
    """A competitor on another device would be timed with copies, or fail and be left out."""
    benchmarks = (
        lut_linear.CudaLutLinear(sizes=((64, 128),), batches=(2,), rounds=1, device=device),
        walsh_transform.CudaWalshTransform(sizes=(96,), rows=(2,), rounds=1, device=device),
        kv_cache.CudaKVCache(attentions=((4, 2, 16),), contexts=(5,), rounds=1, device=device),
    )
    for benchmark in benchmarks:
        rows = list(benchmark.measure())
        assert not [row for row in rows if isinstance(row, str)]
        for (shape,) in [benchmark.shapes()]:
            for make in benchmark.competitors().values():
                peer = make(*shape)
                if peer is not None:
                    load = benchmark.loads()[0]
                    assert peer.bind(benchmark.argument(shape, load))(0).device == device


def test_options_of_the_cpu_are_refused(run, device):
    code, _, err = run("bench", "--threads", 1, "--device", device)
    assert code == 2
    assert "--threads does not apply" in err


def test_a_whole_model_decodes_there(run, device, monkeypatch, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    monkeypatch.setitem(decode.SHAPES, "tiny", {**sizes, "num_key_value_heads": 2, "vocab_size": 96})
    seen = set()
    original = decode.Decoder.step

    def step(self):
        original(self)
        seen.add(self.token.device)

    monkeypatch.setattr(decode.Decoder, "step", step)
    options = ["--model", "tiny", "--context", 4, "--new-tokens", 3, "--act-bits", 8]
    code, _, err = run("bench", *options, "--device", device, "--out", tmp_path)
    assert code == 0, err
    assert seen == {device}
    result = json.loads((tmp_path / "tiny_w2a8.json").read_text())
    assert result["conditions"]["device"] == str(device) or device.type == "cuda"
    assert torch.tensor(list(result["seconds"].values())).gt(0).all()
