"""What blocks and warps may know of one another's stores: fences, atomics and barriers."""

import numpy as np
import pytest
from ptx import Memory, PtxError
from ptx.bench import kernel, run

SPLIT_SUM = """
mov.u32 %r0, %ctaid.x;
mov.u32 %r9, %nctaid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
ld.param.u64 %x2, [p2];
mul.wide.u32 %x3, %r0, 4;
add.u64 %x3, %x0, %x3;
add.u32 %r1, %r0, 1;
{early}
st.global.u32 [%x3], %r1;
{fence}
sub.u32 %r2, %r9, 1;
atom{atomic}.global.inc.u32 %r3, [%x1], %r2;
setp.ne.u32 %p1, %r3, %r2;
{last}
{after}
mov.u32 %r4, 0;
mov.u32 %r5, 0;
LOOP:
mul.wide.u32 %x3, %r4, 4;
add.u64 %x3, %x0, %x3;
ld.global{constant}.u32 %r6, [%x3];
add.u32 %r5, %r5, %r6;
add.u32 %r4, %r4, 1;
setp.lt.u32 %p2, %r4, %r9;
@%p2 bra LOOP;
st.global.u32 [%x2], %r5;
"""


def split_sum(fence="membar.gl;", atomic="", last="@%p1 ret;", after="membar.gl;", constant="", early="", **options):
    memory = Memory()
    parts = memory.output("parts", 7, np.uint32)
    counter = memory.allocate("counter", np.zeros(1, np.uint32), writable=True)
    total = memory.output("total", 1, np.uint32)
    body = SPLIT_SUM.format(fence=fence, atomic=atomic, last=last, after=after, constant=constant, early=early)
    for _ in range(2):
        run(kernel(body, 3), memory, parts, counter, total, grid=7, block=1, **options)
        assert total.numpy().tolist() == [28]
        # It counts to 0 again by itself.
        assert counter.numpy().tolist() == [0]


@pytest.mark.parametrize(
    "options", [{}, {"blocks_at_once": 1}, {"order": "descending"}, {"order": 3, "blocks_at_once": 2}]
)
def test_the_last_block_adds_up(options):
    split_sum(**options)
    split_sum(fence="fence.acq_rel.gpu;", **options)
    split_sum(fence="", atomic=".acq_rel.gpu", after="", **options)


@pytest.mark.parametrize(
    "fault",
    [
        {"fence": ""},
        {"fence": "membar.cta;"},
        {"early": "membar.gl;", "fence": ""},
        {"last": ""},
        {"after": ""},
        {"after": "membar.cta;"},
        {"constant": ".nc"},
    ],
    ids=str,
)
def test_faults_between_blocks(fault):
    for options in ({}, {"blocks_at_once": 1}, {"order": 3}):
        with pytest.raises(PtxError, match=r"race in global memory|uninitialised read"):
            split_sum(**fault, **options)


WARPS_SUM = """
mov.u32 %r0, %ctaid.x;
mov.u32 %r9, %nctaid.x;
mov.u32 %r7, %tid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
ld.param.u64 %x2, [p2];
mad.lo.u32 %r8, %r0, 96, %r7;
mul.wide.u32 %x3, %r8, 4;
add.u64 %x3, %x0, %x3;
add.u32 %r1, %r0, 1;
st.global.u32 [%x3], %r1;
{fence}
{barrier}
setp.ne.u32 %p1, %r7, 0;
@%p1 bra JOIN;
{leader}
atom.global.add.u32 %r3, [%x1], 1;
{acquire}
st.shared.u32 [s0], %r3;
JOIN:
bar.sync 0;
ld.shared.u32 %r3, [s0];
sub.u32 %r2, %r9, 1;
setp.ne.u32 %p1, %r3, %r2;
@%p1 ret;
{after}
mov.u32 %r4, 0;
mov.u32 %r5, 0;
LOOP:
mad.lo.u32 %r8, %r4, 96, %r7;
mul.wide.u32 %x3, %r8, 4;
add.u64 %x3, %x0, %x3;
ld.global.u32 %r6, [%x3];
add.u32 %r5, %r5, %r6;
add.u32 %r4, %r4, 1;
setp.lt.u32 %p2, %r4, %r9;
@%p2 bra LOOP;
mul.wide.u32 %x3, %r7, 4;
add.u64 %x3, %x2, %x3;
st.global.u32 [%x3], %r5;
"""


def warps_sum(fence="", barrier="bar.sync 0;", leader="", acquire="", after="", **options):
    """Three warps a block store, one thread tells the others: who fences, and on which side of the barriers?"""
    memory = Memory()
    parts = memory.output("parts", 5 * 96, np.uint32)
    counter = memory.allocate("counter", np.zeros(1, np.uint32), writable=True)
    total = memory.output("total", 96, np.uint32)
    body = WARPS_SUM.format(fence=fence, barrier=barrier, leader=leader, acquire=acquire, after=after)
    run(kernel(body, 3, ".shared .align 4 .b32 s0;"), memory, parts, counter, total, grid=5, block=96, **options)
    assert total.numpy().tolist() == [15] * 96


@pytest.mark.parametrize("options", [{}, {"blocks_at_once": 1}, {"order": 3, "blocks_at_once": 2}], ids=str)
def test_a_barrier_hands_on_what_a_fence_orders(options):
    for fences in (
        {"fence": "membar.gl;", "after": "membar.gl;"},  # each thread for itself
        {"leader": "membar.gl;", "acquire": "membar.gl;"},  # one thread for all
    ):
        warps_sum(**fences, **options)
        for missing in (*fences, "barrier"):
            with pytest.raises(PtxError, match="race in global memory"):
                warps_sum(**{**fences, missing: ""}, **options)
