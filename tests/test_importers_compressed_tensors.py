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
