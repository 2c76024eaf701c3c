"""The launches of lut_linear with act_bits 4 and 8: how blocks are spread, and launches that begin early."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from lut_linear_run import Run, program, random_weight, random_x
from ptx import PtxError


@pytest.mark.parametrize(("bits", "tokens"), [(2, 1), (3, 1), (2, 5), (2, 20)])
def test_launches_that_begin_early_give_the_same(bits: int, tokens: int) -> None:
    """sm_90: before griddepcontrol.wait the kernels load weights and bias alone (the executor checks each access)."""
    rows, columns = 40, 1300
    weight, x = random_weight(bits, rows, columns, 128, unit_scales=False), random_x(tokens, columns, "float16")
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    run = Run(weight, x, bias, arch="sm_90")
    assert np.array_equal(run.bits, Run(weight, x, bias).bits)
    # The kernel for many tokens has no wait, so it is launched as usual.
    assert [c.early for c in run.counts] == {1: [True], 5: [True, True], 20: [True, False]}[tokens]
    if tokens < 20:
        with pytest.raises(PtxError, match=r"loads byte \d+ of buffer 'weight'.* before griddepcontrol.wait"):
            Run(weight, x, bias, arch="sm_90", early_buffers=())


def test_code_for_older_gpus_is_not_launched_early() -> None:
    """Code for sm_80 runs on newer GPUs too, and has no griddepcontrol.wait."""
    for arch, capability, expected in (("sm_80", 80, 0), ("sm_80", 90, 0), ("sm_90", 90, 1), ("sm_90", 120, 0)):
        assert plan_of(1, 2048, 4096, 108, arch, capability)[3] == expected, (arch, capability)


def plan_of(
    tokens: int, rows: int, columns: int, sms: int, arch: str = "sm_80", capability: int = 80
) -> tuple[int, ...]:
    """(row tiles of a block, blocks along the rows, splits, early) at 2 bits and G = 128."""
    library = program(2, arch).library
    library.plan_part.restype = ctypes.c_int64
    arguments = [ctypes.c_int64(value) for value in (sms, tokens, rows, columns, 128, capability)]
    return tuple(library.plan_part(ctypes.c_int64(part), *arguments) for part in range(4))


def test_blocks_of_one_token_spread_over_the_multiprocessors() -> None:
    """The busiest multiprocessor has the fewest row tiles that are possible, in one wave and without splits."""
    for sms in (46, 82, 108, 132):
        for rows in (512, 2048, 4096, 11008):
            row_tiles, blocks, splits, _ = plan_of(1, rows, 4096, sms)
            assert splits == 1, (rows, sms)
            assert blocks <= sms, (rows, sms)
            assert row_tiles == -(-rows // (16 * sms)), (rows, sms)
    # A vocabulary: more row tiles than a block takes, in full waves.
    row_tiles, blocks, splits, _ = plan_of(1, 152064, 4096, 108)
    assert (splits, -(-blocks // 108) * row_tiles) == (1, 90)


@pytest.mark.parametrize("row_tiles", [1, 2, 3])
def test_row_tiles_of_a_block(row_tiles: int) -> None:
    """The last block has fewer, and the sums of each of 9 units a row do not depend on it."""
    weight = random_weight(2, 16 * 4, 4500, 128, unit_scales=False)
    x = random_x(1, 4500, "float16")
    run = Run(weight, x, sms=-(-4 // row_tiles))
    assert run.counts[0].blocks == -(-4 // row_tiles)
    assert np.array_equal(run.bits, Run(weight, x, sms=1).bits)
