"""An AWQ layer packed by AutoAWQ 0.2.9 itself (tests/integrations/importers_data), and damaged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rcp_kernels.integrations.importers import import_awq

DATA = Path(__file__).parent / "importers_data"


@pytest.fixture
def tensors():
    with np.load(DATA / "autoawq_gemm.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def test_what_autoawq_packed_is_imported_bit_for_bit(tensors):
    imported = import_awq(tensors, group_size=32)
    assert imported.error == 0.0
    assert torch.equal(imported.dequantize(), tensors["values"])
    assert torch.equal(imported.dequantize().half(), tensors["values_half"])  # what it computes in float16


def test_each_nibble_is_its_column():
    # One code that is not the zero in all of 8 columns: column c of word w holds code c + 1 times scale 1.
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    word = sum((column + 1) << (4 * nibble) for nibble, column in enumerate(order))
    word -= (word >> 31) << 32
    tensors = {
        "qweight": torch.full((5, 2), word, dtype=torch.int32),
        "qzeros": torch.zeros((1, 2), dtype=torch.int32),
        "scales": torch.ones((1, 16), dtype=torch.float16),
    }
    expected = (torch.arange(16) % 8 + 1.0)[:, None].expand(16, 5)
    for group_size in (-1, 5, 128):
        assert torch.equal(import_awq(tensors, group_size=group_size).dequantize(), expected)


def test_other_layouts_are_refused(tensors):
    with pytest.raises(ValueError, match="only the GEMM layout"):
        import_awq({**tensors, "qweight": tensors["qweight"].t().contiguous()}, group_size=32)
    with pytest.raises(ValueError, match="must have 2 groups of 64"):
        import_awq(tensors, group_size=64)
    with pytest.raises(ValueError, match="qzeros must be in the state dict"):
        import_awq({k: v for k, v in tensors.items() if k != "qzeros"}, group_size=32)
