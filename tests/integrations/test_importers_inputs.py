"""What all importers take alike: tensors or numpy arrays, and a bias beside them."""

import numpy as np
import pytest
import torch

from rcp_kernels import QuantLinear
from rcp_kernels.integrations.importers import (
    import_any_precision,
    import_awq,
    import_compressed_tensors,
    import_compressed_tensors_mxfp4,
    import_gguf,
    import_gptq,
    import_lut,
    import_squeezellm,
    undo_llama_permutation,
)

ROWS, COLUMNS = 16, 64


def words(*shape):
    return torch.from_numpy(np.random.default_rng(0).integers(-(2**31), 2**31, shape).astype(np.int32))


def octets(*shape, top=256):
    return torch.from_numpy(np.random.default_rng(0).integers(0, top, shape).astype(np.uint8))


def scales(*shape):
    return torch.from_numpy(np.random.default_rng(0).uniform(0.01, 0.1, shape)).half()


TABLES = torch.arange(-8.0, 8.0).repeat(ROWS, 1)
# Each importer of a mapping, with its settings and the tensors of a layer.
MAPPINGS = {
    "gptq": (
        import_gptq,
        {"bits": 4, "group_size": 32, "version": 2},
        {"qweight": words(8, ROWS), "qzeros": words(2, 2), "scales": scales(2, ROWS), "g_idx": torch.arange(64) % 2},
    ),
    "awq": (
        import_awq,
        {"group_size": 32},
        {"qweight": words(COLUMNS, 2), "qzeros": words(2, 2), "scales": scales(2, ROWS)},
    ),
    "compressed-tensors": (
        import_compressed_tensors,
        {"bits": 4, "group_size": 32},
        {
            "weight_packed": words(ROWS, 8),
            "weight_scale": scales(ROWS, 2),
            "weight_zero_point": words(2, 2),
            "weight_g_idx": torch.arange(64) % 2,
            "weight_shape": torch.tensor([ROWS, COLUMNS]),
        },
    ),
    "mxfp4": (
        import_compressed_tensors_mxfp4,
        {},
        {"weight_packed": octets(ROWS, 32), "weight_scale": octets(ROWS, 2, top=8) + 120},
    ),
    "squeezellm": (import_squeezellm, {"bits": 4}, {"qweight": words(8, ROWS), "lookup_table": TABLES}),
    "any-precision": (import_any_precision, {"bits": 4}, {"qweight": words(4, ROWS, 2), "lut4": TABLES.half()}),
}


@pytest.mark.parametrize("name", MAPPINGS)
def test_numpy_arrays_are_read_as_tensors_are(name):
    read, settings, tensors = MAPPINGS[name]
    tensors = {**tensors, "bias": torch.randn(ROWS)}
    expected = read(tensors, **settings)
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    frozen = {key: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for key, array in arrays.items()}
    assert not any(array.flags.writeable for array in frozen.values())
    reversed_twice = {key: array[::-1].copy()[::-1] for key, array in arrays.items()}
    for other in (arrays, frozen, reversed_twice):
        imported = read(other, **settings)
        assert torch.equal(imported.dequantize(), expected.dequantize())
        assert torch.equal(imported.bias, tensors["bias"])


@pytest.mark.parametrize("name", MAPPINGS)
def test_what_is_no_array_is_named_by_its_type(name):
    read, settings, tensors = MAPPINGS[name]
    for key, tensor in tensors.items():
        for bad, found in (
            (tensor.tolist(), "list"),
            (None, "NoneType"),
            (tensor.numpy().astype("U"), "numpy array of"),
        ):
            with pytest.raises(ValueError, match=rf": {key} must be .*got .*{found}") as raised:
                read({**tensors, key: bad}, **settings)
            assert len(str(raised.value)) < 300
            assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=rf"{key} must be .*got torch.complex64") as raised:
            read({**tensors, key: tensor.to(torch.complex64).numpy()}, **settings)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize("prefix", ["", "model.up_proj."])
def test_a_bias_beside_the_tensors_is_imported(name, prefix):
    read, settings, tensors = MAPPINGS[name]
    assert read(tensors, **settings).bias is None
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        bias = torch.linspace(-2, 2, ROWS).to(dtype)
        state = {f"{prefix}{key}": tensor for key, tensor in {**tensors, "bias": bias}.items()}
        imported = read({**state, "other.bias": torch.ones(3)}, prefix, **settings)
        assert torch.equal(imported.bias, bias)
        layer = QuantLinear.from_imported(imported, act_bits=16)
        x = torch.randn(3, COLUMNS)
        expected = x.double() @ imported.dequantize().double().t() + bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-3)
    for bad in (torch.ones(ROWS + 1), torch.ones(ROWS, dtype=torch.int32), torch.ones(ROWS, device="meta")):
        with pytest.raises(ValueError, match=rf"bias must be floating point of shape \({ROWS},\) with values, got"):
            read({**tensors, "bias": bad}, **settings)


def test_codes_and_tables_and_blocks():
    codes = octets(ROWS, COLUMNS, top=16)
    bias = torch.randn(ROWS)
    for given in ((codes, TABLES, bias), (codes.numpy(), TABLES.numpy(), bias.numpy())):
        imported = import_lut(given[0], given[1], bits=4, bias=given[2])
        assert torch.equal(imported.dequantize(), TABLES.gather(1, codes.long()))
        assert torch.equal(imported.bias, bias)
    with pytest.raises(ValueError, match=r"import_lut: codes must be a tensor or a numpy array .*got list"):
        import_lut(codes.tolist(), TABLES, bits=4)
    blocks = octets(ROWS, 36)
    blocks[:, 1::18] = 0x21
    for data, offset in ((blocks, bias), (blocks.numpy(), bias.numpy())):
        imported = import_gguf(data, "Q4_0", bias=offset)
        assert torch.equal(imported.bias, bias)
    with pytest.raises(ValueError, match="import_gguf: Q4_0: bias must be floating point of shape"):
        import_gguf(blocks, "Q4_0", bias=bias[1:])
    with pytest.raises(ValueError, match=r"qtype must be one of .*, got a ndarray, which") as raised:
        import_gguf("Q4_0", blocks.numpy())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (1, 1), (8, 1)])
def test_llama_permutation(heads, kv_heads):
    """Against the converter's own permutation, on weight, bias and every head count."""

    def permute(weights, n_head, n_head_kv):  # as in llama.cpp's convert_hf_to_gguf.py
        n_head = n_head if n_head_kv is None or n_head == n_head_kv else n_head_kv
        halves = weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        return halves.swapaxes(1, 2).reshape(weights.shape)

    for count, given in ((heads, None), (kv_heads, kv_heads)):
        rows = 8 * count
        codes, tables = octets(rows, COLUMNS, top=16), torch.rand(rows, 1) * TABLES[:1]
        bias = np.random.default_rng(0).standard_normal(rows)
        source = import_lut(codes, tables.half().float(), bits=4, exact=False, bias=bias)
        stored = import_lut(
            permute(codes.numpy(), heads, given),
            permute(tables.half().float().numpy(), heads, given),
            bits=4,
            exact=False,
            bias=permute(bias, heads, given),
        )
        undone = undo_llama_permutation(stored, count)
        assert torch.equal(undone.dequantize(), source.dequantize())
        assert torch.equal(undone.bias, source.bias)
        assert undone.weight.validate().codes.is_contiguous()
        assert undone.error == stored.error
        assert undo_llama_permutation(import_lut(codes, tables, bits=4, exact=False), count).bias is None
        if rows > 2:
            assert not torch.equal(stored.dequantize(), source.dequantize())
    for bad in (0, -1, 3, 2.0, True, rows):
        with pytest.raises(ValueError, match=rf"undo_llama_permutation: heads must be an int.*got {bad!r}; use"):
            undo_llama_permutation(stored, bad)
