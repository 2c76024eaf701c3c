"""Decoding whole models: sizes, memory, files, and turns."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from rotated_models import IDS, make_model
from torch._dynamo.testing import CompileCounterWithBackend

from rcp_kernels import QuantLinear, hardware, quantize_model
from rcp_kernels.bench import decode

TINY = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(decode.SHAPES, "tiny", TINY)


def test_llama_2_7b_has_the_published_sizes():
    linears, others = decode.weight_counts(decode.SHAPES["llama-2-7b"])
    assert linears == 6_476_005_376
    assert others == 262_144_000 + 266_240
    assert 16 * (linears + others) / (2.375 * linears + 16 * others) > 5.4


@pytest.mark.parametrize(
    ("model", "total"), [("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-3-8b", 8_030_261_248)]
)
def test_published_parameter_counts(model, total):
    assert sum(decode.weight_counts(decode.SHAPES[model])) == total


def test_bench_model(run, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "saved"
    code, out, err = run(
        "bench", "--model", "tiny", "--context", 4, "--new-tokens", 3, "--threads", 1,
        "--save", folder, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "x faster" in out
    result = json.loads((tmp_path / "tiny_w2a4.json").read_text())
    linears, others = decode.weight_counts(TINY)
    assert result["fp16_bytes"] == 2 * (linears + others)
    # 2.375 bits a weight, 16 bits for the rest, and per linear the scalar tensor_scale and five int64 of format
    expected = 2.375 / 8 * linears + 2 * others + TINY["num_hidden_layers"] * 7 * (4 + 40)
    assert result["packed_bytes"] == expected

    tensors = safetensors.load_file(folder / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == expected
    layer = QuantLinear(TINY["intermediate_size"], TINY["hidden_size"], bias=False)
    prefix = "model.layers.1.mlp.down_proj."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    assert layer.dequantize().isfinite().all()


def test_json_without_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    arguments = ("--context", 2, "--new-tokens", 2, "--threads", 1, "--out", tmp_path / "new")
    code, _, err = run("bench", "--model", "tiny", *arguments)
    assert code == 0, err
    assert (tmp_path / "new" / "tiny_w2a4.json").is_file()


def test_a_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda *_: 8 << 30)
    with pytest.raises(MemoryError, match=r"13\.5 GB .* fewer --layers"):
        decode.measure("llama-2-7b", log=lambda text: None)


def test_one_after_the_other_where_memory_is_short(monkeypatch):
    floats = 2 * sum(decode.weight_counts(TINY))
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda *_: (1 << 30) + floats + 1000)
    result = decode.measure("tiny", context=2, new_tokens=2, log=lambda text: None)
    assert not result.interleaved
    assert result.speedup > 0
    assert "memory does not hold both" in decode.text(result)


def test_layers_of_the_demo_cannot_be_left_out():
    with pytest.raises(ValueError, match="layers must be left out for the demo's model, got 2"):
        decode.measure("demo", layers=2)


def test_random_models_are_complete():
    """No parameter is left without memory, both models share their ends, and they decode finite logits."""
    builders = decode.random_builders(TINY, 2, 64, 4)
    ours, reference = (build() for build in builders.values())
    assert not any(tensor.is_meta for model in (ours, reference) for tensor in (*model.parameters(), *model.buffers()))
    assert ours.lm_head.weight is reference.lm_head.weight
    assert sum(isinstance(module, QuantLinear) for module in ours.modules()) == 14
    for model in (ours, reference):
        logits = model(input_ids=torch.arange(5)[None]).logits
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


def test_all_take_turns():
    reference = make_model("llama")
    ours = make_model("llama")
    quantize_model(ours, 2, 32, 4, levels="uniform")
    counter = CompileCounterWithBackend("aot_eager")
    lines, called = [], []
    seconds = decode.decode_seconds(
        {decode.OURS: ours.to(torch.bfloat16), decode.TORCH: reference.to(torch.bfloat16)},
        IDS[:1],
        10,
        compiled=True,
        clock="cpu",
        backend=counter,
        log=lines.append,
        ready=lambda: called.append(counter.frame_count),
    )
    assert len(lines) == 2
    assert called == [counter.frame_count] == [2]  # one graph for each model, all of them before the first turn
    ways = (decode.EAGER, decode.EAGER_STATIC, decode.COMPILED)
    assert set(seconds) == {f"{model} {way}" for model in (decode.OURS, decode.TORCH) for way in ways}
    assert min(seconds.values()) > 0
    assert decode._turns(10) * 8 == 16


def test_text():
    seconds = {f"{decode.OURS} {decode.EAGER}": 0.004, f"{decode.TORCH} {decode.EAGER}": 0.01}
    result = decode.Result(
        model="m", layers=3, bits=2, act_bits=4, group_size=32, context=12, new_tokens=16, threads=1, interleaved=True,
        conditions=hardware.conditions(), packed_bytes=10**9, fp16_bytes=5 * 10**9, clock="cpu", seconds=seconds,
    )  # fmt: skip
    text = decode.text(result)
    assert "W2A4 in groups of 32, batch 1, 16 tokens after 12" in text
    assert "medians of cpu time, in turn" in text
    assert "2.50 x faster, 5.00 x smaller" in text
    assert result.to_dict()["speedup"] == pytest.approx(2.5)
