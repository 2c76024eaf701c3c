"""torch.ops.rcp_kernels.lut_linear against the reference, on every ISA of this machine."""

import dataclasses
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcp_kernels import OnlineRotation, PackedWeight, QuantLinear, ops

ISAS = ["scalar", "avx2", "avx512", "amx"]
SUPPORTED = ISAS[: torch.ops.rcp_kernels.cpu_isa_supported() + 1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def restore_isa():
    before = torch.ops.rcp_kernels.cpu_isa()
    yield
    torch.ops.rcp_kernels.set_cpu_isa(before)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_weight(rows, columns, bits, group_size, seed=0, unit_scales=False):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-128, 128, (rows, groups, 2**bits), generator=generator).sort(-1).values.to(torch.int8)
    scales = torch.rand(rows, groups, generator=generator) * 0.01 + 0.001
    scales = torch.ones_like(scales) if unit_scales else scales
    return PackedWeight.pack(
        codes, levels, scales.half(), 1.0 if unit_scales else 0.25, bits=bits, group_size=group_size
    )


def run(x, weight, bias=None, act_bits=4, clip=1.0):
    blob = ops.pack_weight(weight)
    w = weight
    return ops.lut_linear(x, blob, bias, w.geometry, act_bits, clip)


def magnitude(x, weight, act_bits, clip):
    """The sum of the absolute values of what the op adds up: rounding errors scale with it."""
    if act_bits == 16:
        q, scale = x.double().abs(), torch.ones(len(x), dtype=torch.float64)
    else:
        q, scale = (t.double().abs() for t in ops.reference.quantize_activation(x, act_bits, clip))
    return (q @ weight.dequantize().double().abs().T) * scale[:, None]


@pytest.mark.usefixtures("restore_isa")
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 500),
    tokens=st.integers(1, 40),
    bits=st.sampled_from([2, 3, 4]),
    group=st.sampled_from([32, 64, 128, None]),
    act_bits=st.sampled_from([4, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    clip=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference(rows, columns, tokens, bits, group, act_bits, dtype, with_bias, clip, seed):
    weight = random_weight(rows, columns, bits, group or columns, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    expected = ops.reference.lut_linear(x, weight, bias, act_bits, clip)
    # 1e-5 of the magnitude for the float32 sum, half a unit in the last place for the output type.
    bound = 1e-5 * (magnitude(x, weight, act_bits, clip) + (0 if bias is None else bias.double().abs())) + 1e-7
    bound = bound + expected.abs() * (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    outputs = []
    for isa in range(len(SUPPORTED)):
        torch.ops.rcp_kernels.set_cpu_isa(isa)
        y = run(x, weight, bias, act_bits, clip)
        assert y.dtype == dtype
        assert ((y.double() - expected).abs() <= bound).all(), SUPPORTED[isa]
        assert torch.equal(y, run(x, weight, bias, act_bits, clip)), "two runs differ"
        outputs.append(y)
    assert all(torch.equal(y, outputs[0]) for y in outputs), "the instruction sets differ"


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 40])
def test_group_sums_are_exact(isa, act_bits, bits, tokens):
    """With unit scales and a token whose largest value is qmax, y is the sum of the exact integers."""
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    weight = random_weight(37, 256, bits, 64, unit_scales=True)
    qmax = 7 if act_bits == 4 else 127
    x = torch.randint(-qmax, qmax + 1, (tokens, 256), dtype=torch.float32)
    x[:, 3] = qmax
    sums = ops.reference.lut_linear_group_sums(x.to(torch.int8), weight).sum(-1)
    assert sums.abs().max() < 2**24
    assert torch.equal(run(x, weight, None, act_bits).long(), sums)


@pytest.mark.usefixtures("restore_isa", "restore_threads")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("tokens", [1, 5, 20, 150])
@pytest.mark.parametrize("act_bits", [4, 16])
def test_threads_do_not_change_a_bit(isa, tokens, act_bits):
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    rows = 64 if isa == 0 else 1536  # the plain path is slow
    weight = random_weight(rows, 576, 2, 64)
    x = torch.randn(tokens, 576)
    torch.set_num_threads(1)
    one = run(x, weight, act_bits=act_bits)
    torch.set_num_threads(2)
    two = run(x, weight, act_bits=act_bits)
    assert torch.equal(one, two)


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "columns", "group_size"), [(33, 200, 32), (16, 384, 128), (50, 129, 64), (5, 77, 77)])
def test_uniform_groups_are_bit_equal_to_tables(isa, act_bits, dtype, bits, rows, columns, group_size):
    """On every instruction set, forward and backward; what a table gives is tested against the reference above."""
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    weight = random_weight(rows, columns, bits, group_size)
    first = weight.levels[..., :1].clamp(max=2 ** (7 - bits) - 1)
    uniform = dataclasses.replace(weight, levels=first, kind="uniform").validate()
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    for tokens in (1, 2, 5, 13, 17):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y = run(x, uniform, bias, act_bits)
        assert torch.equal(y, run(x, uniform.as_table(), bias, act_bits))
    x = x.float().requires_grad_()
    (grad,) = torch.autograd.grad(run(x, uniform, bias, act_bits).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(run(x, uniform.as_table(), bias, act_bits).sum(), x)[0])
    assert torch.equal(ops.reference.lut_linear(x, uniform), ops.reference.lut_linear(x, uniform.as_table()))


def test_many_threads_call_one_weight():
    weight = random_weight(512, 1024, 3, 128)
    blob = ops.pack_weight(weight)
    x = torch.randn(4, 1024)
    expected = ops.lut_linear(x, blob, None, weight.geometry, 4)
    wrong = []

    def work():
        for _ in range(50):
            if not torch.equal(ops.lut_linear(x, blob, None, weight.geometry, 4), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_shapes_that_are_empty_strided_or_deep():
    weight = random_weight(48, 96, 2, 32)
    for shape in ((0, 96), (3, 0, 96), (96,), (2, 3, 4, 96)):
        x = torch.randn(shape)
        assert run(x, weight).shape == (*shape[:-1], 48)
    x = torch.randn(96, 7).t()
    assert not x.is_contiguous()
    assert torch.equal(run(x, weight), run(x.contiguous(), weight))
    sliced = torch.randn(7, 200)[:, 3:195:2]
    assert torch.equal(run(sliced, weight), run(sliced.contiguous(), weight))
    misaligned = torch.randn(96 * 2 + 1)[1:].view(2, 96)
    assert torch.equal(run(misaligned, weight), run(misaligned.clone(), weight))
    bias = torch.randn(96)[::2]
    assert torch.equal(run(x, weight, bias), run(x, weight, bias.contiguous()))


def test_sixteen_bit_activations_let_nan_through():
    """As nn.Linear does: only quantized activations have to be finite."""
    weight = random_weight(16, 64, 2, 64)
    x = torch.ones(2, 64)
    x[1, 0] = torch.nan
    y = run(x, weight, act_bits=16)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1]).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_raises(bad):
    x = torch.ones(9, 64)
    x[6, 1] = bad
    with pytest.raises(ValueError, match=r"token 6 holds NaN or Inf.*act_bits=16"):
        run(x, random_weight(16, 64, 2, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 63)}, r"last dimension of x must be in_features \(64\), got shape \[2, 63\]"),
        ({"x": torch.tensor(1.0)}, r"got shape \[\]"),
        ({"x": torch.ones(2, 64, dtype=torch.float64)}, "must be float32, float16 or bfloat16, got Double"),
        ({"x": torch.ones(2, 64, dtype=torch.int32)}, "must be float32, float16 or bfloat16, got Int"),
        ({"bias": torch.ones(15)}, r"bias must have shape \[16\], got \[15\]"),
        ({"bias": torch.ones(16, dtype=torch.int64)}, "bias must be float32, float16 or bfloat16, got Long"),
        ({"act_bits": 5}, "act_bits must be 4, 8 or 16, got 5"),
        ({"clip": 0.0}, r"clip must be in \(0, 1\]"),
        ({"clip": 1.5}, r"clip must be in \(0, 1\]"),
        ({"bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"bits": 3}, "bits 3.*but the weight was packed with.*bits 2"),
        ({"group_size": 48}, "group_size must be 32, 64, 128 or in_features"),
        ({"out_features": 17}, "out_features 17.*packed with out_features 16"),
        ({"weight": torch.zeros(0, dtype=torch.uint8)}, "64-byte header"),
        ({"weight": torch.zeros(500, dtype=torch.uint8)}, "wrong magic"),
        ({"weight": torch.zeros(500)}, "contiguous 1-D uint8 tensor that pack_weight made"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": torch.ones(2, 64), "weight": ops.pack_weight(random_weight(16, 64, 2, 64)), "bias": None,
        "out_features": 16, "in_features": 64, "bits": 2, "group_size": 64, "act_bits": 4, "clip": 1.0,
    }  # fmt: skip
    torch.ops.rcp_kernels.lut_linear(**arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.rcp_kernels.lut_linear(**(arguments | change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codes", torch.zeros(16, 15, dtype=torch.uint8), r"codes must have shape \[16, 16\], got \[16, 15\]"),
        ("codes", torch.zeros(16, dtype=torch.uint8), "codes must have 2 dimensions"),
        ("codes", torch.zeros(16, 16), "codes must be Byte, got Float"),
        ("levels", torch.zeros(16, 2, 4, dtype=torch.int8), r"levels must have shape \[16, 1, 4\]"),
        ("scales", torch.zeros(16, 1), "scales must be Half, got Float"),
        ("tensor_scale", torch.tensor(3.0), "positive finite power of two, got 3"),
        ("tensor_scale", torch.tensor(torch.inf), "positive finite power of two"),
    ],
)
def test_pack_weight_checks_its_tensors(name, value, message):
    w = random_weight(16, 64, 2, 64)
    tensors = {"codes": w.codes, "levels": w.levels, "scales": w.scales, "tensor_scale": w.tensor_scale} | {name: value}
    with pytest.raises(ValueError, match=message):
        torch.ops.rcp_kernels.pack_weight(**tensors, in_features=64, bits=2, group_size=64)


@pytest.mark.parametrize("isa", [*ISAS, "sse9"])
def test_environment_chooses_the_isa(isa):
    """RCP_ISA is honoured, or refused with both names: at the first call, not at import."""
    program = "import torch, rcp_kernels; print('imported'); print(torch.ops.rcp_kernels.cpu_isa())"
    environment = os.environ | {"RCP_ISA": isa}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "imported" in done.stdout
    if isa in SUPPORTED:
        assert done.stdout.split()[-1] == str(ISAS.index(isa))
    elif isa in ISAS:
        assert f"RCP_ISA={isa}: this CPU runs at most the {SUPPORTED[-1]} kernels, got {isa}" in done.stderr
    else:
        assert "RCP_ISA must be scalar, avx2, avx512 or amx, got 'sse9'" in done.stderr


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "group"), [("sequency", 64), ("natural", 64), ("sequency", 192), ("sequency", 12)])
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_rotation_inside_equals_rotation_before(isa, dtype, order, group, act_bits):
    """Bit for bit, through the op and through QuantLinear."""
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    weight = random_weight(40, 192, 2, 64)
    layer = QuantLinear.from_packed(
        weight, act_bits=act_bits, input_rotation=OnlineRotation(192, group_size=group, order=order)
    )
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        expected = run(ops.walsh_transform(x, order=order, group_size=group), weight, act_bits=act_bits)
        assert torch.equal(layer(x), expected)
        # With a gradient wanted, the same through autograd.
        assert torch.equal(layer(x.clone().requires_grad_()), expected)


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(192, 64), (77, 77), (130, 32), (1, 1)])
@pytest.mark.parametrize("act_bits", [4, 8, 16])
def test_an_input_order_equals_reordered_inputs(isa, dtype, columns, group, act_bits):
    """Bit for bit, and the reference reorders likewise; inputs of any strides, empty ones too."""
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    weight = random_weight(40, columns, 2, group)
    blob = ops.pack_weight(weight)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))

    def ordered(x, order=order):
        return ops.lut_linear(x, blob, None, weight.geometry, act_bits, 0.9, input_order=order)

    for tokens in (0, 1, 3, 20, 130):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        expected = run(x[:, order], weight, act_bits=act_bits, clip=0.9)
        assert torch.equal(ordered(x), expected)
        assert torch.equal(ordered(x.clone().requires_grad_()), expected)
        assert torch.equal(ordered(x.t().contiguous().t()), expected)
        strided = torch.stack((order, order), -1)[:, 0]
        assert torch.equal(ordered(x, strided), expected)
        reference = ops.reference.lut_linear(x, weight, None, act_bits, 0.9, input_order=order)
        assert torch.equal(reference, ops.reference.lut_linear(x[:, order], weight, None, act_bits, 0.9))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.full((64,), 64), r"input_order must hold 0 to 63, got 64"),
        (torch.full((64,), -1), r"input_order must hold 0 to 63, got -1"),
        (torch.arange(63), r"input_order must have shape \[64\], got \[63\]"),
        (torch.arange(64, dtype=torch.int32), r"input_order must be Long, got Int"),
        (torch.arange(64, device="meta"), r"input_order must be on the device of x \(cpu\), got meta"),
    ],
)
def test_bad_input_orders(grad, order, message):
    weight = random_weight(16, 64, 2, 64)
    x = torch.ones((2, 64), requires_grad=grad)
    with pytest.raises(ValueError, match=message):
        ops.lut_linear(x, ops.pack_weight(weight), None, weight.geometry, 4, input_order=order)


@pytest.mark.parametrize("grad", [False, True])
def test_an_input_order_beside_a_rotation_is_refused(grad):
    weight = random_weight(16, 64, 2, 64)
    x, rotation = torch.ones((2, 64), requires_grad=grad), ops.Rotation(None, None, 32)
    with pytest.raises(ValueError, match="input_order must be left out where rotation_group is not 0, got both"):
        ops.lut_linear(x, ops.pack_weight(weight), None, weight.geometry, 4, 1.0, rotation, torch.arange(64))
    for bad, message in ((torch.arange(63), r"int64 of shape \(64,\)"), (torch.arange(64).int(), "got torch.int32")):
        with pytest.raises(ValueError, match=message):
            ops.reference.lut_linear(x, weight, input_order=bad)


def test_bad_rotation_arguments():
    blob = ops.pack_weight(random_weight(16, 64, 2, 64))
    op = torch.ops.rcp_kernels.lut_linear
    x = torch.ones(1, 64)
    with pytest.raises(ValueError, match=r"lut_linear: rotation: group_size must divide .* got 48"):
        op(x, blob, None, 16, 64, 2, 64, 4, rotation_group=48)
    with pytest.raises(ValueError, match=r"permutation must have shape \[64\], got \[32\]"):
        op(x, blob, None, 16, 64, 2, 64, 4, rotation_permutation=torch.zeros(32, dtype=torch.int32), rotation_group=64)
    with pytest.raises(ValueError, match=r"permutation must hold 0 \.\. 11, got 12"):
        op(
            torch.ones(1, 12), ops.pack_weight(random_weight(16, 12, 2, 12)), None, 16, 12, 2, 12, 4,
            rotation_base=torch.ones(12, 12), rotation_permutation=torch.full((12,), 12, dtype=torch.int32),
            rotation_group=12,
        )  # fmt: skip


def test_mixed_devices_raise():
    """A meta weight among CPU tensors must not give uninitialised memory."""
    layer = QuantLinear(64, 48, group_size=32, device="meta", bias=False)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"weight must be on the device of x \(cpu\), got meta.*assign=True"),
    ):
        layer(torch.randn(3, 64))
    weight = random_weight(16, 64, 2, 64)
    with pytest.raises(ValueError, match=r"bias must be on the device of x \(cpu\), got meta"):
        ops.lut_linear(torch.ones(1, 64), ops.pack_weight(weight), torch.ones(16, device="meta"), weight.geometry, 4)


def test_integers_beyond_32_bits_are_not_wrapped():
    weight = ops.pack_weight(random_weight(16, 64, 2, 64))
    with pytest.raises(ValueError, match=f"bits must be 2, 3 or 4, got {2**32 + 2}"):
        torch.ops.rcp_kernels.lut_linear(torch.ones(1, 64), weight, None, 16, 64, 2**32 + 2, 64, 4)
    with pytest.raises(ValueError, match="cannot be a layer's sizes"):
        torch.ops.rcp_kernels.lut_linear(torch.ones(0, 2**53), weight, None, 2**53, 2**53, 2, 128, 4)
    with pytest.raises(ValueError, match=rf"isa must be 0 .* got {2**32}"):
        torch.ops.rcp_kernels.set_cpu_isa(2**32)
