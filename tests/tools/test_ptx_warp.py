"""Instructions of whole warps. Fragments are taken apart here element by element, after the formulas of the PTX ISA."""

import numpy as np
import pytest
from ptx import Memory, PtxError
from ptx.bench import evaluate, kernel, run

RANDOM = np.random.default_rng(6)


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The pseudocode of the PTX ISA: the lane that is read, and the predicate."""
    b &= 31
    clamp, mask = c & 31, c >> 8 & 31
    last = (lane & mask) | (clamp & ~mask & 31)
    first = lane & mask
    if mode == "up":
        source, inside = lane - b, lane - b >= last
    elif mode == "down":
        source, inside = lane + b, lane + b <= last
    elif mode == "bfly":
        source, inside = lane ^ b, lane ^ b <= last
        inside = (lane ^ b) <= last
    else:
        source = first | (b & ~mask & 31)
        inside = source <= last
    return (source if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode):
    values = RANDOM.integers(0, 2**32, 64, dtype=np.uint32)
    segments = [0, 0x1800, 0x1000, 0x1C00]
    for segment in segments:
        clamp = segment if mode == "up" else segment | 31
        for b in (0, 1, 3, 7, 16, 31):
            text = f"shfl.sync.{mode}.b32 %d_|%p1, %a, {b}, {clamp}, -1;\nselp.u32 %e_, 1, 0, %p1;"
            found = evaluate(text, {"a": values}, {"d_": "uint32", "e_": "uint32"}, block=64)
            for thread in range(64):
                source, inside = shuffled(mode, thread % 32, b, clamp)
                assert found["d_"][thread] == values[thread // 32 * 32 + source]
                assert found["e_"][thread] == inside


def test_a_shuffle_from_lanes_of_their_own_choice():
    values = RANDOM.integers(0, 2**32, 32, dtype=np.uint32)
    order = RANDOM.permutation(32).astype(np.uint32)
    found = evaluate("shfl.sync.idx.b32 %d_, %a, %b, 31, 0xffffffff;", {"a": values, "b": order}, {"d_": "uint32"})
    assert found["d_"].tolist() == values[order].tolist()


def test_reductions_and_votes():
    a = RANDOM.integers(-1000, 1000, 96).astype(np.int32)
    names = {"add": sum, "min": min, "max": max}
    text = "\n".join(f"redux.sync.{n}.s32 %{n}_, %a, -1;" for n in names)
    text += """
redux.sync.max.u32 %umax_, %a, -1;
redux.sync.xor.b32 %xor_, %a, 0xffffffff;
setp.gt.s32 %p1, %a, 0;
setp.gt.s32 %p2, %a, -5000;
vote.sync.ballot.b32 %ballot_, %p1, -1;
vote.sync.any.pred %p3, !%p2, -1; selp.u32 %any_, 1, 0, %p3;
vote.sync.all.pred %p4, %p2, -1; selp.u32 %all_, 1, 0, %p4;
activemask.b32 %active_;
"""
    outputs = {f"{n}_": "int32" for n in names}
    outputs |= {f"{n}_": "uint32" for n in ("umax", "xor", "ballot", "any", "all", "active")}
    found = evaluate(text, {"a": a}, outputs, block=96)
    for warp in range(3):
        lanes = slice(32 * warp, 32 * warp + 32)
        mine = a[lanes].tolist()
        for name, function in names.items():
            assert set(found[f"{name}_"][lanes].tolist()) == {function(mine)}
        assert set(found["umax_"][lanes].tolist()) == {max(v % 2**32 for v in mine)}
        assert set(found["xor_"][lanes].tolist()) == {int(np.bitwise_xor.reduce(a[lanes].view("u4")))}
        assert set(found["ballot_"][lanes].tolist()) == {sum((v > 0) << i for i, v in enumerate(mine))}
        assert set(found["any_"][lanes].tolist()) == {0}
        assert set(found["all_"][lanes].tolist()) == {1}
        assert set(found["active_"][lanes].tolist()) == {2**32 - 1}


def test_a_part_of_a_warp():
    """Lanes 0-7 and the others come to different instructions, each naming just themselves."""
    a = np.arange(32, dtype=np.uint32)
    text = """
mov.u32 %r5, %laneid;
setp.lt.u32 %p1, %r5, 8;
@%p1 bra LOW;
redux.sync.add.u32 %d_, %a, 0xffffff00;
activemask.b32 %e_;
bra END;
LOW:
redux.sync.add.u32 %d_, %a, 0xff;
activemask.b32 %e_;
END:
shfl.sync.down.b32 %f_, %a, 1, 31, -1;
"""
    found = evaluate(text, {"a": a}, {"d_": "uint32", "e_": "uint32", "f_": "uint32"})
    assert found["d_"].tolist() == [28] * 8 + [496 - 28] * 24
    assert found["e_"].tolist() == [0xFF] * 8 + [0xFFFFFF00] * 24
    assert found["f_"].tolist() == [*range(1, 32), 31]


def test_a_shuffle_after_a_loop_of_another_length_in_every_lane():
    text = """
mov.u32 %r5, %a;
LOOP:
setp.eq.u32 %p1, %r5, 0;
@%p1 bra DONE;
sub.u32 %r5, %r5, 1;
bra LOOP;
DONE:
shfl.sync.bfly.b32 %d_, %a, 1, 31, -1;
"""
    a = RANDOM.integers(0, 9, 32).astype(np.uint32)
    assert evaluate(text, {"a": a}, {"d_": "uint32"})["d_"].tolist() == a[np.arange(32) ^ 1].tolist()


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("shfl.sync.down.b32 %r1, %r0, 1, 31, -1;", "exited"),
        ("bar.warp.sync -1;", "exited"),
        ("shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xffff;", "does not execute"),
        ("redux.sync.add.u32 %r1, %r0, 0xff;", "must be in the mask"),
    ],
)
def test_masks_that_are_wrong(instruction, message):
    body = f"mov.u32 %r0, %laneid;\nsetp.ge.u32 %p0, %r0, 16;\n@%p0 ret;\n{instruction}"
    with pytest.raises(PtxError, match=message):
        run(kernel(body), Memory())


def test_lanes_that_never_come():
    body = """
mov.u32 %r0, %laneid;
setp.ge.u32 %p0, %r0, 16;
@%p0 bra OTHER;
bar.warp.sync -1;
ret;
OTHER:
bar.warp.sync 0xffffffff;
"""
    with pytest.raises(PtxError, match="waits there"):
        run(kernel(body), Memory())


# Matrix products: shape -> (rows of A, K) and formulas of the PTX ISA for registers of `e` elements.


def a_element(shape: str, e: int, lane: int, index: int) -> tuple[int, int]:
    group, member = lane >> 2, lane % 4
    if shape.startswith("m8"):
        return group, member * e + index % e
    register = index // e
    return group + 8 * (register % 2), member * e + index % e + (register // 2) * 4 * e


def b_element(e: int, lane: int, index: int) -> tuple[int, int]:
    return (lane % 4) * e + index % e + (index // e) * 4 * e, lane >> 2


def c_element(lane: int, index: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (index // 2), (lane % 4) * 2 + index % 2


def packed(elements: np.ndarray, bits: int) -> np.ndarray:
    """[lanes, n] integers -> uint32 [lanes, n * bits / 32], the first element lowest."""
    per = 32 // bits
    raw = (elements.astype(np.int64) & (2**bits - 1)).reshape(elements.shape[0], -1, per)
    return (raw << (bits * np.arange(per))).sum(2).astype(np.uint32)


def multiply(instruction: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: str) -> list[np.ndarray]:
    """Registers [lanes, n] of two warps -> those of the result."""
    inputs, names = {}, []
    for letter, registers in (("a", a), ("b", b), ("c", c)):
        names.append([f"%{letter}{i}" for i in range(registers.shape[1])])
        inputs |= {f"{letter}{i}": np.ascontiguousarray(registers[:, i]) for i in range(registers.shape[1])}
    results = [f"%d{i}_" for i in range(c.shape[1])]
    text = f"{instruction} {', '.join('{' + ', '.join(group) + '}' for group in [results, *names])};"
    found = evaluate(text, inputs, {name[1:]: dtype for name in results}, block=64)
    return [found[name[1:]] for name in results]


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ("m16n8k32", ("s8", "s8")),
        ("m16n8k32", ("u8", "s8")),
        ("m16n8k16", ("s8", "s8")),
        ("m16n8k16", ("s8", "u8")),
        ("m8n8k16", ("s8", "s8")),
        ("m8n8k16", ("u8", "u8")),
    ],
)
def test_integer_products(shape, kinds):
    bits = int(kinds[0][1])
    rows, depth = int(shape[1 : shape.index("n")]), int(shape.split("k")[1])
    e = 32 // bits

    def draw(kind, size):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if kind[0] == "s" else (0, 2**bits)
        values = RANDOM.integers(low, high, size)
        return np.where(RANDOM.random(size) < 0.3, low, values) if kind[0] == "s" else values

    a, b = draw(kinds[0], (2, rows, depth)), draw(kinds[1], (2, depth, 8))
    c = RANDOM.integers(-(2**31), 2**31, (2, rows, 8))
    lanes = [(warp, lane) for warp in range(2) for lane in range(32)]
    a_lanes = np.array([[a[w][a_element(shape, e, lane, i)] for i in range(rows * depth // 32)] for w, lane in lanes])
    b_lanes = np.array([[b[w][b_element(e, lane, i)] for i in range(depth * 8 // 32)] for w, lane in lanes])
    c_lanes = np.array([[c[w][c_element(lane, i)] for i in range(rows // 4)] for w, lane in lanes])
    found = multiply(
        f"mma.sync.aligned.{shape}.row.col.s32.{kinds[0]}.{kinds[1]}.s32",
        packed(a_lanes, bits),
        packed(b_lanes, bits),
        c_lanes.astype(np.int32).view(np.uint32),
        "int32",
    )
    wanted = (a @ b + c).astype(np.uint64).astype(np.uint32).view(np.int32)
    for thread, (warp, lane) in enumerate(lanes):
        for i in range(rows // 4):
            assert found[i][thread] == wanted[warp][c_element(lane, i)]


@pytest.mark.parametrize("result", ["f32", "f16"])
@pytest.mark.parametrize(
    ("shape", "kind"), [("m16n8k16", "f16"), ("m16n8k8", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "bf16")]
)
def test_float_products(shape, kind, result):
    if kind == "bf16" and result == "f16":
        with pytest.raises(PtxError, match="mma"):
            evaluate(
                f"mma.sync.aligned.{shape}.row.col.f16.bf16.bf16.f16 {{%d_}}, {{%a}}, {{%a}}, {{%a}};",
                {"a": np.zeros(32, "u4")},
                {"d_": "uint32"},
            )
        return
    depth = int(shape.split("k")[1])
    # Multiples of 1/8 of a few bits: every product and sum is exact in the formats.
    a, b = RANDOM.integers(-8, 8, (2, 16, depth)) / 8, RANDOM.integers(-8, 8, (2, depth, 8)) / 4
    c = RANDOM.integers(-8, 8, (2, 16, 8)) / 4.0

    def bits_of(values):
        if kind == "f16":
            return values.astype("f2").view("u2")
        return (values.astype("f4").view("u4") >> 16).astype("u2")

    lanes = [(warp, lane) for warp in range(2) for lane in range(32)]
    a_lanes = np.array([[a[w][a_element(shape, 2, lane, i)] for i in range(depth // 2)] for w, lane in lanes])
    b_lanes = np.array([[b[w][b_element(2, lane, i)] for i in range(depth // 4)] for w, lane in lanes])
    c_lanes = np.array([[c[w][c_element(lane, i)] for i in range(4)] for w, lane in lanes])
    c_registers = c_lanes.astype("f4").view("u4") if result == "f32" else packed(c_lanes.astype("f2").view("u2"), 16)
    found = multiply(
        f"mma.sync.aligned.{shape}.row.col.{result}.{kind}.{kind}.{result}",
        packed(bits_of(a_lanes), 16),
        packed(bits_of(b_lanes), 16),
        c_registers,
        "uint32",
    )
    if result == "f32":
        values = np.stack(found, 1).view("f4")
    else:
        values = np.ascontiguousarray(np.stack(found, 1)).view("f2")
    wanted = a @ b + c
    for thread, (warp, lane) in enumerate(lanes):
        for i in range(4):
            assert values[thread, i] == wanted[warp][c_element(lane, i)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """Each matrix has its eight rows, of 16 bytes, somewhere: lanes 8 i + r give the place of row r of matrix i."""
    values = np.arange(512, dtype=np.uint16)
    places = RANDOM.permutation(64)[:32]
    memory = Memory()
    x, where = memory.allocate("x", values), memory.allocate("places", (places * 16).astype(np.uint32))
    out = memory.output("out", (32, count), np.uint32)
    registers = [f"%r{10 + i}" for i in range(count)]
    lines = "\n".join(f"st.global.u32 [%x0+{4 * i}], {register};" for i, register in enumerate(registers))
    body = f"""
mov.u32 %r0, %laneid;
ld.param.u64 %x0, [p0];
mul.wide.u32 %x1, %r0, 32;
add.s64 %x0, %x0, %x1;
ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%x0];
ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%x0+16];
mov.u32 %r20, tile;
shl.b32 %r21, %r0, 5;
add.u32 %r21, %r20, %r21;
st.shared.v4.u32 [%r21], {{%r1, %r2, %r3, %r4}};
st.shared.v4.u32 [%r21+16], {{%r5, %r6, %r7, %r8}};
bar.warp.sync -1;
ld.param.u64 %x0, [p1];
mul.wide.u32 %x1, %r0, 4;
add.s64 %x0, %x0, %x1;
ld.global.u32 %r22, [%x0];
add.u32 %r22, %r22, %r20;
ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(registers)}}}, [%r22];
ld.param.u64 %x0, [p2];
mul.wide.u32 %x1, %r0, {4 * count};
add.s64 %x0, %x0, %x1;
{lines}
"""
    run(kernel(body, 3, ".shared .align 16 .b8 tile[1024];\n"), memory, x, where, out)
    rows = values.reshape(64, 8)[places]
    for lane in range(32):
        for matrix in range(count):
            eight = rows[8 * matrix : 8 * matrix + 8]
            eight = eight.T if trans else eight
            low, high = eight[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
            assert out.numpy()[lane, matrix] == high << 16 | low


def test_half_a_warp_cannot_multiply():
    body = """
mov.u32 %r0, %laneid;
setp.ge.u32 %p0, %r0, 16;
@%p0 bra END;
mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r1, %r2}, {%r3}, {%r4}, {%r1, %r2};
END:
"""
    with pytest.raises(PtxError, match=r"all lanes of a warp must execute mma.sync; line \d+: mma"):
        run(kernel(body), Memory())
