"""Control flow of the executor: divergence, barriers, what is a race, what is refused, what is counted."""

import numpy as np
import pytest
from ptx import Memory, PtxError, launch, parse
from ptx.bench import evaluate, kernel, run

RANDOM = np.random.default_rng(8)


def test_a_loop_of_another_length_in_every_lane():
    """Steps to 1 by Collatz's rule."""
    a = RANDOM.integers(1, 60, 200).astype(np.uint32)
    text = """
mov.u32 %d_, 0;
LOOP:
setp.le.u32 %p1, %a, 1;
@%p1 bra DONE;
and.b32 %r5, %a, 1;
setp.eq.u32 %p2, %r5, 0;
add.u32 %d_, %d_, 1;
@!%p2 bra ODD;
shr.u32 %a, %a, 1;
bra.uni LOOP;
ODD:
mad.lo.u32 %a, %a, 3, 1;
bra LOOP;
DONE:
activemask.b32 %e_;
"""

    def steps(n):
        count = 0
        while n > 1:
            n = n // 2 if n % 2 == 0 else 3 * n + 1
            count += 1
        return count

    found = evaluate(text, {"a": a}, {"d_": "uint32", "e_": "uint32"})
    assert found["d_"].tolist() == [steps(n) for n in a.tolist()]
    # All lanes of a warp are together again: those of the last one that are no threads are not.
    assert found["e_"].tolist() == [2**32 - 1] * 192 + [255] * 8


def test_counts_of_a_divergent_branch():
    """Per warp an instruction counts once, however many lanes execute it."""
    body = """
mov.u32 %r0, %tid.x;
setp.lt.u32 %p1, %r0, 40;
@%p1 bra LOW;
add.u32 %r1, %r0, 1;
bra END;
LOW:
add.u32 %r1, %r0, 2;
END:
add.u32 %r1, %r1, 3;
"""
    counters = run(kernel(body), Memory(), block=96, grid=2)
    # Warp 0 goes low, warp 1 both ways, warp 2 high; two blocks.
    assert counters.per_instruction.tolist() == [6, 6, 6, 4, 4, 4, 6, 6]
    assert counters.lanes.tolist() == [192, 192, 80, 112, 112, 80, 192, 192]
    assert counters.warp_instructions == 42
    assert counters.thread_instructions == 42 * 32
    assert counters.by_class() == {"mov": 6, "setp": 6, "bra": 10, "add": 14, "ret": 6}
    assert counters.basic_blocks() == [(0, 3, 6), (3, 5, 4), (5, 6, 4), (6, 8, 6)]
    assert (counters.blocks, counters.threads) == (2, 192)


REDUCTION = """
mov.u32 %r0, %tid.x;
mov.u32 %r9, %ctaid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
mad.lo.u32 %r8, %r9, 128, %r0;
mul.wide.u32 %x2, %r8, 4;
add.u64 %x0, %x0, %x2;
ld.global.u32 %r1, [%x0];
shl.b32 %r2, %r0, 2;
mov.u32 %r3, tile;
add.u32 %r2, %r2, %r3;
st.shared.u32 [%r2], %r1;
mov.u32 %r4, 64;
LOOP:
{barrier}
setp.ge.u32 %p1, %r0, %r4;
@%p1 bra SKIP;
shl.b32 %r5, %r4, 2;
add.u32 %r5, %r5, %r2;
ld.shared.u32 %r6, [%r5];
ld.shared.u32 %r7, [%r2];
add.u32 %r7, %r7, %r6;
st.shared.u32 [%r2], %r7;
SKIP:
shr.u32 %r4, %r4, 1;
setp.ne.u32 %p2, %r4, 0;
@%p2 bra LOOP;
{last}
setp.ne.u32 %p1, %r0, {reader};
@%p1 ret;
mul.wide.u32 %x2, %r9, 4;
add.u64 %x1, %x1, %x2;
ld.shared.u32 %r6, [tile];
st.global.u32 [%x1], %r6;
"""


def reduction(barrier="bar.sync 0;", last="bar.sync 0;", reader=0, **options):
    memory = Memory()
    values = RANDOM.integers(0, 1000, (5, 128)).astype(np.uint32)
    x, y = memory.allocate("x", values), memory.output("y", 5, np.uint32)
    body = REDUCTION.format(barrier=barrier, last=last, reader=reader)
    counters = run(kernel(body, 2, ".shared .align 4 .b8 tile[512];\n"), memory, x, y, grid=5, block=128, **options)
    assert y.numpy().tolist() == values.sum(1).tolist()
    return counters


@pytest.mark.parametrize("options", [{}, {"blocks_at_once": 1}, {"order": 9, "blocks_at_once": 2}])
def test_a_reduction(options):
    counters = reduction(**options)
    assert counters.barriers == 5 * 8
    assert counters.bank_conflicts() == 0
    assert reduction(last="barrier.cta.sync.aligned 0;", reader=127, **options).barriers == 40
    assert reduction(barrier="barrier.sync 1;", **options).barriers == 40
    # Thread 0 wrote the sum itself.
    reduction(last="", **options)


@pytest.mark.parametrize("options", [{}, {"blocks_at_once": 1}, {"order": "descending"}])
@pytest.mark.parametrize(
    "fault", [{"barrier": ""}, {"barrier": "bar.warp.sync -1;"}, {"last": "", "reader": 1}, {"last": "", "reader": 64}]
)
def test_a_missing_barrier(fault, options):
    with pytest.raises(PtxError, match=r"race in shared memory: (reads|writes) byte \d+ that thread .* no barrier"):
        reduction(**fault, **options)


def test_races_can_be_left_alone():
    # Lanes of a warp run together here, so without looking for races this gives what it would with barriers.
    with pytest.raises(PtxError):
        reduction(last="", reader=64)
    reduction(last="", reader=64, races=False)


NEIGHBOURS = """
mov.u32 %r0, %tid.x;
mov.u32 %r3, tile;
shl.b32 %r1, %r0, 2;
xor.b32 %r2, %r1, {other};
add.u32 %r1, %r1, %r3;
add.u32 %r2, %r2, %r3;
{first}
{sync}
{second}
"""


@pytest.mark.parametrize(
    ("other", "first", "second", "sync", "fine"),
    [
        (4, "st.shared.u32 [%r1], %r0;", "ld.shared.u32 %r5, [%r2];", "bar.warp.sync -1;", True),
        (4, "st.shared.u32 [%r1], %r0;", "ld.shared.u32 %r5, [%r2];", "", False),
        (4, "st.shared.u32 [%r1], %r0;", "ld.shared.u32 %r5, [%r2];", "shfl.sync.bfly.b32 %r6, %r0, 1, 31, -1;", False),
        (128, "st.shared.u32 [%r1], %r0;", "ld.shared.u32 %r5, [%r2];", "bar.warp.sync -1;", False),
        (128, "st.shared.u32 [%r1], %r0;", "ld.shared.u32 %r5, [%r2];", "bar.sync 0;", True),
        (128, "st.shared.u32 [%r1], %r0;", "st.shared.u32 [%r2], %r0;", "", False),
        (4, "st.shared.u32 [%r1], %r0;", "st.shared.u32 [%r2], %r0;", "bar.warp.sync -1;", True),
        (4, "st.shared.u32 [%r1], %r0; bar.sync 0; ld.shared.u32 %r5, [%r2];", "st.shared.u32 [%r1], 3;", "", False),
        (
            4,
            "st.shared.u32 [%r1], %r0; bar.sync 0; ld.shared.u32 %r5, [%r2];",
            "st.shared.u32 [%r1], 3;",
            "bar.warp.sync -1;",
            True,
        ),
        (128, "st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r5, [%r3];", "st.shared.u32 [%r1], 3;", "", False),
        (
            128,
            "st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r5, [%r3];",
            "st.shared.u32 [%r1], 3;",
            "bar.sync 0;",
            True,
        ),
        (128, "st.shared.u32 [%r1], 1; bar.sync 0; ld.shared.u32 %r5, [%r2];", "ld.shared.u32 %r5, [%r1];", "", True),
        (0, "st.shared.u32 [%r3], 1;", "", "", True),
        (0, "st.shared.u32 [%r3], 1;", "st.shared.u32 [%r3], 1;", "", False),
        (0, "st.shared.u32 [%r3], %r0;", "", "", False),
        (0, "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.u32 [%r3], 1;", "", "", True),
        (0, "setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.u32 [%r3], %r0;", "", "", False),
        (0, "st.shared.u8 [%r1], %r0;", "st.shared.u8 [%r1+1], %r0;", "", True),
        (4, "st.shared.u8 [%r1], %r0;", "st.shared.u8 [%r2+1], %r0;", "", True),
        (0, "atom.shared.add.u32 %r5, [%r3], 1;", "", "", True),
    ],
)
def test_what_is_a_race(other, first, second, sync, fine):
    first = first.replace("atom", "setp.eq.u32 %p2, %r0, 0; @%p2 st.shared.u32 [%r3], 0; bar.sync 0; atom")
    body = NEIGHBOURS.format(other=other, first=first, second=second, sync=sync)
    text = kernel(body, 0, ".shared .align 4 .b8 tile[512];\n")
    for options in ({}, {"blocks_at_once": 1}):
        if fine:
            run(text, Memory(), block=64, grid=2, **options)
        else:
            with pytest.raises(PtxError, match="race in shared memory"):
                run(text, Memory(), block=64, grid=2, **options)


# Warp 0 produces, warp 1 consumes; each tells the other by a barrier at which it does not wait itself.
PRODUCER = """
mov.u32 %r0, %tid.x;
mov.u32 %r3, tile;
and.b32 %r4, %r0, 31;
shl.b32 %r1, %r4, 2;
add.u32 %r1, %r1, %r3;
mov.u32 %r9, 0;
mov.u32 %r7, 0;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra CONSUMER;
PRODUCER:
{producer_waits}
add.u32 %r5, %r9, %r4;
st.shared.u32 [%r1], %r5;
bar.arrive 1, 64;
add.u32 %r9, %r9, 1;
setp.lt.u32 %p2, %r9, 3;
@%p2 bra PRODUCER;
bar.sync 2, 64;
ret;
CONSUMER:
bar.arrive 2, 64;
CONSUMED:
{consumer_waits}
xor.b32 %r8, %r1, 4;
ld.shared.u32 %r6, [%r8];
add.u32 %r7, %r7, %r6;
bar.arrive 2, 64;
add.u32 %r9, %r9, 1;
setp.lt.u32 %p2, %r9, 3;
@%p2 bra CONSUMED;
ld.param.u64 %x0, [p0];
mul.wide.u32 %x1, %r4, 4;
add.u64 %x0, %x0, %x1;
st.global.u32 [%x0], %r7;
"""


def test_barriers_of_parts_of_a_block():
    def run_with(producer_waits="bar.sync 2, 64;", consumer_waits="bar.sync 1, 64;"):
        memory = Memory()
        y = memory.output("y", 32, np.uint32)
        body = PRODUCER.format(producer_waits=producer_waits, consumer_waits=consumer_waits)
        run(kernel(body, 1, ".shared .align 128 .b8 tile[128];\n"), memory, y, block=64)
        return y.numpy()

    assert run_with().tolist() == [3 * (i ^ 1) + 3 for i in range(32)]
    with pytest.raises(PtxError, match=r"race in shared memory|uninitialised|take part"):
        run_with(consumer_waits="")
    with pytest.raises(PtxError, match=r"race in shared memory|take part|must arrive"):
        run_with(producer_waits="")


def test_barriers_that_reduce():
    a = RANDOM.integers(0, 2, 128).astype(np.uint32)
    text = """
setp.ne.u32 %p1, %a, 0;
bar.red.popc.u32 %d_, 0, %p1;
barrier.cta.red.or.aligned.pred %p2, 0, %p1;
selp.u32 %e_, 1, 0, %p2;
bar.red.and.pred %p3, 0, !%p1;
selp.u32 %f_, 1, 0, %p3;
"""
    found = evaluate(text, {"a": a}, dict.fromkeys(("d_", "e_", "f_"), "uint32"), block=64)
    for block in (slice(0, 64), slice(64, 128)):
        assert set(found["d_"][block].tolist()) == {int(a[block].sum())}
        assert set(found["e_"][block].tolist()) == {1}
        assert set(found["f_"][block].tolist()) == {0}


@pytest.mark.parametrize("instruction", ["bar.sync 0;", "bar.sync 0, 64;", "barrier.cta.sync 0;"])
def test_a_barrier_that_not_all_reach(instruction):
    body = f"mov.u32 %r0, %tid.x;\nsetp.ge.u32 %p1, %r0, 40;\n@%p1 ret;\n{instruction}"
    with pytest.raises(
        PtxError, match=r"must arrive at a barrier, got 40 at barrier 0 of block \(0, 0, 0\) \(line \d+: bar"
    ):
        run(kernel(body), Memory(), block=64)


def test_different_barriers_in_two_branches():
    body = """
mov.u32 %r0, %tid.x;
setp.ge.u32 %p1, %r0, 32;
@%p1 bra HIGH;
bar.sync 0;
ret;
HIGH:
bar.sync 1;
"""
    with pytest.raises(PtxError, match="must arrive at a barrier"):
        run(kernel(body), Memory(), block=64)
    run(kernel(body.replace("bar.sync 1", "bar.sync 0")), Memory(), block=64)


def test_endless_loops_end():
    with pytest.raises(PtxError, match="endless loop"):
        run(kernel("LOOP:\nbra LOOP;"), Memory(), most_issues=1000)


def test_traps():
    with pytest.raises(PtxError, match=r"a trap was executed; line \d+: trap"):
        run(kernel("trap;"), Memory())


def test_grids_and_special_registers():
    names = [f"{r}.{axis}" for r in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"] + ["laneid", "warpid"]
    masks = ["lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"]
    moves = "\n".join(f"mov.u32 %r1, %{n};\nst.global.u32 [%x0+{4 * i}], %r1;" for i, n in enumerate(names + masks))
    body = f"""
mov.u32 %r0, 0;
{
        "".join(
            f"mov.u32 %r1, %n{r}; mad.lo.u32 %r0, %r0, %r1, 0; mov.u32 %r1, %{r}; add.u32 %r0, %r0, %r1;"
            for r in ("ctaid.z", "ctaid.y", "ctaid.x", "tid.z", "tid.y", "tid.x")
        )
    }
ld.param.u64 %x0, [p0];
mul.wide.u32 %x1, %r0, 128;
add.u64 %x0, %x0, %x1;
{moves}
"""
    grid, block = (2, 3, 2), (5, 3, 4)
    count = int(np.prod(grid) * np.prod(block))
    memory = Memory()
    y = memory.allocate("y", np.zeros((count, 32), np.uint32), writable=True)
    run(kernel(body, 1), memory, y, grid=grid, block=block, order=5)
    rows = iter(y.numpy().tolist())
    for cz, cy, cx in np.ndindex(grid[::-1]):
        for thread, (tz, ty, tx) in enumerate(np.ndindex(block[::-1])):
            lane = thread % 32
            wanted = [tx, ty, tz, *block, cx, cy, cz, *grid, lane, thread // 32]
            wanted += [1 << lane, (1 << lane) - 1, (2 << lane) - 1, 2**32 - (2 << lane), 2**32 - (1 << lane)]
            assert next(rows)[: len(wanted)] == wanted


def test_wrong_launches():
    module = parse(kernel("", 2).replace(")\n{", ")\n.reqntid 64, 1, 1\n{", 1))
    memory = Memory()
    for arguments, block, message in (
        ([1], 64, "takes 2 parameters, got 1"),
        ([1, b"123"], 64, "has 8 bytes, got 3"),
        ([1, 2], 32, r"takes blocks of \(64, 1, 1\)"),
    ):
        with pytest.raises(PtxError, match=message):
            launch(module, "test", memory, 1, block, arguments)
    with pytest.raises(PtxError, match=r"takes blocks of 1 to 1024 threads .* got block \(1025, 1, 1\)"):
        run(kernel(""), memory, block=1025)
    with pytest.raises(PtxError, match="at least one block"):
        run(kernel(""), memory, grid=0)
    with pytest.raises(PtxError, match="bytes of shared memory at most"):
        run(kernel("", 0, ".shared .b8 a[232449];\n"), memory)
    with pytest.raises(PtxError, match="must select one kernel"):
        launch(module, "other", memory, 1, 64, [])
