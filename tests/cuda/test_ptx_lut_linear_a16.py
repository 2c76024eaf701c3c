"""lut_linear with act_bits 16 on CUDA, run by the PTX executor, against float64.

The bounds are those that csrc/include/rcp/cuda/lut_linear_a16.cuh states, with an mma as the executor does it.
"""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import pytest
import torch
from cuda_blob import pack
from ptx import Buffer, Counters, HostProgram, Memory

from rcp_kernels.formats import PackedWeight

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
SMALLEST_STEP = {FLOAT32: 2.0**-24, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}  # of the cast to y
SMS = 4  # few multiprocessors, so that small layers are split as large ones are


@cache
def program(bits: int, arch: str = "sm_80") -> HostProgram:
    return HostProgram(
        """
#include "rcp/cuda/lut_linear_a16.cuh"
using namespace rcp::cuda;
extern "C" {
static LutLinearCall call_of(int64_t tokens, int64_t rows, int64_t columns, int64_t group, int64_t type) {
  LutLinearCall call{};
  call.x_type = static_cast<rcp::FloatType>(type);
  call.tokens = tokens, call.rows = rows, call.columns = columns;
  call.bits = WEIGHT_BITS, call.group_size = static_cast<int>(group), call.act_bits = 16, call.clip = 1.0f;
  return call;
}
int64_t workspace_bytes(int64_t sms, int64_t capability, int64_t tokens, int64_t rows, int64_t columns, int64_t group,
                        int64_t type) {
  const LutLinearCall call = call_of(tokens, rows, columns, group, type);
  return plan_lut_linear(call, static_cast<int>(sms), static_cast<int>(capability)).workspace_bytes();
}
int64_t counter_bytes(int64_t sms, int64_t capability, int64_t tokens, int64_t rows, int64_t columns, int64_t group,
                      int64_t type) {
  const LutLinearCall call = call_of(tokens, rows, columns, group, type);
  return plan_lut_linear(call, static_cast<int>(sms), static_cast<int>(capability)).counter_bytes;
}
int run(const uint8_t* weight, const void* x, const void* bias, int64_t bias_type, void* y, void* workspace,
        unsigned* counters, int64_t sms, int64_t capability, int64_t rotation, int64_t tokens, int64_t rows,
        int64_t columns, int64_t group, int64_t type) {
  LutLinearCall call = call_of(tokens, rows, columns, group, type);
  call.weight = weight, call.x = x, call.bias = bias, call.bias_type = static_cast<rcp::FloatType>(bias_type);
  call.y = y, call.workspace = workspace, call.counters = counters, call.rotation_group = static_cast<int>(rotation);
  const LutLinearPlan plan = plan_lut_linear(call, static_cast<int>(sms), static_cast<int>(capability));
  return lut_linear_a16<WEIGHT_BITS>(call, plan);
}
}
""",
        arch=arch,
        defines={"WEIGHT_BITS": bits},
        sm_count=SMS,
    )


def stored(values: np.ndarray, kind: int) -> np.ndarray:
    """float64 -> float32, float16, or the bits of bfloat16 (truncated: any value will do)."""
    if kind == BFLOAT16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kind == FLOAT16 else np.float32)


def widened(held: np.ndarray, kind: int) -> np.ndarray:
    if kind == BFLOAT16:
        held = (held.astype(np.uint32) << 16).view(np.float32)
    return held.astype(np.float64)


class Layer:
    """A random packed weight: its blob, and the float64 weight it stands for."""

    def __init__(self, bits: int, rows: int, columns: int, group: int, equal_scales: bool = False) -> None:
        rng = np.random.default_rng(0)
        group = group or columns
        groups = -(-columns // group)
        self.bits, self.rows, self.columns, self.group = bits, rows, columns, group
        codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
        levels = np.sort(rng.integers(-128, 128, (rows, groups, 1 << bits)), axis=-1).astype(np.int8)
        scales = (rng.random((rows, groups)) * (not equal_scales) * 200 + equal_scales).astype(np.float16)
        tensor_scale = 2.0**-15
        of_columns = np.arange(columns) // group
        chosen = np.take_along_axis(levels[:, of_columns], codes[:, :, None].astype(np.int64), 2)[..., 0]
        self.weight = chosen * scales[:, of_columns].astype(np.float64) * tensor_scale
        tensors = map(torch.from_numpy, (codes, levels, scales))
        self.blob = pack(PackedWeight.pack(*tensors, tensor_scale, bits=bits, group_size=group))
        self.bias = rng.standard_normal(rows)

    def run(
        self, x: np.ndarray, kind: int, bias_kind: int | None = FLOAT32, arch: str = "sm_80", misaligned: int = 0,
        blob: np.ndarray | None = None, counters: Buffer | None = None, sms: int = SMS, **options: object,
    ) -> tuple[np.ndarray, list[Counters]]:  # fmt: skip
        """y in its own dtype (bits of bfloat16). The buffers of y and the workspace start unreadable."""
        compiled = program(self.bits, arch)
        shape = (x.shape[0], self.rows, self.columns, self.group, kind)
        sizes = []
        for function in (compiled.library.workspace_bytes, compiled.library.counter_bytes):
            function.restype = ctypes.c_int64
            sizes.append(function(*map(ctypes.c_int64, (sms, int(arch[3:]), *shape))))
        memory = Memory()
        held = stored(x, kind)
        weight = memory.allocate("weight", self.blob if blob is None else blob)
        x_buffer = memory.allocate("x", held, misaligned=misaligned * held.itemsize)
        bias = None if bias_kind is None else memory.allocate("bias", stored(self.bias, bias_kind))
        y = memory.output("y", (x.shape[0], self.rows), held.dtype)
        workspace = memory.output("workspace", (max(sizes[0], 4) // 4,), np.float32)
        count = memory.allocate("counters", np.zeros(max(sizes[1], 4) // 4, np.uint32), writable=True)
        code, launches = compiled.call(
            "run", memory, weight, x_buffer, bias, bias_kind or 0, y, workspace, count, sms, int(arch[3:]), 0, *shape,
            **options,
        )  # fmt: skip
        assert code == 0
        assert not count.numpy().any(), "every launch leaves its counters at zero"
        return y.numpy(), launches

    def check(self, x: np.ndarray, kind: int, y: np.ndarray, bias_kind: int | None = FLOAT32) -> None:
        x = widened(stored(x, kind), kind)
        bias = 0.0 if bias_kind is None else widened(stored(self.bias, bias_kind), bias_kind)
        expected = x @ self.weight.T + bias
        magnitude = np.abs(x) @ np.abs(self.weight).T
        units = -(-self.columns // 512)
        roundings = -(-self.columns // min(self.group, 128)) + 2 * units + 3
        fixed = x.shape[0] <= 4 or kind == FLOAT32
        tail = np.zeros_like(expected)
        for unit in range(units):
            part = slice(512 * unit, 512 * unit + 512)
            largest = np.abs(x[:, part]).max(axis=1, keepdims=True)
            tail += largest * np.abs(self.weight[:, part]).sum(axis=1)
        if fixed:
            bound = 3 * roundings * 2.0**-24 * magnitude + 2.0**-30 * tail
        else:
            bound = (roundings + min(self.group, 128) / 16) * 2.0**-23 * magnitude + 2.0**-38 * tail
        bound += 2.0**-24 * np.abs(bias) + SMALLEST_STEP[kind] * (np.abs(expected) + bound) + 2.0**-25
        np.testing.assert_array_less(np.abs(widened(y, kind) - expected), bound)


# bits, group (0: one a row), tokens, rows, columns, kind, bias: every kernel (fixed point with 1 and 2 tiles of tokens,
# float16 with 1, 2 and 4) with every group size and number of bits, tails everywhere.
CASES = [
    (2, 128, 1, 40, 1600, FLOAT16, FLOAT32),
    (2, 64, 2, 33, 700, BFLOAT16, BFLOAT16),
    (2, 32, 3, 17, 530, FLOAT32, None),
    (2, 0, 4, 16, 300, FLOAT16, FLOAT16),
    (2, 32, 5, 40, 600, FLOAT16, None),
    (2, 128, 16, 20, 1100, BFLOAT16, FLOAT32),
    (2, 64, 33, 18, 513, FLOAT16, FLOAT32),
    (3, 128, 1, 130, 2048, BFLOAT16, None),
    (3, 32, 2, 5, 33, FLOAT16, FLOAT32),
    (3, 64, 4, 31, 1025, BFLOAT16, FLOAT32),
    (3, 0, 1, 16, 1000, FLOAT32, FLOAT32),
    (3, 128, 8, 48, 1200, FLOAT16, FLOAT16),
    (3, 64, 9, 24, 640, BFLOAT16, FLOAT32),
    (3, 32, 17, 16, 515, FLOAT16, None),
    (4, 128, 1, 40, 900, FLOAT16, FLOAT32),
    (4, 32, 2, 50, 1100, BFLOAT16, FLOAT32),
    (4, 64, 3, 16, 129, FLOAT16, None),
    (4, 0, 6, 17, 96, BFLOAT16, FLOAT32),
    (4, 128, 12, 20, 520, FLOAT16, FLOAT32),
    (4, 32, 40, 16, 600, BFLOAT16, BFLOAT16),
    (4, 64, 7, 1, 1, FLOAT32, FLOAT32),
]


@pytest.mark.parametrize(("bits", "group", "tokens", "rows", "columns", "kind", "bias"), CASES)
def test_against_float64(bits, group, tokens, rows, columns, kind, bias):
    layer = Layer(bits, rows, columns, group)
    x = np.random.default_rng(1).standard_normal((tokens, columns)) * 3
    y, _ = layer.run(x, kind, bias)
    layer.check(x, kind, y, bias)


@pytest.mark.parametrize(
    ("bits", "group", "kind"),
    [
        (2, 128, FLOAT32), (3, 64, FLOAT32), (4, 32, FLOAT32), (2, 32, FLOAT16), (3, 128, BFLOAT16), (4, 64, FLOAT16),
    ],
)  # fmt: skip
def test_a_single_column_is_exact(bits, group, kind):
    """One activation a token: an error in any digit or place shows, where the bound of a sum would cover it."""
    layer = Layer(bits, 16, 256, group, equal_scales=True)
    rng = np.random.default_rng(1)
    x = np.zeros((32, 256))
    x[np.arange(32), rng.permutation(256)[:32]] = rng.standard_normal(32)
    y, _ = layer.run(x, kind, None)
    exact = widened(stored(x, kind), kind) @ layer.weight.T
    if kind == BFLOAT16:  # to nearest, ties to even
        words = exact.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        rounded = exact.astype(np.float32).astype(y.dtype)
    np.testing.assert_array_equal(widened(y, kind), widened(rounded, kind))


@pytest.mark.parametrize(("tokens", "kind"), [(2, FLOAT32), (4, BFLOAT16), (5, FLOAT16), (20, BFLOAT16)])
def test_turing(tokens, kind):
    """sm_75: no cp.async, no redux, the small mma shapes; bfloat16 too."""
    layer = Layer(3, 33, 1100, 64)
    x = np.random.default_rng(1).standard_normal((tokens, 1100))
    y, _ = layer.run(x, kind, arch="sm_75")
    layer.check(x, kind, y)
    # The integers are the same, and so are the sums in float32: sm_80 gives the same bits.
    if tokens <= 4:
        np.testing.assert_array_equal(y, layer.run(x, kind)[0])


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_misaligned_x(tokens, kind):
    layer = Layer(2, 16, 600, 128)
    x = np.random.default_rng(1).standard_normal((tokens, 600))
    aligned, _ = layer.run(x, kind)
    for misaligned in (1, 3):
        np.testing.assert_array_equal(layer.run(x, kind, misaligned=misaligned)[0], aligned)


@pytest.mark.parametrize(("tokens", "kind"), [(1, FLOAT16), (3, BFLOAT16), (8, FLOAT16)])
def test_any_order_of_blocks_gives_the_same_bits(tokens, kind):
    layer = Layer(3, 20, 1700, 128)
    x = np.random.default_rng(1).standard_normal((tokens, 1700))
    first, launches = layer.run(x, kind)
    assert len(launches) == 1
    for options in ({"order": "descending"}, {"order": 7, "blocks_at_once": 1}):
        np.testing.assert_array_equal(layer.run(x, kind, **options)[0], first)


def test_few_and_many_multiprocessors_stay_within_the_bound():
    layer = Layer(2, 16, 1800, 64)
    x = np.random.default_rng(1).standard_normal((1, 1800))
    for sms in (1, 1000):
        layer.check(x, FLOAT16, layer.run(x, FLOAT16, sms=sms)[0])


def test_activations_are_not_quantized():
    """An outlier of 2**14 beside values up to 8: quantization to 8 bits would lose the others."""
    layer = Layer(4, 16, 512, 128)
    x = np.random.default_rng(1).integers(-8, 9, (1, 512)).astype(np.float64)
    x[0, 100] = 2.0**14
    for tokens, kind in [(1, FLOAT16), (4, FLOAT32), (6, BFLOAT16)]:
        batch = np.repeat(x, tokens, axis=0)
        y, _ = layer.run(batch, kind, None)
        layer.check(batch, kind, y, None)


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_huge_and_tiny_tokens(tokens, kind):
    layer = Layer(3, 16, 130, 64)
    x = np.random.default_rng(1).standard_normal((tokens, 130))
    for scale in (2.0**100, 2.0**-80):
        y, _ = layer.run(x * scale, kind, None)
        reference, _ = layer.run(x, kind, None)
        # A power of two changes nothing but the exponent.
        np.testing.assert_array_equal(widened(y, kind), widened(reference, kind) * scale)
    zero, _ = layer.run(x * 0, kind, None)
    np.testing.assert_array_equal(widened(zero, kind), np.zeros((tokens, 16)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("tokens", "kind"), [(2, FLOAT16), (2, FLOAT32), (6, FLOAT16), (6, BFLOAT16)])
def test_nan_and_inf_stay_in_their_token(tokens, kind, bad):
    layer = Layer(2, 16, 520, 128)
    x = np.random.default_rng(1).standard_normal((tokens, 520))
    expected, _ = layer.run(x, kind)
    spoiled = x.copy()
    spoiled[1, 515] = bad
    y, _ = layer.run(spoiled, kind)
    others = [m for m in range(tokens) if m != 1]
    assert not np.isfinite(widened(y, kind)[1]).any()
    np.testing.assert_array_equal(y[others], expected[others])


@pytest.mark.parametrize("place", [0, 8, 16, 20])  # magic, version, bits, group_size
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_foreign_blob_gives_nan(tokens, place):
    layer = Layer(3, 16, 256, 128)
    blob = layer.blob.copy()
    blob[place] ^= 1
    y, _ = layer.run(np.ones((tokens, 256)), FLOAT16, blob=blob)
    assert np.isnan(widened(y, FLOAT16)).all()


def test_calls_outside_the_kernel_are_refused():
    memory = Memory()
    nothing = memory.allocate("nothing", np.zeros(4, np.uint8), writable=True)
    arguments = [nothing, nothing, None, 0, nothing, nothing, nothing, SMS, 80]
    assert program(3).call("run", memory, *arguments, 64, 1, 16, 64, 32, FLOAT16)[0] == 1  # a rotation
    assert program(3).call("run", memory, *arguments, 0, 1, 16, 64, 48, FLOAT16)[0] == 1  # a group_size
    code, launches = program(3).call("run", memory, *arguments, 0, 0, 16, 64, 32, FLOAT16)  # no tokens
    assert (code, launches) == (0, [])


@pytest.mark.parametrize(("tokens", "kind"), [(1, FLOAT16), (4, BFLOAT16), (8, FLOAT16), (16, BFLOAT16)])
def test_traffic(tokens, kind):
    """Every byte of the weight once, in full sectors, and no bank conflict."""
    layer = Layer(3, 128, 2048, 128)
    _, launches = layer.run(np.ones((tokens, 2048)), kind, sms=1)
    weight = launches[0].buffers["weight"]
    body = layer.blob.size - 128
    assert weight.distinct_sectors * 32 == body + 64  # and the header's first 40 bytes
    # Each of 8 warps reads the header once, after its part of the body.
    assert weight.requested_sectors * 32 <= body + 64 * 16
    assert launches[0].bank_conflicts() == 0
