"""The report of the CUDA kernels' machine code: its parser, its follower of instructions, occupancy and roofline.

The listings are written by hand, so that every count is known beforehand; the last tests follow the kernels as nvcc
compiles them.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from rcp_kernels.bench import roofline, sass, sass_launches, sass_walk
from rcp_kernels.bench.sass_launches import Problem

ROOT = Path(__file__).resolve().parents[1]


def listing(*lines: str, name: str = "_Z4looplii", arch: int = 80) -> sass.Kernel:
    """A kernel of these instructions, 16 bytes each, with the padding and the encodings that cuobjdump prints."""
    code = [*lines, f"BRA {16 * len(lines):#x}", "NOP", "NOP"]
    body = "".join(
        f"        /*{16 * i:04x}*/                   {line} ;        /* 0x00000a00ff017624 */\n"
        f"                                                      /* 0x000fe400078e00ff */\n"
        for i, line in enumerate(code)
    )
    (kernel,) = sass.parse_listing(f'\n\tcode for sm_{arch}\n\t\tFunction : {name}\n\t.headerflags\t@""\n{body}')
    return kernel


# weight: 64 bits at 0x160; threads at 0x168; trips at 0x16c.
LOOP = (
    "IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28]",
    "S2R R0, SR_TID.X",
    "ISETP.GE.AND P0, PT, R0, c[0x0][0x168], PT",
    "@P0 EXIT",
    "IMAD.MOV.U32 R2, RZ, RZ, RZ",
    "IMAD.MOV.U32 R3, RZ, RZ, 0x10",
    "IMAD.WIDE R4, R0, R3.reuse, c[0x0][0x160]",
    "LDG.E.128.CONSTANT R8, [R4.64]",  # 0x70, the loop
    "IADD3 R2, R2, 0x1, RZ",
    "IADD3 R4, P1, R4, 0x200, RZ",
    "ISETP.GE.AND P0, PT, R2, c[0x0][0x16c], PT",
    "IADD3.X R5, RZ, R5, RZ, P1, !PT",
    "IMMA.16832.S8.S8 R12, R8.ROW, R8.COL, RZ",
    "@!P0 BRA 0x70",
    "STG.E [R4.64+-0x10], R12",
    "EXIT",
)
BUFFER = sass_walk.Buffer("weight", 0xFFFFFF00, 1 << 20)  # the addresses cross 2^32: the carry matters


def launch(threads: int, trips: int, block: int = 64, grid: tuple[int, int, int] = (1, 1, 1)) -> sass_walk.Launch:
    parameters = struct.pack("<Qii", BUFFER.address, threads, trips)
    return sass_walk.Launch("_Z4looplii", grid, (block, 1, 1), 0, parameters)


def test_listing_is_read() -> None:
    kernel = listing(*LOOP)
    assert (kernel.arch, kernel.name, len(kernel.instructions)) == (80, "_Z4looplii", len(LOOP))
    assert [str(instruction) for instruction in kernel.instructions] == list(LOOP)
    load = kernel.instructions[7]
    assert (load.address, load.name, load.modifiers) == (0x70, "LDG", ["E", "128", "CONSTANT"])
    assert sass.access_bytes(load) == 16
    assert kernel.spills == 0
    assert sass.branch_target(kernel.instructions[13]) == 0x70
    assert kernel.instructions[13].guard == "!P0"
    assert kernel.instructions[13].opcode == "BRA"
    counts = sass.count_classes(kernel.instructions)
    assert counts == {"IMAD": 4, "IADD3": 3, "other": 6, "LDG": 1, "IMMA": 1, "STG": 1}


def test_listing_without_a_kernel_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"parse_listing: instructions must follow .*, got line 1: .*NOP.*pass the whole"
    ):
        sass.parse_listing("        /*0000*/                   NOP ;   /* 0x0 */\n")


def test_spills_are_counted() -> None:
    assert listing("STL [R1], R2", "STL.64 [R1+0x8], R4", "LDL R2, [R1]", "EXIT").spills == 3


@pytest.mark.parametrize(
    ("opcode", "size"), [("LDG.E.128", 16), ("LDG.E.64", 8), ("LDS", 4), ("LDG.E.U16", 2), ("LDS.U8", 1)]
)
def test_access_bytes(opcode: str, size: int) -> None:
    assert sass.access_bytes(sass.parse_instruction(0, f"{opcode} R0, [R2]")) == size


def test_resources_are_read() -> None:
    text = (
        "Fatbin elf code:\n================\narch = sm_86\n\nResource usage:\n Common:\n  GLOBAL:0\n"
        " Function _Z1fv:\n  REG:186 STACK:8 SHARED:64 LOCAL:0 CONSTANT[0]:488 TEXTURE:0\n"
    )
    values = sass.parse_resources(text)[86, "_Z1fv"]
    assert (values["REG"], values["STACK"], values["SHARED"], values["LOCAL"]) == (186, 8, 64, 0)


def test_short_names() -> None:
    long = "_ZN3rcp4cuda20lut_linear_one_tokenILi2ELi128ELin1ELi4EEEvNS0_11GemvProblemE"
    assert sass.short_name(long) == "lut_linear_one_token<2,128,-1,4>"
    assert sass.short_name("_Z4looplii") == "_Z4looplii"


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_is_followed(trips: int) -> None:
    walk = sass_walk.walk_block(listing(*LOOP), launch(64, trips), (0, 0, 0), [BUFFER])
    # Two warps, 7 instructions before the loop, 7 in it, 2 behind it.
    np.testing.assert_array_equal(walk.issued, 2 * np.array([1] * 7 + [trips] * 7 + [1] * 2))
    assert walk.after == 2 * 3
    assert not walk.assumed
    traffic = walk.loads["weight"]
    # A warp's request is 32 lanes of 16 bytes, 16 sectors; the trips of the warps overlap by half a block.
    assert traffic.requests == {16: 2 * trips}
    assert traffic.sectors == 2 * trips * 16
    assert len(traffic.distinct) == (trips + 1) * 16


def test_lanes_that_part_are_counted_once_each() -> None:
    # 40 threads of 64: the second warp goes on with 8 lanes; with 32 threads it ends at EXIT, its 4th instruction.
    kernel = listing(*LOOP)
    assert sass_walk.walk_block(kernel, launch(40, 3), (0, 0, 0), [BUFFER]).total == 2 * (7 + 21 + 2)
    assert sass_walk.walk_block(kernel, launch(32, 3), (0, 0, 0), [BUFFER]).total == 30 + 4


def test_both_sides_of_a_branch_inside_a_warp() -> None:
    kernel = listing(
        "S2R R0, SR_LANEID",
        "LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT",
        "BSSY B0, 0x60",
        "@P0 BRA 0x50",
        "BRA 0x60",
        "MOV R1, R0",  # odd lanes
        "BSYNC B0",
        "EXIT",
    )
    walk = sass_walk.walk_block(kernel, launch(32, 1, block=32), (0, 0, 0), [])
    assert walk.issued.tolist() == [1, 1, 1, 1, 1, 1, 1, 1]


SPLIT = (
    "S2R R0, SR_TID.X",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R3, [R4.64], R5",
    "@!P0 ISETP.NE.AND P1, PT, R3, 0x3, PT",
    "@!P0 SEL R3, RZ, 0x1, P1",
    "@!P0 STS.U8 [0x10], R3",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDS.U8 R2, [0x10]",
    "ISETP.NE.AND P0, PT, R2, RZ, PT",
    "@!P0 EXIT",
    "FADD R1, R1, R1",  # of the last block only
    "EXIT",
)


def test_the_last_of_the_blocks_that_share_a_counter() -> None:
    kernel = listing(*SPLIT)
    walk = sass_walk.walk_launch(kernel, launch(64, 1, grid=(5, 4, 1)), [])
    assert not walk.assumed
    # 5 cells of 4 blocks of 2 warps; the last block of a cell goes on.
    assert walk.issued.tolist() == [40] * 11 + [10, 10]


def test_unknown_branches_are_reported_and_not_taken() -> None:
    kernel = listing("LDG.E R2, [R4.64]", "ISETP.NE.AND P0, PT, R2, RZ, PT", "@P0 BRA 0x40", "NOP", "EXIT")
    walk = sass_walk.walk_block(kernel, launch(32, 1, block=32), (0, 0, 0), [])
    assert walk.assumed == {0x20}
    assert walk.issued.tolist() == [1] * 5


def test_jumps_that_cannot_be_followed_are_named() -> None:
    with pytest.raises(ValueError, match="a jump must name its target, got BRX R2"):
        sass_walk.walk_block(listing("BRX R2 -0x10", "EXIT"), launch(32, 1, block=32), (0, 0, 0), [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IADD3 R9, R1, -R2, 0x5", lambda a, b: a - b + 5),
        ("IMAD R9, R1, R2, R1", lambda a, b: a * b + a),
        ("IMAD.HI.U32 R9, R1, R2, RZ", lambda a, b: a * b >> 32),
        ("LOP3.LUT R9, R1, R2, 0xff, 0xe8, !PT", lambda a, b: (a & b) | (a & 0xFF) | (b & 0xFF)),
        ("SHF.R.U32.HI R9, RZ, 0x5, R1", lambda a, b: a >> 5),
        ("SHF.R.S32.HI R9, RZ, 0x1f, R2", lambda a, b: 0xFFFFFFFF if b >> 31 else 0),
        ("SHF.L.U32 R9, R1, 0x3, RZ", lambda a, b: a << 3),
        ("SHF.L.U64.HI R9, R1, 0x9, R2", lambda a, b: (b << 32 | a) << 9 >> 32),
        ("LEA R9, R1, R2, 0x4", lambda a, b: (a << 4) + b),
        ("LEA.HI R9, R1, R2, RZ, 0x5", lambda a, b: (a >> 27) + b),
        ("LEA.HI.SX32 R9, R2, R1, 0x1b", lambda a, b: ((b - (b >> 31 << 32)) >> 5) + a),
        ("PRMT R9, R1, 0x5140, R2", lambda a, b: a & 255 | (b & 255) << 8 | (a & 0xFF00) << 8 | (b & 0xFF00) << 16),
        ("IMNMX.U32 R9, R1, R2, PT", min),
        ("VIADDMNMX.U32 R9, R1, 0x10, R2, PT", lambda a, b: min(a + 16, b)),
        ("SEL R9, R1, R2, !PT", lambda a, b: b),
        ("POPC R9, R1", lambda a, b: a.bit_count()),
        ("FLO.U32 R9, R1", lambda a, b: a.bit_length() - 1),
    ],
)
def test_integer_instructions(text: str, expected: object) -> None:
    a, b = 0x80F1D35, 0xC0000123
    kernel = listing(f"MOV R1, {a:#x}", f"MOV R2, {b:#x}", text, "EXIT")
    block = sass_walk.Block(kernel, launch(32, 1, block=32), (0, 0, 0), 0)
    warp = sass_walk.Warp(block, 0, sass_walk.Walk(kernel, np.zeros(4)), [])
    list(warp.run())
    result = warp.registers["R9"]
    assert result.known.all()
    assert set(result.bits.tolist()) == {expected(a, b) & 0xFFFFFFFF}


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "warps", "limited_by"),
    [
        (80, 256, 32, 0, 8, 64, "warps"),
        # 186 * 32 = 5952 -> 6144 a warp; 10 fit, 8 in fours.
        (86, 256, 186, 12352, 1, 8, "registers"),
        # 40 KB and the reserved one: two of 100 KB.
        (86, 128, 40, 40 << 10, 2, 8, "shared memory"),
        (75, 1024, 64, 0, 1, 32, "warps"),
        (90, 32, 16, 0, 32, 32, "blocks"),
    ],
)
def test_occupancy(
    arch: int, threads: int, registers: int, shared: int, blocks: int, warps: int, limited_by: str
) -> None:
    found = sass.occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.warps, found.limited_by) == (blocks, warps, limited_by)
    assert found.fraction == warps / sass.LIMITS[arch].warps


def test_roofline_of_round_numbers() -> None:
    # 2 multiprocessors at 1 GHz: 8000 warp instructions a microsecond; 100 GB/s; 8 int8 TOPS.
    card = roofline.Card("round", 80, 2, 1.0, 100, 8.0, 4.0, 1)
    work = roofline.Work(2e5, 8000, alu_instructions=2000, tensor_operations=4e6, blocks=3)
    found = roofline.estimate(work, card)
    # 3 blocks on 2 multiprocessors: one has two thirds of the work instead of half.
    assert (found.dram, found.issue, found.alu, found.tensor) == (2.0, 1.0, 0.5, 0.5)
    assert math.isclose(found.busiest, 4 / 3)
    assert (found.time, found.bound_by, found.issue_margin) == (2.0, "DRAM", 2.0)
    slow = roofline.estimate(roofline.Work(1e5, 80000, tensor_operations=4e6, tensor_is_int8=False), card)
    assert (slow.time, slow.bound_by, slow.tensor) == (10.0, "issue", 1.0)


def test_roofline_of_the_published_decode() -> None:
    # The bounds the LAQuant paper's figures are compared with (shared/methods.md): 3.57x at 3.25 bits, 2.97x at 4.25.
    assert round(roofline.decode_traffic("Qwen3-4B", 3.25).ratio, 2) == 3.57
    assert round(roofline.decode_traffic("Qwen3-4B", 4.25).ratio, 2) == 2.97
    with pytest.raises(KeyError, match=r"the card must be one of A100-40, .*, got 'GT 1030'"):
        roofline.card("GT 1030")


def report():
    spec = importlib.util.spec_from_file_location("sass_report", ROOT / "benchmarks" / "sass_report.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_exits_with_1_where_registers_spill(monkeypatch, capsys) -> None:
    module = report()
    kernels = {"clean": listing("EXIT"), "spilling": listing("STL [R1], R2", "EXIT")}
    for name, code in (("clean", 0), ("spilling", 1)):
        monkeypatch.setattr(module.sass, "load", lambda path, name=name: [kernels[name]])
        assert module.main(["some.cubin", "--arch", "80", "--resources-only"]) == code
    assert "spills 1 instructions" in capsys.readouterr().out


@pytest.fixture(scope="module")
def code():
    try:
        sass_launches.nvcc()
        sass.find_tool("cuobjdump")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    return report().Code([], [])


@pytest.mark.parametrize("arch", [80, 86])
def test_the_kernel_that_matters_most(code, arch: int) -> None:
    count = code.count(Problem(bits=2, act_bits=4, tokens=1), arch)
    ((_launched, walk),) = count.parts  # one launch
    assert walk.kernel.spills == 0
    assert walk.kernel.local_bytes == 0
    assert not walk.assumed
    # What must come out if all instructions were followed rightly: 512 weights a tensor instruction, each byte of the
    # weight asked for once and 16 at a time, 2 bytes stored for each output.
    assert count.issued(("IMMA",)) == count.weights / 512
    assert count.fetched_times == 1
    assert count.weight_load_bytes == [16]
    assert count.weight_bytes * 8 / count.weights == pytest.approx(2.375, abs=1e-3)
    # The bars of issue 4.
    assert count.per_weight <= 0.95
    assert count.prologue <= 0.10
    card = roofline.card("A100-80" if arch == 80 else "RTX 3090")
    assert roofline.estimate(count.work, card).issue_margin >= 2
    assert roofline.estimate(count.work, card).bound_by == "DRAM"
