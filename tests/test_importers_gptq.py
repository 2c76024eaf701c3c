"""GPTQ layers packed by AutoGPTQ 0.7.1 itself (tests/importers_data), and what its files do not cover, by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rcp_kernels.integrations.importers import import_gptq

DATA = Path(__file__).parent / "importers_data"


def load(name):
    with np.load(DATA / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def stream(codes, bits):
    """Codes [length, M] -> int32 words [length * bits / 32, M], bit by bit, independently of the importer."""
    length, columns = codes.shape
    words = np.zeros((-(-length * bits // 32), columns), np.uint64)
    for k in range(length):
        for bit in range(bits):
            position = k * bits + bit
            words[position // 32] |= ((codes[k].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(
                position % 32
            )
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def layer(bits, rows=32, columns=64, group_size=32, version=1, seed=0, zeros=None, dtype=torch.float16):
    rng = np.random.default_rng(seed)
    groups = -(-columns // group_size)
    codes = rng.integers(0, 2**bits, (columns, rows))
    if zeros is None:
        zeros = rng.integers(1 if version == 1 else 0, 2**bits, (groups, rows))
    scales = torch.from_numpy(rng.uniform(1e-3, 0.1, (groups, rows))).to(dtype)
    tensors = {
        "qweight": stream(codes, bits),
        "qzeros": stream((zeros - (version == 1)).T, bits).T.contiguous(),
        "scales": scales,
    }
    group = np.arange(columns) // group_size
    values = scales.double().numpy()[group] * (codes - zeros[group])
    return tensors, torch.from_numpy(values.T)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", ["", "_act_order"])
def test_what_autogptq_packed_is_imported_bit_for_bit(bits, order):
    tensors = load(f"auto_gptq_w{bits}{order}.npz")
    imported = import_gptq(tensors, bits=bits, group_size=64)
    assert imported.error == 0.0
    assert (imported.permutation is None) == (order == "")
    assert torch.equal(imported.dequantize(), tensors["values"])
    if order:
        x = torch.randn(3, tensors["values"].shape[1], dtype=torch.float64)
        ours = x[:, imported.permutation] @ imported.weight.dequantize().double().t()
        torch.testing.assert_close(ours, x @ tensors["values"].double().t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(32, 32, 32), (96, 160, 128), (32, 512, 256), (32, 96, -1), (7, 64, 64)]
)
def test_both_versions_and_group_sizes(bits, version, rows, columns, group_size):
    tensors, values = layer(bits, rows, columns, columns if group_size == -1 else group_size, version)
    tensors = {f"model.up_proj.{key}": tensor for key, tensor in tensors.items()}
    imported = import_gptq(tensors, "model.up_proj.", bits=bits, group_size=group_size, version=version)
    assert imported.error == 0.0
    assert torch.equal(imported.weight.dequantize().double(), values)
    assert imported.weight.group_size == {256: 128, -1: columns}.get(group_size, group_size)


def test_a_zero_of_all_ones_is_ambiguous_in_version_1():
    zeros = np.full((2, 32), 16)
    tensors, values = layer(4, zeros=zeros)
    with pytest.raises(ValueError, match="which libraries read as 16 or as 0"):
        import_gptq(tensors, bits=4, group_size=32)
    assert torch.equal(import_gptq(tensors, bits=4, group_size=32, zero_of_all_ones=16).dequantize().double(), values)
    wrapped = import_gptq(tensors, bits=4, group_size=32, zero_of_all_ones=0).dequantize().double()
    assert torch.equal(wrapped, values + 16 * tensors["scales"].double()[[0] * 32 + [1] * 32].t())


def test_scales_that_float16_cannot_hold():
    tensors, values = layer(4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"import_gptq: every level .* row, group \(\d+, \d+\); pass exact=False"):
        import_gptq(tensors, bits=4, group_size=32)
    imported = import_gptq(tensors, bits=4, group_size=32, exact=False)
    largest = values.abs().amax()
    assert 0 < imported.error <= 2**-11
    assert float((imported.dequantize() - values).abs().max() / largest) <= imported.error
    tensors, values = layer(4, dtype=torch.bfloat16)
    assert torch.equal(import_gptq(tensors, bits=4, group_size=32).dequantize().double(), values)


def test_groups_of_mixed_size_and_damaged_layers_are_refused():
    tensors, _ = layer(4)
    mixed = torch.zeros(64, dtype=torch.int32)
    mixed[40:] = 1
    for change, message in (
        ({"g_idx": mixed}, "each group of g_idx must have 32 columns"),
        ({"qzeros": tensors["qzeros"][:1]}, "qzeros must have shape"),
        ({"qweight": tensors["qweight"].float()}, "qweight must be int32"),
        ({"qweight": tensors["qweight"].to("meta")}, "with 2 dimensions and values"),
        ({"scales": tensors["scales"] * torch.inf}, "scales must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            import_gptq({**tensors, **change}, bits=4, group_size=32)
    with pytest.raises(ValueError, match="scales must be in the state dict"):
        import_gptq({key: tensors[key] for key in ("qweight", "qzeros")}, bits=4, group_size=32)
    for arguments, message in (
        ({"group_size": 64}, "must have 1 groups of 64"),
        ({"group_size": 32, "version": 3}, "version must be"),
        ({"group_size": 32, "zero_of_all_ones": 7}, "zero_of_all_ones must be"),
    ):
        with pytest.raises(ValueError, match=message):
            import_gptq(tensors, bits=4, **arguments)
    tensors, _ = layer(4, group_size=16)
    with pytest.raises(ValueError, match="the format has no smaller groups"):
        import_gptq(tensors, bits=4, group_size=16)


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs/integrations/import.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "import.md", "exec"), {})
