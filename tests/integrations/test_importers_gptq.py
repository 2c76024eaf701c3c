"""GPTQ layers packed by AutoGPTQ 0.7.1 itself (importers_data), and what its files do not cover, by hand."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rcp_kernels import QuantLinear
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


def borrowed(zeros, bits):
    """What GPTQModel makes of zeros [groups, N] at 2 and 4 bits: 1 less in every code, whole 32-bit words at a time.

    At 3 bits three words are one number of 96 bits. With Python's integers, independently of the importer.
    """
    groups, count = zeros.shape
    unit, words_of_unit = (32, 3) if bits == 3 else (32 // bits, 1)
    words = np.zeros((groups, -(-count // unit) * words_of_unit), np.uint32)
    ones = sum(1 << (bits * k) for k in range(unit))
    for group in range(groups):
        for first in range(0, count, unit):
            number = sum(int(zero) << (bits * k) for k, zero in enumerate(zeros[group, first : first + unit]))
            number = (number - ones) % (1 << 32 * words_of_unit)
            for word in range(words_of_unit):
                words[group, first // unit * words_of_unit + word] = number >> 32 * word & 0xFFFFFFFF
    return torch.from_numpy(words.view(np.int32))[:, : -(-count * bits // 32)]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rows", [32, 64, 37])
@pytest.mark.parametrize("seed", range(5))
def test_a_zero_of_0_borrows_from_the_next_code(bits, rows, seed):
    zeros = np.random.default_rng(seed).integers(0, 2**bits, (3, rows))
    tensors, values = layer(bits, rows, 96, version=2, seed=seed, zeros=zeros)
    tensors["qzeros"] = borrowed(zeros, bits)
    assert not torch.equal(tensors["qzeros"], stream(zeros.T - 1, bits).T)
    for settings in ({}, {"zero_of_all_ones": "borrow"}, {"sym": False}):
        imported = import_gptq(tensors, bits=bits, group_size=32, **settings)
        assert torch.equal(imported.dequantize().double(), values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_without_0_are_read_without_a_word(bits):
    """Any writer stores them alike, and the codes that straddle two words do not change that."""
    for seed in range(5):
        tensors, values = layer(bits, 96, 64, seed=seed)
        stored = stream(borrowed_free_zeros(bits, seed).T - 1, bits).T.contiguous()
        assert torch.equal(stored, borrowed(borrowed_free_zeros(bits, seed), bits))
        assert torch.equal(import_gptq(tensors, bits=bits, group_size=32).dequantize().double(), values)


def borrowed_free_zeros(bits, seed):
    return np.random.default_rng(seed).integers(1, 2**bits, (2, 96))


@pytest.mark.parametrize("seed", range(5))
def test_a_zero_of_0_at_3_bits_has_two_readings_and_a_warning(seed):
    zeros = np.random.default_rng(seed).integers(0, 8, (3, 64))
    tensors, values = layer(3, 64, 96, version=2, seed=seed, zeros=zeros)
    tensors["qzeros"] = borrowed(zeros, 3)
    with pytest.warns(UserWarning, match=r"zero of 7 in row, group \[\d+, \d\] .*zero_of_all_ones") as found:
        imported = import_gptq(tensors, bits=3, group_size=32)
    assert found[0].filename == __file__
    assert torch.equal(imported.dequantize().double(), values)
    imported = import_gptq(tensors, bits=3, group_size=32, zero_of_all_ones="borrow")
    assert torch.equal(imported.dequantize().double(), values)
    tensors["qzeros"] = stream((zeros.T - 1) % 8, 3).T.contiguous()
    imported = import_gptq(tensors, bits=3, group_size=32, zero_of_all_ones=0)
    assert torch.equal(imported.dequantize().double(), values)


def spill(zeros, bits):
    """AutoGPTQ's packing: -1 as an unsigned number, or-ed into the word without a mask."""
    count = 32 // bits
    shifted = (zeros.reshape(len(zeros), -1, count) - 1).astype(np.uint32) << np.arange(0, 32, bits, dtype=np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(shifted, axis=-1).view(np.int32))


@pytest.mark.parametrize("bits", [2, 4])
def test_zeros_that_autogptq_has_lost_are_refused(bits):
    middle = 2 ** (bits - 1)
    zeros = np.full((2, 32), middle)
    zeros[1, 5] = 0
    tensors, values = layer(bits, version=2, zeros=zeros)
    tensors["qzeros"] = spill(zeros, bits)
    with pytest.raises(ValueError, match=rf"got {2**bits - 1} in row, group \[5, 1\], which libraries read as"):
        import_gptq(tensors, bits=bits, group_size=32)
    # In the last code of a word nothing is lost, and every writer's 0 is the same.
    zeros[1, 5], zeros[1, 32 // bits - 1] = middle, 0
    tensors, values = layer(bits, version=2, zeros=zeros)
    assert torch.equal(spill(zeros, bits), borrowed(zeros, bits))
    tensors["qzeros"] = spill(zeros, bits)
    assert torch.equal(import_gptq(tensors, bits=bits, group_size=32).dequantize().double(), values)
    # Zeros of 1 after it look like AutoGPTQ's in the stored words.
    zeros[1, 32 // bits - 2 : 32 // bits] = 0, 1
    tensors, values = layer(bits, version=2, zeros=zeros)
    tensors["qzeros"] = borrowed(zeros, bits)
    with pytest.raises(ValueError, match='"borrow" if the zeros after it are 1'):
        import_gptq(tensors, bits=bits, group_size=32)
    imported = import_gptq(tensors, bits=bits, group_size=32, zero_of_all_ones="borrow")
    assert torch.equal(imported.dequantize().double(), values)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("labelled", "stored"), [(1, 2), (2, 1)])
def test_symmetric_zeros_under_a_wrong_label(bits, labelled, stored):
    middle = 2 ** (bits - 1)
    tensors, values = layer(bits, version=stored, zeros=np.full((2, 32), middle))
    with pytest.raises(
        ValueError, match=rf"got version={labelled} and zeros that are all {middle} .* version={stored};"
    ):
        import_gptq(tensors, bits=bits, group_size=32, version=labelled)
    for version, sym in ((labelled, True), (stored, True), (stored, None), (stored, False)):
        imported = import_gptq(tensors, bits=bits, group_size=32, version=version, sym=sym)
        assert torch.equal(imported.dequantize().double(), values)
    step = (
        imported.dequantize() - import_gptq(tensors, bits=bits, group_size=32, version=labelled, sym=False).dequantize()
    )
    assert torch.equal(step, (labelled - stored) * -1.0 * tensors["scales"].float().repeat_interleave(32, 0).t())


def test_symmetric_zeros_that_gptqmodel_wrote_at_3_bits():
    """Before April 2026 it subtracted the constants of its three words in the reverse of their order."""
    tensors, values = layer(3, version=2, zeros=np.full((2, 32), 4))
    constants = np.array([0x24924924, 0x92492492, 0x49249249], np.uint32)
    tensors["qzeros"] = torch.from_numpy((tensors["qzeros"].numpy().view(np.uint32) - constants).view(np.int32))
    with pytest.raises(ValueError, match="if they are read as version=1 of GPTQModel before April 2026; pass sym=True"):
        import_gptq(tensors, bits=3, group_size=32)
    imported = import_gptq(tensors, bits=3, group_size=32, sym=True)
    assert torch.equal(imported.dequantize().double(), values)


def test_symmetric_is_not_what_these_are():
    tensors, _ = layer(4)
    with pytest.raises(ValueError, match="the zeros of a symmetric checkpoint must all be 8, got others"):
        import_gptq(tensors, bits=4, group_size=32, sym=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_a_checkpoint_takes_x_as_it_comes(bits, act_order, bias):
    rng = np.random.default_rng(bits)
    tensors, values = layer(bits, 24, 128)
    if act_order:
        g_idx = (np.arange(128) // 32)[rng.permutation(128)]
        tensors["g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        codes = import_gptq({**tensors, "g_idx": torch.arange(128) // 32}, bits=bits, group_size=32)
        scales = tensors["scales"].double()
        integers = (codes.dequantize().double() / scales.repeat_interleave(32, 0).t()).round()
        zeros = _true_zeros(tensors, bits, 24)
        raw = integers + zeros.repeat_interleave(32, 0).t()
        values = scales[g_idx].t() * (raw - zeros[g_idx].t())
    if bias:
        tensors["bias"] = torch.randn(24).half()
    arrays = {f"up.{key}": tensor.numpy() for key, tensor in tensors.items()}
    imported = import_gptq(arrays, "up.", bits=bits, group_size=32)
    made = QuantLinear.from_imported(imported, act_bits=16)
    assert (made.input_order is not None) == act_order
    assert (made.bias is not None) == bias
    x = torch.randn(5, 128)
    expected = x.double() @ values.t() + (tensors["bias"].double() if bias else 0)
    for module in (made, copy.deepcopy(made), QuantLinear.from_state_dict(made.state_dict(), act_bits=16)):
        torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-4)


def _true_zeros(tensors, bits, rows):
    words = tensors["qzeros"].numpy().view(np.uint32).astype(object)
    numbers = [sum(int(word) << 32 * i for i, word in enumerate(row)) for row in words]
    return torch.tensor([[(number >> bits * k) % 2**bits + 1 for k in range(rows)] for number in numbers]).double()


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
        ({"group_size": 32, "zero_of_all_ones": "wrap"}, "zero_of_all_ones must be"),
    ):
        with pytest.raises(ValueError, match=message):
            import_gptq(tensors, bits=4, **arguments)
    tensors, _ = layer(4, group_size=16)
    with pytest.raises(ValueError, match="the format has no smaller groups"):
        import_gptq(tensors, bits=4, group_size=16)


def test_the_page_runs():
    page = (Path(__file__).parents[2] / "docs/integrations/import.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "import.md", "exec"), {})
