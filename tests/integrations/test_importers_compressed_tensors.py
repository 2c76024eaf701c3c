"""Layers compressed by compressed-tensors itself, against its own decompression."""

import pytest
import torch

from rcp_kernels.integrations.importers import import_compressed_tensors, import_compressed_tensors_mxfp4

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def compress(kind, bits, rows, columns, group_size, symmetric, dtype, seed=0, **arguments):
    torch.manual_seed(seed)
    strategy = {-1: "channel", None: "tensor"}.get(group_size, "group")
    size = group_size if strategy == "group" else None
    weights = QuantizationArgs(num_bits=bits, group_size=size, strategy=strategy, symmetric=symmetric, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    groups = columns // group_size if strategy == "group" else 1
    shape = (1,) if strategy == "tensor" else (rows, groups)
    scale = (torch.rand(shape) * 0.1 + 1e-3).to(dtype)
    zero = torch.zeros(shape, dtype=torch.int8)
    if not symmetric:
        zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)
    weight = torch.randn(rows, columns).to(dtype) * 0.2
    weight[0] = 0
    weight[-1] = 100 * (-1.0) ** torch.arange(columns)  # both ends of the range
    compressor = BaseCompressor.get_value_from_registry(kind)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress({**packed}, scheme)["weight"]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(1, 32, 32), (33, 256, 128), (13, 192, 64), (9, 512, 256), (7, 45, -1)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pack_quantized(bits, symmetric, rows, columns, group_size, dtype):
    packed, values = compress("pack-quantized", bits, rows, columns, group_size, symmetric, dtype)
    tensors = {f"mlp.{key}": tensor for key, tensor in packed.items()}
    imported = import_compressed_tensors(tensors, "mlp.", bits=bits, group_size=group_size)
    assert imported.error == 0.0
    # The library's values are the imported ones, rounded to its dtype.
    assert torch.equal(imported.dequantize().to(dtype), values)
    exact = {**packed, "weight_scale": packed["weight_scale"].float()}
    assert torch.equal(
        imported.dequantize(), import_compressed_tensors(exact, bits=bits, group_size=group_size).dequantize()
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_scale_and_one_zero_point_for_the_tensor(bits, dtype):
    """The library leaves the zero point of the strategy tensor unpacked."""
    for seed in range(4):
        packed, values = compress("pack-quantized", bits, 7, 45, None, False, dtype, seed)
        assert packed["weight_zero_point"].shape == packed["weight_scale"].shape == (1,)
        imported = import_compressed_tensors(packed, bits=bits)
        assert imported.error == 0.0
        assert torch.equal(imported.dequantize().to(dtype), values)
    with pytest.raises(ValueError, match=rf"weight_zero_point must be {-(2 ** (bits - 1))} to .*, got 100; check bits"):
        import_compressed_tensors({**packed, "weight_zero_point": torch.tensor([100])}, bits=bits)
    with pytest.raises(ValueError, match=r"weight_zero_point must have shape \(1,\), got \(2,\)"):
        import_compressed_tensors({**packed, "weight_zero_point": torch.tensor([0, 0])}, bits=bits)
    with pytest.raises(ValueError, match=r"weight_scale must have shape \(1,\), got \(7,\)"):
        import_compressed_tensors({**packed, "weight_scale": packed["weight_scale"].expand(7)}, bits=bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_that_are_not_packed(bits):
    packed, _ = compress("pack-quantized", bits, 13, 64, 32, False, torch.float16)
    zeros = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (13, 2), dtype=torch.int8)
    plain = import_compressed_tensors({**packed, "weight_zero_point": zeros}, bits=bits, group_size=32)
    symmetric = {key: tensor for key, tensor in packed.items() if key != "weight_zero_point"}
    shift = import_compressed_tensors(symmetric, bits=bits, group_size=32).dequantize().double() - plain.dequantize()
    scale = packed["weight_scale"].double()
    assert torch.equal(shift, (scale * zeros).repeat_interleave(32, dim=1))


def test_a_g_idx_that_was_never_set():
    packed, values = compress("pack-quantized", 4, 8, 64, 32, True, torch.float16)
    for dtype in (torch.int32, torch.int64):
        unset = {**packed, "weight_g_idx": torch.full((64,), -1, dtype=dtype)}
        imported = import_compressed_tensors(unset, bits=4, group_size=32)
        assert imported.permutation is None
        assert torch.equal(imported.dequantize().half(), values)
    mixed = torch.arange(64) // 32
    mixed[3] = -1
    with pytest.raises(ValueError, match="each group of g_idx must have 32 columns"):
        import_compressed_tensors({**packed, "weight_g_idx": mixed}, bits=4, group_size=32)


def test_float32_scales_a_tensor_scale_and_act_order():
    packed, values = compress("pack-quantized", 4, 8, 64, 32, True, torch.float32)
    with pytest.raises(ValueError, match="pass exact=False"):
        import_compressed_tensors(packed, bits=4, group_size=32)
    imported = import_compressed_tensors(packed, bits=4, group_size=32, exact=False)
    assert 0 < imported.error <= 2**-11
    packed, values = compress("pack-quantized", 4, 8, 64, None, True, torch.float16)
    assert torch.equal(import_compressed_tensors(packed, bits=4).dequantize().half(), values)
    packed, values = compress("pack-quantized", 4, 8, 64, 32, True, torch.float16)
    order = torch.randperm(64)
    codes = import_compressed_tensors(packed, bits=4, group_size=32)
    shuffled = import_compressed_tensors(
        {**packed, "weight_g_idx": (torch.arange(64) // 32)[order]}, bits=4, group_size=32
    )
    scale = packed["weight_scale"].double().repeat_interleave(32, dim=1)
    integers = codes.dequantize().double() / scale
    assert torch.equal(shuffled.dequantize().double(), integers * scale[:, order])


def test_mxfp4():
    arguments = {"type": "float", "scale_dtype": torch.uint8}
    packed, _ = compress("mxfp4-pack-quantized", 4, 6, 96, 32, True, torch.float32, **arguments)
    packed["weight_packed"][0] = torch.arange(48, dtype=torch.uint8) * 5  # codes of either sign, both zeros
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=True, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    values = compressor.decompress({**packed}, scheme)["weight"]
    imported = import_compressed_tensors_mxfp4(packed)
    assert imported.error == 0.0
    assert torch.equal(imported.dequantize().to(values.dtype), values)
    packed["weight_scale"][0, 0], packed["weight_scale"][0, 1] = 150, 100
    with pytest.raises(ValueError, match=r"row, group \(0, 1\)"):
        import_compressed_tensors_mxfp4(packed)
    packed["weight_scale"][0, 1] = 255
    with pytest.raises(ValueError, match="scales must be finite"):
        import_compressed_tensors_mxfp4(packed)


def test_other_formats_are_refused():
    packed, _ = compress("pack-quantized", 3, 4, 320, -1, True, torch.float16)
    ten_a_word = {**packed, "weight_packed": torch.zeros((4, 32), dtype=torch.int32)}
    with pytest.raises(ValueError, match="ten 3-bit codes into a word"):
        import_compressed_tensors(ten_a_word, bits=3)
    with pytest.raises(ValueError, match="weight_packed must have shape"):
        import_compressed_tensors(packed, bits=4)
    with pytest.raises(ValueError, match="weight_shape must be in the state dict"):
        import_compressed_tensors({"weight_packed": packed["weight_packed"]}, bits=3)
    nvfp4 = {
        "weight_packed": torch.zeros((2, 32), dtype=torch.uint8),
        "weight_scale": torch.zeros((2, 4), dtype=torch.float8_e4m3fn),
    }
    with pytest.raises(ValueError, match="weight_scale must be uint8"):
        import_compressed_tensors_mxfp4(nvfp4)
