"""lut_linear with act_bits 4 and 8 on CUDA, run by the PTX executor, against the exact reference and counts.

cuda_blob.py packs the weight, not the header's own functions.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_blob import pack
from lut_linear_run import DTYPES, STEP, Run, random_weight, random_x, rotated
from ptx import Counters

from rcp_kernels.ops import reference

# bits, group (0: one a row), act_bits, tokens, rows, columns, type of x, rotation, elements x is misaligned by
CASES = [
    (2, 128, 4, 1, 96, 4096, "float16", (0, False), 0),
    (2, 128, 4, 1, 33, 1300, "float16", (0, False), 1),
    (2, 128, 8, 1, 16, 5120, "bfloat16", (0, False), 0),
    (2, 128, 4, 1, 40, 4096, "float32", (0, False), 0),
    (2, 64, 4, 1, 17, 1000, "float16", (0, False), 0),
    (2, 32, 8, 1, 50, 700, "float32", (0, False), 1),
    (2, 0, 8, 1, 20, 1111, "bfloat16", (0, False), 1),
    (2, 0, 4, 1, 3, 5, "float16", (0, False), 0),
    (2, 128, 4, 1, 40, 1024, "float16", (128, True), 0),
    (2, 128, 4, 2, 100, 640, "float16", (128, False), 1),
    (2, 64, 4, 8, 40, 832, "bfloat16", (64, True), 0),
    (2, 32, 8, 5, 16, 544, "float32", (32, True), 0),
    (2, 128, 4, 9, 49, 2100, "float16", (0, False), 1),
    (2, 0, 4, 16, 18, 900, "float32", (0, False), 0),
    (2, 128, 4, 17, 33, 700, "float16", (0, False), 0),
    (2, 128, 8, 41, 140, 640, "bfloat16", (128, True), 0),
    (2, 32, 4, 33, 20, 300, "float16", (0, False), 1),
    (3, 128, 4, 1, 40, 4096, "float16", (0, False), 0),
    (3, 128, 8, 1, 70, 1930, "float32", (0, False), 1),
    (3, 64, 4, 1, 33, 900, "float16", (0, False), 0),
    (3, 32, 8, 1, 16, 1200, "bfloat16", (0, False), 0),
    (3, 0, 4, 1, 35, 650, "float16", (0, False), 0),
    (3, 128, 4, 7, 100, 1300, "float16", (0, False), 0),
    (3, 64, 8, 16, 20, 704, "float32", (64, False), 0),
    (3, 0, 8, 17, 20, 500, "float16", (0, False), 0),
    (3, 32, 4, 17, 30, 640, "float16", (32, False), 0),
    (4, 128, 4, 1, 40, 4096, "float16", (0, False), 0),
    (4, 128, 8, 1, 33, 1250, "bfloat16", (0, False), 1),
    (4, 64, 4, 1, 20, 1100, "float32", (0, False), 0),
    (4, 32, 8, 1, 40, 600, "float16", (0, False), 0),
    (4, 0, 4, 1, 33, 700, "float16", (0, False), 0),
    (4, 128, 8, 8, 40, 900, "float16", (0, False), 0),
    (4, 64, 4, 16, 20, 650, "bfloat16", (0, False), 0),
    (4, 0, 8, 3, 20, 700, "float32", (0, False), 0),
    (4, 32, 4, 18, 30, 520, "float16", (0, False), 0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_matches_the_reference(case: tuple) -> None:
    bits, group, act_bits, tokens, rows, columns, kind, rotation, misaligned = case
    group = group or columns
    x = random_x(tokens, columns, kind)
    clip = 0.8 if columns % 4 else 1.0
    q, scale = reference.quantize_activation(rotated(x, rotation), act_bits, clip)
    size = 4 if kind == "float32" else 2

    # All scales one: every order of summation is exact, so y is the rounded product of two known numbers.
    exact = random_weight(bits, rows, columns, group, unit_scales=True)
    sums = reference.lut_linear_group_sums(q, exact).sum(-1)
    assert sums.abs().max() < 2**24
    expected = (sums.to(torch.float32) * scale[:, None]).to(x.dtype).to(torch.float64)
    run = Run(exact, x, act_bits=act_bits, clip=clip, rotation=rotation, misaligned=misaligned * size)
    assert torch.equal(run.y, expected)

    weight = random_weight(bits, rows, columns, group, unit_scales=False, seed=2)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3)).to(list(DTYPES.values())[rows % 3])
    run = Run(weight, x, bias, act_bits, clip, rotation, misaligned * size, order=5)
    sums = reference.lut_linear_group_sums(q, weight).to(torch.float64)
    terms = sums * weight.scales.to(torch.float64) * float(weight.tensor_scale) * scale.to(torch.float64)[:, None, None]
    expected = terms.sum(-1) + bias.to(torch.float64)
    magnitude = terms.abs().sum(-1) + bias.to(torch.float64).abs()
    bound = (sums.shape[-1] + 2) * 2.0**-24 * magnitude
    assert ((run.y - expected).abs() <= bound + STEP[kind] * (expected.abs() + bound)).all()
    again = Run(weight, x, bias, act_bits, clip, rotation, misaligned * size, order="descending")
    assert np.array_equal(run.bits, again.bits)


@pytest.mark.parametrize(("bits", "group", "tokens"), [(2, 128, 1), (2, 64, 1), (2, 128, 4), (2, 0, 12), (2, 32, 20)])
def test_turing_gives_the_same(bits: int, group: int, tokens: int) -> None:
    rows, columns = 40, 1300
    weight = random_weight(bits, rows, columns, group or columns, unit_scales=False)
    x = random_x(tokens, columns, "float16")
    assert np.array_equal(Run(weight, x, arch="sm_75").bits, Run(weight, x).bits)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_tokens_that_are_not_finite_or_zero(tokens: int) -> None:
    weight = random_weight(2, 40, 640, 128, unit_scales=True)
    x = random_x(tokens, 640, "float16")
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = x.clone()
        spoiled[0, 637] = bad
        y = Run(weight, spoiled).y
        assert y[0].isnan().all()
        assert torch.equal(y[1:], Run(weight, x).y[1:])
    x[0] = 0.0
    bias = torch.arange(40, dtype=torch.float32)
    assert torch.equal(Run(weight, x, bias).y[0], bias.to(torch.float64))


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_a_foreign_weight_gives_nan(tokens: int) -> None:
    weight = random_weight(2, 20, 256, 128, unit_scales=True)
    x = random_x(tokens, 256, "float16")
    for place in (0, 5, 8):
        blob = pack(weight)
        blob[place] += 1
        assert Run(weight, x, blob=blob).y.isnan().all()
    for rows, columns, group in ((21, 256, 128), (32, 256, 128), (20, 255, 128), (20, 129, 128), (20, 256, 256)):
        blob = pack(random_weight(2, rows, columns, group, unit_scales=True))
        assert blob.size == pack(weight).size
        assert Run(weight, x, blob=blob).y.isnan().all(), (rows, columns, group)


def test_maxima_of_one_token() -> None:
    """4096 float16: zeros, the smallest numbers, and maxima whose quotients by qmax are ties or next to one."""
    weight = random_weight(2, 16, 4096, 128, unit_scales=True)
    generator = torch.Generator().manual_seed(7)
    for largest in (0.0, 2.0**-24, 3 * 2.0**-24, 2.0**-14, 1791 * 2.0**-10, 7.0, 1015.0, 65504.0, float("inf")):
        x = torch.rand(1, 4096, generator=generator, dtype=torch.float64) * 2 - 1
        x[0, :28] = torch.arange(-14, 14) / 14  # ties of 4 bits where 7 divides the maximum
        x = (x * (largest if largest < float("inf") else 1.0)).to(torch.float16)
        x[0, 100] = largest
        for act_bits in (4, 8):
            y = Run(weight, x, act_bits=act_bits).y
            if largest == float("inf"):
                assert y.isnan().all()
                continue
            q, scale = reference.quantize_activation(x, act_bits, 1.0)
            sums = reference.lut_linear_group_sums(q, weight).sum(-1)
            assert torch.equal(y, (sums.to(torch.float32) * scale[:, None]).to(x.dtype).to(torch.float64)), largest


@pytest.mark.parametrize(("tokens", "columns"), [(1, 32768), (8, 49152)])
def test_splits_of_the_columns(tokens: int, columns: int) -> None:
    """Few rows and many multiprocessors: the columns are split, and the last block adds the sums in order.

    With 8 tokens four warps of a block store sums, and one thread arrives for them.
    """
    weight = random_weight(2, 16, columns, 128, unit_scales=False)
    x = random_x(tokens, columns, "float16")
    runs = [Run(weight, x, sms=108, order=order) for order in ("ascending", "descending", 3)]
    counts = runs[0].counts[-1]
    assert counts.blocks > 1
    assert "workspace" in counts.buffers
    assert np.array_equal(runs[0].bits, runs[1].bits)
    assert np.array_equal(runs[0].bits, runs[2].bits)
    q, scale = reference.quantize_activation(x, 4, 1.0)
    expected = reference.lut_linear(x, weight)
    sums = reference.lut_linear_group_sums(q, weight).to(torch.float64) * weight.scales.to(torch.float64)
    steps = columns / 128 + 2
    bound = steps * 2.0**-24 * sums.abs().sum(-1) * scale.to(torch.float64)[:, None] * float(weight.tensor_scale)
    assert ((runs[0].y - expected).abs() <= bound + STEP["float16"] * (expected.abs() + bound)).all()


def test_division_by_qmax_is_exact() -> None:
    """The kernels divide by 7 and 127 with a product and one correction. This compares every significand."""
    clipped = np.arange(2**23, 2**24, dtype=np.float32)
    for qmax in (np.float32(7), np.float32(127)):
        inverse = np.float32(1) / qmax
        quotient = clipped * inverse
        # Both fused steps are exact in float64 before their one rounding: 24 + 7 bits, and 24 + 24 bits.
        rest = (clipped.astype(np.float64) - quotient.astype(np.float64) * np.float64(qmax)).astype(np.float32)
        corrected = (rest.astype(np.float64) * np.float64(inverse) + quotient.astype(np.float64)).astype(np.float32)
        assert np.array_equal(corrected, clipped / qmax)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_weight_byte_is_fetched_once(bits: int) -> None:
    """In whole sectors and 16 bytes a lane. Only the header is read by every warp, 16 bytes each."""
    weight = random_weight(bits, 96, 4096, 128, unit_scales=False)
    (counts,) = Run(weight, random_x(1, 4096, "float16"), sms=1).counts
    traffic, warps = counts.buffers["weight"], counts.threads // 32
    unit_bytes = pack(weight).size - 128
    assert traffic.used_bytes == unit_bytes + 16
    assert traffic.requested_sectors == unit_bytes // 32 + warps
    assert counts.bank_conflicts() == 0
    assert not counts.uses_local_memory


def fetched_bytes(runs: list[Counters]) -> int:
    return 32 * sum(a.sectors for c in runs for a in (*c.global_loads.values(), *c.global_stores.values()))


def test_eight_tokens_cost_little_more_than_one() -> None:
    """Blocks as at 4096 x 4096, fewer of them: 4 row tiles each for one token, 6 for eight.

    The GEMV launches grow with the rows, the launch that quantizes does not; scaled to 4096 rows. PTX has moves that
    become no instructions: 1.35 there is about 1.2 in SASS.
    """
    weight = random_weight(2, 384, 4096, 128, unit_scales=False)
    one, eight = (Run(weight, random_x(tokens, 4096, "float16"), sms=6).counts for tokens in (1, 8))
    assert [c.blocks for c in one] == [6]
    assert [c.blocks for c in eight] == [8, 4]
    rows = 4096 / 384
    assert rows * fetched_bytes(eight[1:]) + fetched_bytes(eight[:1]) <= 1.3 * rows * fetched_bytes(one)
    instructions = [c.warp_instructions for c in (one[0], *eight)]
    assert rows * instructions[2] + instructions[1] <= 1.36 * rows * instructions[0]
    assert one[0].bank_conflicts() == 0
    print("bytes", fetched_bytes(one), fetched_bytes(eight[:1]), fetched_bytes(eight[1:]), "PTX", instructions)
    print("conflicts", eight[0].bank_conflicts(), eight[1].bank_conflicts())
