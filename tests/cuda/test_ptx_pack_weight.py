"""pack_weight, unpack_weight and dequantize on CUDA, run by the PTX executor, against the definition of the format."""

import ctypes
from functools import cache

import numpy as np
import pytest
import torch
from cuda_blob import pack, shape_hash
from ptx import HostProgram, Memory

from rcp_kernels.formats import PackedWeight

# rows, columns, group_size: tails in rows, columns, units and sub-blocks, each group size, one group a row.
SHAPES = [(16, 512, 128), (17, 600, 128), (5, 33, 32), (33, 1100, 64), (3, 1, 32), (1, 96, 96), (18, 515, 515)]
TYPES = [np.float32, np.float16, np.uint16]  # bfloat16 as its bits


@cache
def program(arch: str = "sm_80") -> HostProgram:
    return HostProgram(
        """
#include "rcp/cuda/pack_weight.cuh"
using namespace rcp::cuda;
extern "C" int64_t total_bytes(int64_t rows, int64_t columns, int64_t group, int64_t bits) {
  return CudaLayout{rows, columns, group, static_cast<int>(bits)}.total_bytes();
}
extern "C" int pack(const uint8_t* codes, const int8_t* levels, const uint16_t* scales, double tensor_scale,
                    uint8_t* blob, int64_t rows, int64_t columns, int64_t group, int64_t bits) {
  return pack_weight({codes, levels, scales, static_cast<float>(tensor_scale), blob,
                      {rows, columns, group, static_cast<int>(bits)}, nullptr});
}
extern "C" int unpack(const uint8_t* blob, uint8_t* codes, int8_t* levels, uint16_t* scales, float* tensor_scale,
                      int64_t rows, int64_t columns, int64_t group, int64_t bits) {
  return unpack_weight({blob, codes, levels, scales, tensor_scale, {rows, columns, group, static_cast<int>(bits)},
                        nullptr});
}
extern "C" int dequantize_to(const uint8_t* blob, void* y, int64_t type, int64_t rows, int64_t columns, int64_t group,
                             int64_t bits) {
  return dequantize({blob, y, static_cast<rcp::FloatType>(type), {rows, columns, group, static_cast<int>(bits)},
                     nullptr});
}
""",
        arch=arch,
    )


class Canonical:
    """Random tensors of the canonical format, and their weight as docs/format.md defines it."""

    def __init__(self, rows: int, columns: int, group: int, bits: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        groups = -(-columns // group)
        self.shape = (rows, columns, group, bits)
        self.codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
        self.levels = np.sort(rng.integers(-128, 128, (rows, groups, 1 << bits)), axis=-1).astype(np.int8)
        self.scales = (rng.random((rows, groups)) * 200).astype(np.float16)
        self.tensor_scale = 2.0**-17
        stream = np.zeros((rows, groups * group, bits), np.uint8)
        stream[:, :columns] = (self.codes[:, :, None] >> np.arange(bits)) & 1
        self.packed_codes = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
        of_columns = np.arange(columns) // group
        levels = np.take_along_axis(self.levels[:, of_columns], self.codes[:, :, None].astype(np.int64), 2)[..., 0]
        self.weight = levels * self.scales[:, of_columns].astype(np.float64) * self.tensor_scale

    def blob(self) -> np.ndarray:
        _, _, group, bits = self.shape
        tensors = map(torch.from_numpy, (self.codes, self.levels, self.scales))
        return pack(PackedWeight.pack(*tensors, self.tensor_scale, bits=bits, group_size=group))


def cases() -> list[tuple[int, int, int, int]]:
    return [(*shape, 2 + (i + k) % 3) for i, shape in enumerate(SHAPES) for k in range(3)]


@pytest.mark.parametrize(("rows", "columns", "group", "bits"), cases())
def test_pack_follows_the_layout_and_unpack_inverts_it(rows, columns, group, bits):
    canonical = Canonical(rows, columns, group, bits)
    expected = canonical.blob()
    memory = Memory()
    # The canonical tensors may lie anywhere; the blob is aligned.
    codes = memory.allocate("codes", canonical.packed_codes, misaligned=1)
    levels = memory.allocate("levels", canonical.levels, misaligned=1)
    scales = memory.allocate("scales", canonical.scales, misaligned=2)
    blob = memory.output("blob", expected.shape, np.uint8)
    code, _ = program().call(
        "pack", memory, codes, levels, scales, canonical.tensor_scale, blob, rows, columns, group, bits
    )
    assert code == 0
    np.testing.assert_array_equal(blob.numpy(), expected)

    back = [
        memory.output("codes back", canonical.packed_codes.shape, np.uint8),
        memory.output("levels back", canonical.levels.shape, np.int8),
        memory.output("scales back", canonical.scales.shape, np.float16),
        memory.output("tensor scale back", (1,), np.float32),
    ]
    code, _ = program().call("unpack", memory, blob, *back, rows, columns, group, bits)
    assert code == 0
    np.testing.assert_array_equal(back[0].numpy(), canonical.packed_codes)
    np.testing.assert_array_equal(back[1].numpy(), canonical.levels)
    np.testing.assert_array_equal(back[2].numpy(), canonical.scales)
    assert back[3].numpy()[0] == canonical.tensor_scale


def to_bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize(("rows", "columns", "group", "bits"), cases())
def test_dequantize_is_the_definition_rounded_once(rows, columns, group, bits):
    canonical = Canonical(rows, columns, group, bits)
    exact = canonical.weight.astype(np.float32)
    assert (exact == canonical.weight).all()
    expected = [exact, canonical.weight.astype(np.float16), to_bfloat16_bits(exact)]
    for index, kind in enumerate(TYPES):
        memory = Memory()
        blob = memory.allocate("blob", canonical.blob())
        y = memory.output("y", (rows, columns), kind, misaligned=(index + rows) % 2 * np.dtype(kind).itemsize)
        code, _ = program().call("dequantize_to", memory, blob, y, index, rows, columns, group, bits)
        assert code == 0
        np.testing.assert_array_equal(y.numpy(), expected[index])


@pytest.mark.parametrize("place", [0, 7, 8, 16, 20, 24, 32])  # magic, shape hash, bits, group_size, rows, columns
def test_a_foreign_blob_gives_nan(place):
    canonical = Canonical(16, 512, 128, 3)
    wrong = canonical.blob()
    wrong[place] ^= 1
    memory = Memory()
    blob = memory.allocate("blob", wrong)
    y = memory.output("y", (16, 512), np.float32)
    program().call("dequantize_to", memory, blob, y, 0, *canonical.shape)
    assert np.isnan(y.numpy()).all()


def tile_bytes(sub_blocks, group, bits):
    """16 rows of a weight: codes of the units, and tables and scales for each."""
    slots, units = {32: 16, 64: 8}.get(group, 4), -(-sub_blocks // 4)
    tail = sub_blocks - 4 * (units - 1)
    return 512 * ((units - 1) * 2 * bits + (bits * tail + 1) // 2) + units * 16 * slots * (2**bits + 2)


@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (11008, 4096), (4096, 14336), (128256, 4096)])
def test_no_other_shape_of_the_same_size_has_the_same_hash(rows, columns):
    library = program().library
    library.total_bytes.restype = ctypes.c_int64
    kinds = [(group, bits) for group in (32, 64, 128, 0) for bits in (2, 3, 4)]
    for group, bits in kinds:
        size = int(tile_bytes(np.array(-(-columns // 128)), group, bits)) * -(-rows // 16)
        shape = (rows, columns, group or columns, bits)
        assert library.total_bytes(*map(ctypes.c_int64, shape)) == 128 + size
        mine = int(shape_hash(rows, columns, group, bits))
        same = 0
        for other_group, other_bits in kinds:
            sub_blocks = np.arange(1, size // (256 * other_bits) + 2)
            bytes_of = tile_bytes(sub_blocks, other_group, other_bits)
            for some, tiles in zip(*((a[size % bytes_of == 0]) for a in (sub_blocks, size // bytes_of)), strict=True):
                there = shape_hash(
                    np.arange(16 * tiles - 15, 16 * tiles + 1)[:, None],
                    np.arange(128 * some - 127, 128 * some + 1),
                    other_group,
                    other_bits,
                )
                same += int((there == mine).sum())
        assert same == 1


def test_shapes_outside_the_launch_are_refused():
    memory = Memory()
    blob = memory.allocate("blob", np.zeros(128, np.uint8))
    for rows, columns, bits in [(0, 8, 2), (8, 0, 2), (8, 8, 5), (8, 65536 * 512, 2)]:
        assert program().call("dequantize_to", memory, blob, blob, 0, rows, columns, 32, bits)[0] == 1
