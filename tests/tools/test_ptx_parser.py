"""PTX text: scopes, immediates, and what is refused."""

import numpy as np
import pytest
from ptx import Memory, PtxError, parse
from ptx.bench import HEADER, evaluate, kernel, run


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.f8 %r1, %r2, %r3;",
        "ld.global.fast.u32 %r1, [%x0];",
        "wgmma.fence.sync.aligned;",
        "cp.async.bulk.commit_group;",
        "mma.sync.aligned.m16n8k99.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};",
        "add.s32 %h1, %r2, %r3;",
        "mov.u32 %r1, %unknown;",
        "mov.u32 %r1, nowhere;",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %r1, %r2;",
    ],
)
def test_unknown_instructions(instruction):
    with pytest.raises(
        PtxError, match=rf"must know every instruction, got line 11: {instruction.split(' ')[0].rstrip(';')}"
    ):
        run(kernel(instruction), Memory())


def test_calls_are_refused_when_they_are_executed():
    function = ".extern .func (.param .b32 r) helper (.param .b32 a);\n"
    function += ".func (.param .b32 r) mine (.param .b32 a)\n{\nret;\n}\n"
    body = """
mov.u32 %r0, %tid.x;
setp.lt.u32 %p1, %r0, {};
@%p1 bra END;
{{ // callseq 0, 0
.param .b32 param0;
st.param.b32 [param0], %r0;
call.uni (retval0), helper, (param0);
}}
END:
"""
    run(kernel(body.format(32)).replace(HEADER, HEADER + function), Memory())
    with pytest.raises(PtxError, match=r"line \d+: (call.uni|st.param)"):
        run(kernel(body.format(31)).replace(HEADER, HEADER + function), Memory())


def test_scopes_of_inline_assembly():
    """The same names in two scopes are two registers, and two labels."""
    scope = """
{{
.reg .pred P1;
.reg .u32 low, high<2>;
setp.gt.u32 P1, {0}, {1};
mov.u32 low, {1};
@P1 bra SKIP;
mov.u32 low, 99;
SKIP:
mov.u32 high1, low;
add.u32 {0}, {0}, high1;
}}
"""
    a = np.arange(10, dtype=np.uint32)
    found = evaluate("mov.u32 %d_, %a;" + scope.format("%d_", 4) + scope.format("%d_", 100), {"a": a}, {"d_": "uint32"})

    def step(value, limit):
        return value + (limit if value > limit else 99)

    assert found["d_"].tolist() == [step(step(v, 4), 100) for v in range(10)]


def test_immediates():
    text = """
mov.u32 %d_, 0x1F; add.u32 %d_, %d_, 0b101; add.u32 %d_, %d_, 017; add.u32 %d_, %d_, 10U; add.s32 %d_, %d_, -1;
mov.f32 %e_, 0f3FC00000; mov.f64 %f_, 0dBFF8000000000000;
"""
    found = evaluate(text, {"a": np.zeros(1, "u4")}, {"d_": "uint32", "e_": "float32", "f_": "float64"})
    assert [found[n][0] for n in found] == [31 + 5 + 15 + 10 - 1, 1.5, -1.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello;", "must be a variable or a kernel"),
        (".visible .entry test()\n{\nadd.u32", "cut off"),
        (".visible .entry test()\n{\nbra NOWHERE;\n}", "must have a target"),
        (".shared .b9 x[4];", "must have a type"),
    ],
)
def test_text_that_is_no_ptx(text, message):
    with pytest.raises(PtxError, match=message):
        parse(HEADER + text)
