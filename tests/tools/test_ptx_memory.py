"""Memory of the executor: spaces, widths, atomics, forbidden accesses, and counters."""

import struct

import numpy as np
import pytest
from ptx import Memory, PtxError
from ptx.bench import HEADER, evaluate, kernel, run

RANDOM = np.random.default_rng(7)
# %x0 = parameter 0 + threads' index * the size
PLACE = """
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
mov.u32 %r0, %tid.x;
"""


def test_widths_and_vectors():
    x = RANDOM.integers(0, 256, 32 * 32, dtype=np.uint8)
    memory = Memory()
    source, target = memory.allocate("x", x), memory.output("y", 2 * x.size, np.uint8)
    body = f"""{PLACE}
mul.wide.u32 %x2, %r0, 32;
add.s64 %x3, %x0, %x2;
add.s64 %x4, %x1, %x2;
ld.global.u8 %r1, [%x3];
ld.global.s8 %h1, [%x3+1];
ld.global.v2.u8 {{%r2, %r3}}, [%x3+2];
ld.global.nc.L1::no_allocate.L2::128B.u32 %r4, [%x3+4];
ld.global.cs.v2.b32 {{%r5, %r6}}, [%x3+8];
ld.global.v2.b64 {{%x5, %x6}}, [%x3+16];
st.global.u8 [%x4], %r1;
st.global.u8 [%x4+1], %h1;
st.global.v2.u8 [%x4+2], {{%r2, %r3}};
st.global.cg.u32 [%x4+4], %r4;
st.global.v2.b32 [%x4+8], {{%r5, %r6}};
st.global.v2.b64 [%x4+16], {{%x5, %x6}};
ld.v4.u32 {{%r1, %r2, %r3, %r4}}, [%x3];
ld.global.v4.u16 {{%h1, %h2, %h3, %h4}}, [%x3+16];
ld.global.b64 %x5, [%x3+24];
st.v4.u32 [%x4+1024], {{%r1, %r2, %r3, %r4}};
st.global.v4.u16 [%x4+1040], {{%h1, %h2, %h3, %h4}};
st.global.b64 [%x4+1048], %x5;
"""
    run(kernel(body, 2), memory, source, target)
    assert (target.numpy().reshape(2, -1) == x).all()


def test_signs_are_extended_to_the_register():
    body = """
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
ld.global.s8 %r1, [%x0];
ld.global.u8 %r2, [%x0];
ld.global.s16 %r3, [%x0];
ld.global.s32 %x2, [%x0];
st.global.v2.u32 [%x1], {%r1, %r2};
st.global.u32 [%x1+8], %r3;
st.global.u64 [%x1+16], %x2;
st.global.u32 [%x1+12], 7;
"""
    memory = Memory()
    x, y = memory.allocate("x", np.array([-2], np.int32)), memory.output("y", 6, np.int32)
    run(kernel(body, 2), memory, x, y, block=1)
    assert y.numpy().tolist() == [-2, 254, -2, 7, -2, -1]


def test_shared_local_constant_and_parameters():
    module = """
.const .align 4 .u32 table[4] = {10, 20, 0x1E, 40};
.global .align 8 .u64 pointer[1] = {generic(table)};
.extern .shared .align 16 .b8 dynamic[];
"""
    body = """
.reg .b64 %SP;
.local .align 8 .b8 depot[16];
mov.u64 %SP, depot;
cvta.local.u64 %SP, %SP;
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
mov.u32 %r2, here;
add.u32 %r3, %r2, %r1;
st.shared.u32 [%r3], %r0;
st.shared.u32 [dynamic], 5;
st.u32 [%SP+4], %r0;
ld.local.u32 %r4, [depot+4];
cvta.shared.u64 %x2, %x3;
and.b32 %r5, %r0, 3;
mul.wide.u32 %x4, %r5, 4;
mov.u64 %x5, table;
add.u64 %x5, %x5, %x4;
ld.const.u32 %r6, [%x5];
ld.global.u64 %x6, [pointer];
ld.u32 %r7, [%x6+4];
bar.sync 0;
xor.b32 %r8, %r1, 124;
add.u32 %r8, %r8, %r2;
ld.shared.u32 %r9, [%r8];
cvt.u64.u32 %x7, %r8;
cvta.shared.u64 %x7, %x7;
ld.u32 %r10, [%x7];
ld.shared.u32 %r11, [dynamic];
ld.param.u64 %x0, [args+8];
mov.b64 %x9, args;
ld.param.v2.u16 {%h5, %h6}, [%x9];
mov.b32 %r12, {%h5, %h6};
mul.wide.u32 %x1, %r0, 32;
add.u64 %x0, %x0, %x1;
st.global.v4.u32 [%x0], {%r4, %r6, %r7, %r9};
st.global.v4.u32 [%x0+16], {%r10, %r11, %r12, %r0};
"""
    text = kernel(body, 0, ".shared .align 4 .b8 here[128];\n").replace("test()", "test(.param .align 8 .b8 args[16])")
    memory = Memory()
    y = memory.output("y", (32, 8), np.uint32)
    counters = run(text.replace(HEADER, HEADER + module), memory, struct.pack("<i4xQ", 77, y.address), shared_bytes=16)
    for thread, row in enumerate(y.numpy().tolist()):
        assert row == [thread, (10, 20, 30, 40)[thread % 4], 20, 31 - thread, 31 - thread, 5, 77, thread]
    assert counters.uses_local_memory


ATOMICS = {
    "add.u32": lambda old, x: (old + x) % 2**32,
    "min.s32": lambda old, x: min(old, x),
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
    "exch.b32": lambda old, x: x,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("name", ATOMICS)
def test_atomics(name, space):
    """Some lanes meet at a place, others are alone; the values that come back tell in which order."""
    places = np.array([0] * 12 + list(range(1, 21)), np.uint32)
    values = RANDOM.integers(0, 12, 32).astype(np.uint32)
    start = RANDOM.integers(0, 12, 32).astype(np.uint32)
    memory = Memory()
    data = memory.allocate("data", start, writable=True)
    inputs = [memory.allocate("places", places), memory.allocate("values", values)]
    old, end = memory.output("old", 32, np.uint32), memory.output("end", 32, np.uint32)
    address = "%x4" if space == "global" else "%r3"
    body = f"""
mov.u32 %r0, %tid.x;
mul.wide.u32 %x9, %r0, 4;
ld.param.u64 %x0, [p0]; ld.param.u64 %x1, [p1]; ld.param.u64 %x2, [p2]; ld.param.u64 %x3, [p3]; ld.param.u64 %x8, [p4];
add.u64 %x1, %x1, %x9; add.u64 %x2, %x2, %x9; add.u64 %x3, %x3, %x9; add.u64 %x8, %x8, %x9; add.u64 %x5, %x0, %x9;
ld.global.u32 %r1, [%x1];
ld.global.u32 %r2, [%x2];
mul.wide.u32 %x4, %r1, 4;
add.u64 %x4, %x0, %x4;
mov.u32 %r6, tile;
shl.b32 %r3, %r1, 2; add.u32 %r3, %r3, %r6;
shl.b32 %r4, %r0, 2; add.u32 %r4, %r4, %r6;
ld.global.u32 %r5, [%x5];
st.shared.u32 [%r4], %r5;
bar.sync 0;
atom.{space}.{name} %r7, [{address}], %r2;
st.global.u32 [%x3], %r7;
bar.sync 0;
ld.shared.u32 %r8, [%r4];
{"ld.global.u32 %r8, [%x5];" if space == "global" else ""}
st.global.u32 [%x8], %r8;
"""
    run(kernel(body, 5, ".shared .align 4 .b8 tile[128];\n"), memory, data, *inputs, old, end)
    memory_now = start.tolist()
    for place, value, seen in zip(places.tolist(), values.tolist(), old.numpy().tolist(), strict=True):
        assert seen == memory_now[place]
        memory_now[place] = ATOMICS[name](seen, value)
    assert end.numpy().tolist() == memory_now


def test_compare_and_swap_and_wide_and_float_atomics():
    body = """
mov.u32 %r0, %tid.x;
ld.param.u64 %x0, [p0];
atom.global.cas.b32 %r1, [%x0], 0, %r0;
cvt.u64.u32 %x1, %r0;
red.global.gpu.relaxed.add.u64 [%x0+8], %x1;
mov.b32 %r2, 0f3F000000;
red.global.add.f32 [%x0+16], %r2;
"""
    memory = Memory()
    data = memory.allocate("data", np.zeros(5, np.uint32), writable=True)
    run(kernel(body, 1), memory, data)
    # Thread 0 swaps 0 for 0, so thread 1 swaps it for 1, and then nobody does.
    assert data.numpy()[:4].tolist() == [1, 0, 496, 0]
    assert data.numpy()[4:].view(np.float32)[0] == 16


def test_blocks_in_any_order():
    """Each block takes a number: the orders are those that were asked for, and differ."""
    body = """
mov.u32 %r0, %ctaid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
atom.global.add.u32 %r1, [%x0], 1;
mul.wide.u32 %x2, %r0, 4;
add.u64 %x1, %x1, %x2;
st.global.u32 [%x1], %r1;
"""
    found = {}
    for order in ("ascending", "descending", 1, 2):
        for at_once in (1, 3, None):
            memory = Memory()
            counter = memory.allocate("counter", np.zeros(1, np.uint32), writable=True)
            y = memory.output("y", 16, np.uint32)
            run(kernel(body, 2), memory, counter, y, grid=16, block=1, order=order, blocks_at_once=at_once)
            found.setdefault(order, []).append(y.numpy().tolist())
    assert found["ascending"] == [list(range(16))] * 3
    assert found["descending"] == [list(range(15, -1, -1))] * 3
    assert found[1][0] == found[1][1] == found[1][2] != found[2][0]
    assert sorted(found[1][0]) == list(range(16))


def access(instruction: str, x: np.ndarray, threads: int = 32, misaligned: int = 0, declarations: str = "", **options):
    """The instruction with %x0 at the thread's four bytes of x, and %x1 those of an output."""
    memory = Memory()
    source, y = memory.allocate("x", x, misaligned=misaligned), memory.output("y", 32, np.uint32)
    body = f"""
mov.u32 %r0, %tid.x;
ld.param.u64 %x0, [p0];
ld.param.u64 %x1, [p1];
mul.wide.u32 %x2, %r0, 4;
add.u64 %x0, %x0, %x2;
add.u64 %x1, %x1, %x2;
{instruction}
"""
    return run(kernel(body, 2, declarations), memory, source, y, block=threads, **options)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (
            "ld.global.u32 %r1, [%x0+4];",
            r"test: load of 4 bytes: out of bounds at global address 0x7020\w+, byte 128 of buffer 'x', which has 128 "
            r"bytes; line \d+: ld.global.u32 %r1, \[%x0\+4\]; thread \(31, 0, 0\) of block \(0, 0, 0\)",
        ),
        ("ld.global.u32 %r1, [%x0+-8];", r"out of bounds .* byte -8 of buffer 'x'.*thread \(0, 0, 0\)"),
        ("st.global.u32 [%x1+100000000], %r0;", "out of bounds"),
        ("ld.global.u32 %r1, [%x0-8];", r"out of bounds .* byte -8 of buffer 'x'.*thread \(0, 0, 0\)"),
        ("ld.global.u32 %r1, [16];", "out of bounds"),
        ("st.global.v2.u32 [%x1+120], {%r0, %r0};", r"misaligned for 8 bytes.*byte 124 of buffer 'y'.*thread \(1, "),
        ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%x0];", r"misaligned for 16 bytes.*thread \(1, 0, 0\)"),
        ("st.global.u32 [%x0], %r0;", "store to a read-only buffer"),
        ("ld.global.u32 %r1, [%x1];", r"uninitialised read \(4 of 4 bytes.*byte 0 of buffer 'y'"),
        ("st.global.u16 [%x1], %r0; ld.global.u32 %r1, [%x1];", r"uninitialised read \(2 of 4 bytes"),
        ("atom.global.add.u32 %r1, [%x1], 1;", "uninitialised read"),
        ("ld.shared.u32 %r1, [tile];", r"uninitialised read .* shared address 0x0, of 64 bytes"),
        ("ld.shared.u32 %r1, [tile+64];", "out of bounds at shared address"),
        ("st.shared.u32 [tile+-4], %r1;", "out of bounds at shared address"),
        ("ld.local.u32 %r1, [depot];", "uninitialised read .* local address"),
        ("st.local.u32 [depot+8], %r1;", "out of bounds at local address"),
        ("st.global.u32 [%x1+0], %r0; ld.param.u64 %x1, [p1]; st.global.u32 [%x1], %r0;", "two lanes store different"),
    ],
)  # fmt: skip
def test_accesses_that_may_not_be(instruction, message):
    with pytest.raises(PtxError, match=message):
        access(
            instruction,
            np.zeros(32, np.uint32),
            declarations=".shared .align 4 .b8 tile[64];\n.local .align 4 .b8 depot[8];\n",
        )


def test_misaligned_buffers():
    with pytest.raises(PtxError, match="misaligned for 4 bytes"):
        access("ld.global.u32 %r1, [%x0];", np.zeros(32, np.uint32), misaligned=2)
    access("ld.global.u16 %r1, [%x0];", np.zeros(32, np.uint32), misaligned=2)


def test_what_no_kernel_wrote():
    memory = Memory()
    y = memory.output("y", 4, np.float16)
    with pytest.raises(PtxError, match="8 bytes of 'y' that were not"):
        y.numpy()
    assert np.isnan(y.bytes().view(np.float16)).all()


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "used"),
    [
        (4, 4, 4, 128),
        (32, 4, 32, 128),
        (16, 16, 16, 512),
        (8, 4, 8, 128),
        (0, 4, 1, 4),
        (2, 1, 2, 32),
        (64, 8, 32, 256),
    ],
)
def test_sectors(stride, width, sectors, used):
    x = np.zeros(4096, np.uint8)
    load = {1: "u8 %r1", 4: "u32 %r1", 8: "u64 %x3", 16: "v2.u64 {%x3, %x4}"}[width]
    body = f"""
mov.u32 %r0, %tid.x;
ld.param.u64 %x0, [p0];
mul.wide.u32 %x2, %r0, {stride};
add.u64 %x0, %x0, %x2;
ld.global.{load}, [%x0];
ld.global.{load}, [%x0];
"""
    memory = Memory()
    counters = run(kernel(body, 1), memory, memory.allocate("x", x), block=64)
    first, second = counters.global_loads.values()
    assert first == second
    # 64 threads are two requests, which meet only if the stride is 0.
    assert (first.requests, first.sectors, first.used_bytes) == (2, 2 * sectors, 2 * used)
    traffic = counters.buffers["x"]
    distinct, often = (sectors, 4) if stride == 0 else (2 * sectors, 2)
    assert (traffic.requested_sectors, traffic.distinct_sectors, traffic.most_requests) == (
        4 * sectors,
        distinct,
        often,
    )
    assert traffic.used_bytes == (used if stride == 0 else 2 * used)
    assert traffic.fetched_bytes == 32 * 4 * sectors


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts", "ideal"),
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (132, 4, 1, 1),
        (0, 4, 1, 1),
        (1, 1, 1, 1),
        (8, 8, 2, 2),
        (16, 8, 4, 2),
        (16, 16, 4, 4),
        (32, 16, 8, 4),
        (144, 16, 4, 4),
        (128, 16, 32, 4),
    ],
)
def test_bank_conflicts(stride, width, wavefronts, ideal):
    """32 lanes with a stride in bytes: 4-byte words at once, 8-byte ones by half warps, 16-byte ones by quarters."""
    registers = {1: "u8 {}%r1{}", 4: "u32 {}%r1{}", 8: "u64 {}%x3{}", 16: "v2.u64 {}{{%x3, %x3}}{}"}[width]
    kind, rest = registers.split(" ", 1)
    body = f"""
mov.u32 %r0, %tid.x;
mul.lo.u32 %r2, %r0, {stride};
mov.u32 %r1, 1;
mov.u64 %x3, 1;
st.shared.{kind} [%r2], {rest.format("", "")};
"""
    counters = run(kernel(body, 0, ".shared .align 16 .b8 tile[8192];\n"), Memory())
    (accesses,) = counters.shared.values()
    assert (accesses.requests, accesses.wavefronts, accesses.ideal) == (1, wavefronts, ideal)
    assert counters.bank_conflicts() == wavefronts - ideal


def test_predicated_accesses_touch_nothing():
    x = np.zeros(8, np.uint32)
    counters = access("setp.lt.u32 %p1, %r0, 8;\n@%p1 ld.global.u32 %r1, [%x0];\n@!%p1 mov.u32 %r1, 3;", x)
    (accesses,) = counters.global_loads.values()
    assert (accesses.sectors, accesses.used_bytes) == (1, 32)
    assert counters.lanes[-3:].tolist() == [8, 24, 32]


def test_packing_of_vectors_in_registers():
    a = RANDOM.integers(0, 2**32, 64, dtype=np.uint32)
    text = """
mov.b32 {%h1, %h2}, %a;
mov.b32 %d_, {%h2, %h1};
mov.b64 %x5, {%a, %d_};
mov.b64 {%r5, %e_}, %x5;
"""
    found = evaluate(text, {"a": a}, {"d_": "uint32", "e_": "uint32"})
    assert (found["d_"] == (a >> 16 | a << 16)).all()
    assert (found["e_"] == found["d_"]).all()
