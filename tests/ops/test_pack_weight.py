"""torch.ops.rcp_kernels.dequantize against PackedWeight.dequantize, and what the ops on a packed weight refuse."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels import PackedWeight, ops
from rcp_kernels.ops.quantize_weight import quantize_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ANY_WEIGHT = {
    "rows": st.integers(1, 40),
    "columns": st.integers(1, 300),
    "bits": st.sampled_from([2, 3, 4]),
    "group_size": st.sampled_from([32, 64, 128, None]),
    "dtype": st.sampled_from(DTYPES),
    "seed": st.integers(0, 99),
}


def random_weight(rows, columns, bits, group_size, seed=0, tensor_scale=0.25):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    return PackedWeight.pack(
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        torch.randint(-128, 128, (rows, groups, 2**bits), generator=generator).sort(-1).values.to(torch.int8),
        torch.rand(rows, groups, generator=generator).half(),
        tensor_scale,
        bits=bits,
        group_size=group_size,
    )


@given(**ANY_WEIGHT)
def test_dequantize_is_that_of_the_format(rows, columns, bits, group_size, dtype, seed):
    weight = random_weight(rows, columns, bits, group_size or columns, seed)
    dense = ops.dequantize(ops.pack_weight(weight), weight.geometry, dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, weight.dequantize().to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("levels", ["kmeans", "uniform"])
def test_dequantize_on_every_instruction_set(bits, levels):
    weight = quantize_weight(torch.randn(21, 300), bits, 64, levels=levels)
    blob, before = ops.pack_weight(weight), torch.ops.rcp_kernels.cpu_isa()
    try:
        for isa in range(torch.ops.rcp_kernels.cpu_isa_supported() + 1):
            torch.ops.rcp_kernels.set_cpu_isa(isa)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert torch.equal(ops.dequantize(blob, weight.geometry, dtype), weight.dequantize().to(dtype))
    finally:
        torch.ops.rcp_kernels.set_cpu_isa(before)


@pytest.mark.parametrize("tensor_scale", [2.0**-60, 2.0**60])
def test_dequantize_at_the_ends_of_the_range(tensor_scale):
    weight = random_weight(33, 129, 3, 32, tensor_scale=tensor_scale)
    assert torch.equal(ops.dequantize(ops.pack_weight(weight), weight.geometry), weight.dequantize())


def test_dequantize_refuses():
    weight = random_weight(16, 64, 2, 32)
    blob = ops.pack_weight(weight)
    with pytest.raises(ValueError, match=r"dequantize: dtype must be float32, float16 or bfloat16, got .*; convert"):
        ops.dequantize(blob, weight.geometry, torch.int8)
    with pytest.raises(ValueError, match=r"dequantize: the arguments say .* but the weight was packed with"):
        ops.dequantize(blob, ops.Geometry(16, 64, 2, 64))
    with pytest.raises(ValueError, match=r"dequantize: weight must be the contiguous 1-D uint8 tensor"):
        ops.dequantize(blob[::2], weight.geometry)
    damaged = blob.clone()
    damaged[0] += 1
    with pytest.raises(ValueError, match="not packed for the CPU"):
        ops.dequantize(damaged, weight.geometry)


def test_opcheck_dequantize():
    weight = random_weight(16, 100, 3, 64)
    for dtype in DTYPES:
        torch.library.opcheck(
            torch.ops.rcp_kernels.dequantize.default, (ops.pack_weight(weight), *weight.geometry, dtype)
        )


def test_weight_moves_between_devices_as_tensors():
    weight = random_weight(16, 64, 2, 32)
    assert all(getattr(weight.to("cpu"), name) is getattr(weight, name) for name in PackedWeight.TENSORS)
    assert all(getattr(weight.to("meta"), name).is_meta for name in PackedWeight.TENSORS)


def uniform_weight(rows, columns, bits, group_size, seed=0):
    """A weight of kind uniform, with the smallest and the largest first level and a group of scale 0."""
    weight = random_weight(rows, columns, bits, group_size, seed)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-128, 2 ** (7 - bits), (*weight.scales.shape, 1), generator=generator)
    first.view(-1)[:2] = torch.tensor([-128, 2 ** (7 - bits) - 1])[: first.numel()]
    weight.scales.view(-1)[2:3] = 0
    return dataclasses.replace(weight, levels=first.to(torch.int8), kind="uniform").validate()


@given(**ANY_WEIGHT)
def test_uniform_groups_keep_no_table(rows, columns, bits, group_size, dtype, seed):
    weight = uniform_weight(rows, columns, bits, group_size or columns, seed)
    blob, tables = ops.pack_weight(weight), ops.pack_weight(weight.as_table())
    groups = weight.scales.shape[1]
    assert len(tables) - len(blob) == -(-rows // 16) * groups * 16 * (2**bits - 1)
    assert torch.equal(ops.dequantize(blob, weight.geometry, dtype), weight.dequantize().to(dtype))
    for packed in (blob, tables):
        back = ops.unpack_weight(packed, weight.geometry)
        assert back.kind == "table"
        for name in PackedWeight.TENSORS:
            assert torch.equal(getattr(back, name), getattr(weight.as_table(), name)), name
    back = ops.unpack_weight(blob, weight.geometry).as_uniform()
    assert all(torch.equal(getattr(back, name), getattr(weight, name)) for name in PackedWeight.TENSORS)


def test_opcheck_uniform():
    weight = uniform_weight(24, 200, 3, 64)
    tensors = [getattr(weight, name) for name in PackedWeight.TENSORS]
    blob = ops.pack_weight(weight)
    torch.library.opcheck(torch.ops.rcp_kernels.pack_weight.default, (*tensors, 200, 3, 64))
    torch.library.opcheck(torch.ops.rcp_kernels.unpack_weight.default, (blob, *weight.geometry))
    torch.library.opcheck(torch.ops.rcp_kernels.dequantize.default, (blob, *weight.geometry))
    torch.library.opcheck(
        torch.ops.rcp_kernels.lut_linear.default, (torch.randn(3, 200), blob, None, *weight.geometry, 8)
    )


def test_a_damaged_kind_is_refused():
    weight = uniform_weight(16, 64, 2, 32)
    blob, tables = ops.pack_weight(weight), ops.pack_weight(weight.as_table())
    assert (int(blob[44]), int(tables[44])) == (1, 0)
    blob[44], tables[44] = 2, 1
    with pytest.raises(ValueError, match=r"groups of kind 0 \(table\) or 1 \(uniform\), got 2; .* pack it again"):
        ops.dequantize(blob, weight.geometry)
    with pytest.raises(ValueError, match="truncated or padded"):
        ops.dequantize(tables, weight.geometry)
    for levels in (weight.levels[:, :1], weight.levels.expand(-1, -1, 2), weight.levels[..., 0]):
        with pytest.raises(ValueError, match="levels must have shape"):
            ops.pack_weight(dataclasses.replace(weight, levels=levels))
