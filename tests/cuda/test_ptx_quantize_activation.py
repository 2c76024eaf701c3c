"""quantize_activation on CUDA, run by the PTX executor: bit-equal to docs/numerics.md in numpy float32."""

from functools import cache

import numpy as np
import pytest
from ptx import HostProgram, Memory

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2


@cache
def program(arch: str) -> HostProgram:
    return HostProgram(
        """
#include "rcp/cuda/quantize_activation.cuh"
extern "C" int quantize(const void* x, int64_t type, int64_t tokens, int64_t columns, int64_t bits, int64_t packed,
                        double clip, void* q, float* scale) {
  return rcp::cuda::quantize_activation({x, static_cast<rcp::FloatType>(type), tokens, columns, static_cast<int>(bits),
                                         packed != 0, static_cast<float>(clip), q, scale, nullptr});
}
""",
        arch=arch,
    )


def stored(values: np.ndarray, kind: int) -> np.ndarray:
    """float64 -> float32, float16, or the bits of bfloat16 (truncated: any value will do)."""
    if kind == BFLOAT16:
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float16 if kind == FLOAT16 else np.float32)


def reference(held: np.ndarray, kind: int, bits: int, clip: float, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    x = (held.astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else held.astype(np.float32)
    qmax = np.float32(2 ** (bits - 1) - 1)
    largest = np.abs(x).max(axis=1) if x.shape[1] else np.zeros(len(x), np.float32)
    scale = largest * np.float32(clip) / qmax
    scale[scale < np.float32(2.0**-120)] = 0
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=scale > 0)
    q = np.clip(np.rint(x * inverse[:, None]), -qmax - 1, qmax).astype(np.int8)
    if packed:
        nibbles = np.pad(q, ((0, 0), (0, q.shape[1] % 2))).view(np.uint8) & 15
        q = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return q, scale


def run(held, kind, bits, clip, packed, arch="sm_80", misaligned=0, **options):
    memory = Memory()
    tokens, columns = held.shape
    x = memory.allocate("x", held, misaligned=misaligned * held.itemsize)
    width = (columns + 1) // 2 if packed else columns
    q = memory.output("q", (tokens, width), np.uint8 if packed else np.int8, misaligned=misaligned)
    scale = memory.output("scale", (tokens,), np.float32)
    code, launches = program(arch).call(
        "quantize", memory, x, kind, tokens, columns, bits, int(packed), clip, q, scale, **options
    )
    assert code == 0
    return q.numpy(), scale.numpy(), launches


# bits, packed, clip, kind, tokens, columns, misaligned: odd rows shift the alignment of every other token; 9000 columns
# are more than a block keeps in registers.
CASES = [
    (8, False, 1.0, FLOAT32, 3, 64, 0),
    (8, False, 0.9, FLOAT16, 4, 77, 0),
    (4, True, 1.0, FLOAT16, 5, 128, 0),
    (4, True, 0.9, BFLOAT16, 3, 129, 1),
    (4, False, 0.1, FLOAT32, 2, 1, 3),
    (4, True, 1.0, FLOAT32, 2, 9001, 0),
    (8, False, 1.0, BFLOAT16, 2, 9000, 0),
    (8, False, 1.0, FLOAT16, 1, 4096, 0),
    (4, True, 0.5, BFLOAT16, 7, 15, 0),
    (8, False, 1.0, FLOAT16, 3, 0, 0),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_75"])
@pytest.mark.parametrize(("bits", "packed", "clip", "kind", "tokens", "columns", "misaligned"), CASES)
def test_equals_the_contract_bit_for_bit(bits, packed, clip, kind, tokens, columns, misaligned, arch):
    rng = np.random.default_rng(columns)
    held = stored(rng.standard_normal((tokens, columns)) * 10.0 ** rng.integers(-4, 5, (tokens, 1)), kind)
    expected_q, expected_scale = reference(held, kind, bits, clip, packed)
    for order in ("ascending", "descending"):
        q, scale, _ = run(held, kind, bits, clip, packed, arch, misaligned, order=order)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(scale, expected_scale)


def test_ties_go_to_even_and_saturation_is_one_below():
    held = np.array([[7, 0.5, 1.5, -2.5, -7, 6.5]], np.float32)
    q, scale, _ = run(held, FLOAT32, 4, 1.0, False)
    assert scale[0] == 1
    np.testing.assert_array_equal(q, [[7, 0, 2, -2, -7, 6]])
    q, scale, _ = run(held * 2, FLOAT32, 4, 0.5, False)
    assert scale[0] == 1
    np.testing.assert_array_equal(q, [[7, 1, 3, -5, -8, 7]])


@pytest.mark.parametrize(
    "largest", [0.0, 2.0**-149, 7 * 2.0**-120, np.nextafter(np.float32(7 * 2.0**-120), np.float32(0))]
)
def test_zero_and_tiny_tokens(largest):
    """A scale below 2**-120 counts as zero; 2**-120 itself does not."""
    held = np.full((2, 40), largest, np.float32)
    held[1] = 1
    q, scale, _ = run(held, FLOAT32, 4, 1.0, True)
    expected_q, expected_scale = reference(held, FLOAT32, 4, 1.0, True)
    np.testing.assert_array_equal(q, expected_q)
    np.testing.assert_array_equal(scale, expected_scale)
    assert (scale[0] > 0) == (largest >= 7 * 2.0**-120)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16])
def test_nan_and_inf_make_the_scale_nan_and_q_zero(kind, bad):
    values = np.random.default_rng(0).standard_normal((3, 50))
    values[1, 49] = bad
    held = stored(values, kind)
    q, scale, _ = run(held, kind, 8, 1.0, False)
    assert np.isnan(scale[1])
    assert not q[1].any()
    expected_q, expected_scale = reference(held[::2], kind, 8, 1.0, False)
    np.testing.assert_array_equal(q[::2], expected_q)
    np.testing.assert_array_equal(scale[::2], expected_scale)


@pytest.mark.parametrize("kind", [FLOAT32, FLOAT16, BFLOAT16])
def test_x_is_read_once_in_whole_sectors(kind):
    held = stored(np.random.default_rng(0).standard_normal((2, 8192)), kind)
    _, _, launches = run(held, kind, 4, 1.0, True)
    x = launches[0].buffers["x"]
    assert x.distinct_sectors * 32 == held.nbytes
    # float32: a thread's 8 values are two loads, each of half a sector; the second finds the line in L1.
    assert x.requested_sectors == x.distinct_sectors * (2 if kind == FLOAT32 else 1)


def test_bad_arguments_are_refused():
    memory = Memory()
    x = memory.allocate("x", np.zeros((1, 8), np.float32))
    for bits, packed in [(5, 0), (8, 1)]:
        assert program("sm_80").call("quantize", memory, x, 0, 1, 8, bits, packed, 1.0, x, x)[0] == 1
