"""GGUF blocks against the gguf package's own dequantization."""

import numpy as np
import pytest
import torch

from rcp_kernels.integrations.importers import import_gguf

gguf = pytest.importorskip("gguf")

EXACT = ("Q4_0", "IQ4_NL", "MXFP4", "TQ1_0", "TQ2_0")
ROUNDED = {"Q4_1": 1 / 254 + 2**-11, "Q4_K": 1 / 254 + 2**-11, "IQ4_XS": 2**-11}


def random_blocks(name, rows, blocks, seed=0):
    """Random bytes, but for the float16 numbers, which are made finite and of both signs, and MXFP4's exponents."""
    rng = np.random.default_rng(seed)
    qtype = gguf.GGMLQuantizationType[name]
    columns, size = gguf.GGML_QUANT_SIZES[qtype]
    data = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    halves = {
        "Q4_0": (0,),
        "IQ4_NL": (0,),
        "TQ1_0": (52,),
        "TQ2_0": (64,),
        "Q4_1": (0, 2),
        "Q4_K": (0, 2),
        "IQ4_XS": (0,),
    }
    for start in halves.get(name, ()):
        numbers = rng.uniform(-0.1, 0.1, rows * blocks).astype(np.float16)
        numbers[0] = 0
        data[:, start : start + 2] = numbers.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        data[:, 0] = rng.integers(110, 130, rows * blocks)
    if name == "TQ1_0":  # digits below 3 only: the packer never writes another byte
        weights = rng.integers(-1, 2, (rows * blocks, columns)).astype(np.float32)
        weights[:, 0] = 1
        data[:, :52] = gguf.quants.quantize(weights, qtype)[:, :52]
    return qtype, data.reshape(rows, -1)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3)])
def test_formats_that_fit_are_imported_bit_for_bit(name, rows, blocks):
    qtype, data = random_blocks(name, rows, blocks)
    imported = import_gguf(data, qtype)
    assert imported.error == 0.0
    assert torch.equal(imported.dequantize(), torch.from_numpy(gguf.quants.dequantize(data, qtype)))
    assert imported.weight.bits == (2 if name.startswith("TQ") else 4)


@pytest.mark.parametrize("name", ["Q4_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_gguf_quantized(name):
    qtype = gguf.GGMLQuantizationType[name]
    weight = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    weight[0], weight[1, 0] = 0, 1000
    data = gguf.quants.quantize(weight, qtype)
    imported = import_gguf(torch.from_numpy(data), name)
    assert torch.equal(imported.dequantize(), torch.from_numpy(gguf.quants.dequantize(data, qtype)))


@pytest.mark.parametrize("name", ROUNDED)
def test_formats_that_do_not_fit_are_refused_or_rounded(name):
    qtype, data = random_blocks(name, 6, 2)
    with pytest.raises(ValueError, match=rf"import_gguf: {name}: .* pass exact=False to round"):
        import_gguf(data, qtype)
    imported = import_gguf(data, qtype, exact=False)
    values = torch.from_numpy(gguf.quants.dequantize(data, qtype))
    groups = imported.weight.dequantize().view(6, -1, 32), values.view(6, -1, 32)
    largest = (imported.weight.levels.float().abs().amax(-1) * imported.weight.scales * imported.weight.tensor_scale)[
        ..., None
    ]
    worst = float(((groups[0] - groups[1]).abs() / largest.clamp(min=1e-30)).max())
    assert 0 < imported.error <= ROUNDED[name]
    # gguf computes in float32, and relative to the stored largest level, not the source's.
    assert 0 < worst <= imported.error * 1.01 + 1e-6


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q5_K", "Q6_K", "Q8_0", "NVFP4", "IQ2_XXS", "F16"])
def test_other_types_are_refused(name):
    with pytest.raises(ValueError, match=f"qtype must be one of .*, got '{name}'"):
        import_gguf(np.zeros((1, 256), np.uint8), gguf.GGMLQuantizationType[name])


def test_damaged_data_is_refused():
    with pytest.raises(ValueError, match=r"a multiple of 18 bytes"):
        import_gguf(np.zeros((2, 35), np.uint8), "Q4_0")
    with pytest.raises(ValueError, match=r"data must be uint8"):
        import_gguf(np.zeros((2, 36), np.int8), "Q4_0")
    data = np.zeros((2, 18), np.uint8)
    data[1, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=r"scales must be finite, got inf at \[1, 0\]"):
        import_gguf(data, "Q4_0")


def test_a_file_written_by_gguf(tmp_path):
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    qtype = gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(weight, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    imported = import_gguf(tensor.data, tensor.tensor_type)
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(imported.dequantize(), torch.from_numpy(values))
