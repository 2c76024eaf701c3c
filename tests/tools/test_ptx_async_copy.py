"""cp.async in the executor: groups, waiting, and who sees the copies."""

import numpy as np
import pytest
from ptx import Memory, PtxError
from ptx.bench import kernel, run

RANDOM = np.random.default_rng(9)
PIPELINE = """
mov.u32 %r0, %tid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
mul.wide.u32 %x2, %r0, 16;
add.u64 %x0, %x0, %x2;
add.u64 %x1, %x1, %x2;
shl.b32 %r1, %r0, 4;
mov.u32 %r2, tile;
add.u32 %r1, %r1, %r2;
cp.async.cg.shared.global [%r1], [%x0], 16;
cp.async.commit_group;
cp.async.ca.shared.global [%r1+512], [%x0+512], 16, 6;
cp.async.commit_group;
{first}
ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1];
st.global.v4.u32 [%x1], {{%r4, %r5, %r6, %r7}};
{second}
ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r1+512];
st.global.v4.u32 [%x1+512], {{%r4, %r5, %r6, %r7}};
"""


def pipeline(first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    memory = Memory()
    x = RANDOM.integers(0, 256, 1024, dtype=np.uint8)
    source, y = memory.allocate("x", x), memory.output("y", 1024, np.uint8)
    body = PIPELINE.format(first=first, second=second)
    run(kernel(body, 2, ".shared .align 16 .b8 tile[1024];\n"), memory, source, y)
    return x, y.numpy()


def test_asynchronous_copies():
    wait = "cp.async.wait_group {};"
    for second in (wait.format(0), "cp.async.wait_all;"):
        x, y = pipeline(wait.format(1), second)
        assert (y[:512] == x[:512]).all()
        rows, copied = y[512:].reshape(32, 16), x[512:].reshape(32, 16)
        assert (rows[:, :6] == copied[:, :6]).all()
        assert (rows[:, 6:] == 0).all()


@pytest.mark.parametrize(
    ("first", "second"),
    [("", ""), ("cp.async.wait_group 2;", ""), ("cp.async.wait_group 1;", "cp.async.wait_group 1;")],
)
def test_asynchronous_copies_that_were_not_waited_for(first, second):
    with pytest.raises(PtxError, match=r"load of 16 bytes: .*cp.async that was not waited for.*ld.shared.v4"):
        pipeline(first, second)


def test_a_store_to_where_a_copy_will_arrive():
    with pytest.raises(PtxError, match=r"store of 4 bytes: .*cp.async that was not waited for.*st.shared.u32"):
        pipeline("st.shared.u32 [%r1+4], %r0;", "")


def test_asynchronous_copies_must_end():
    body = PIPELINE.split("{first}")[0].replace("{{", "{").replace("}}", "}")
    memory = Memory()
    x, y = memory.allocate("x", np.zeros(1024, np.uint8)), memory.output("y", 1024, np.uint8)
    with pytest.raises(PtxError, match=r"a cp\.async must be waited for"):
        run(kernel(body, 2, ".shared .align 16 .b8 tile[1024];\n"), memory, x, y)


def test_asynchronous_copies_are_seen_by_others_after_a_barrier_only():
    """Each thread reads what its neighbour copied."""
    body = """
mov.u32 %r0, %tid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
mul.wide.u32 %x2, %r0, 4;
add.u64 %x0, %x0, %x2;
add.u64 %x1, %x1, %x2;
mov.u32 %r2, tile;
shl.b32 %r1, %r0, 2;
xor.b32 %r3, %r1, 128;
add.u32 %r1, %r1, %r2;
add.u32 %r3, %r3, %r2;
cp.async.ca.shared.global [%r1], [%x0], 4;
cp.async.wait_all;
BARRIER
ld.shared.u32 %r4, [%r3];
st.global.u32 [%x1], %r4;
"""
    declarations = ".shared .align 4 .b8 tile[256];\n"
    memory = Memory()
    x, y = memory.allocate("x", np.arange(64, dtype=np.uint32)), memory.output("y", 64, np.uint32)
    run(kernel(body.replace("BARRIER", "bar.sync 0;"), 2, declarations), memory, x, y, block=64)
    assert y.numpy().tolist() == [i ^ 32 for i in range(64)]
    with pytest.raises(PtxError, match="race in shared memory"):
        run(kernel(body.replace("BARRIER", ""), 2, declarations), memory, x, y, block=64)
