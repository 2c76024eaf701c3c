"""torch.ops.rcp_kernels.lut_linear_fused: the bits of separate steps, on every ISA of this machine."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lut_linear import DTYPES, SUPPORTED, random_weight, restore_isa, restore_threads  # noqa: F401
from torch.nn import functional

from rcp_kernels import ops
from rcp_kernels.ops.walsh_transform import transform_tables


def separate(x, blob, bias, shape, act_bits, residual, prologue, **rest):
    y = ops.lut_linear(ops.reference.prologue(x, **prologue), blob, bias, shape, act_bits, 0.9, **rest)
    return y if residual is None else residual + y


@pytest.mark.usefixtures("restore_isa")
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    tokens=st.sampled_from([0, 1, 2, 5, 17, 130]),
    act_bits=st.sampled_from([4, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    norm_dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["none", "norm", "gemma", "silu", "gelu_tanh"]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    with_order=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bits_of_separate_steps(
    rows, columns, tokens, act_bits, dtype, norm_dtype, kind, with_bias, with_residual, with_order, seed
):
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(rows, columns, 2, 64, seed)
    blob = ops.pack_weight(weight)
    gated = kind in ("silu", "gelu_tanh")
    x = (3 * torch.randn(tokens, (1 + gated) * columns, generator=generator)).to(dtype)
    prologue = {"activation": kind} if gated else {}
    if kind in ("norm", "gemma"):
        gain = torch.randn(columns, generator=generator).to(norm_dtype)
        prologue = {"norm_weight": gain, "norm_eps": 1e-5, "norm_offset": float(kind == "gemma")}
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    residual = torch.randn(tokens, rows, generator=generator).to(dtype) if with_residual else None
    rest = {"input_order": torch.randperm(columns, generator=generator)} if with_order else {}
    for isa in range(len(SUPPORTED)):
        torch.ops.rcp_kernels.set_cpu_isa(isa)
        expected = separate(x, blob, bias, weight.geometry, act_bits, residual, prologue, **rest)
        y = ops.lut_linear_fused(x, blob, bias, weight.geometry, act_bits, 0.9, residual=residual, **prologue, **rest)
        assert y.dtype == dtype
        assert torch.equal(y, expected), SUPPORTED[isa]


@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "group"), [("sequency", 64), ("natural", 64), ("sequency", 192), ("sequency", 12)])
@pytest.mark.parametrize("kind", ["norm", "silu"])
def test_a_rotation_comes_after_the_prologue(isa, dtype, order, group, kind):
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    weight = random_weight(40, 192, 2, 64)
    blob = ops.pack_weight(weight)
    x = torch.randn(3, 192 * (1 + (kind == "silu"))).to(dtype)
    prologue = {"activation": "silu"} if kind == "silu" else {"norm_weight": torch.randn(192), "norm_eps": 1e-6}
    base, permutation = transform_tables("test", x, group, order)
    rotation = {"rotation": ops.Rotation(base, permutation, group)}
    expected = separate(x, blob, None, weight.geometry, 4, None, prologue, **rotation)
    assert torch.equal(ops.lut_linear_fused(x, blob, None, weight.geometry, 4, 0.9, **prologue, **rotation), expected)


@pytest.mark.usefixtures("restore_isa", "restore_threads")
@pytest.mark.parametrize("isa", range(len(SUPPORTED)), ids=SUPPORTED)
@pytest.mark.parametrize("tokens", [1, 20, 150])
def test_threads_do_not_change_a_bit(isa, tokens):
    torch.ops.rcp_kernels.set_cpu_isa(isa)
    rows = 64 if isa == 0 else 1536  # the plain path is slow
    weight = random_weight(rows, 576, 2, 64)
    blob = ops.pack_weight(weight)
    x, residual = torch.randn(tokens, 1152), torch.randn(tokens, rows)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.lut_linear_fused(x, blob, None, weight.geometry, 4, activation="silu", residual=residual))
    assert torch.equal(*results)


def test_norm_and_activations_are_those_of_torch():
    """To float32 rounding, whose order is our own: the reference itself against torch's float64."""
    x = 3 * torch.randn(50, 576)
    gain = torch.randn(576)
    for offset in (0.0, 1.0):
        y = ops.reference.rms_norm(x, gain, 1e-5, offset)
        exact = functional.rms_norm(x.double(), (576,), gain.double() + offset, 1e-5)
        assert ((y - exact).abs() <= 2e-6 * exact.abs() + 1e-9).all()
    gate, up = x.double().chunk(2, -1)
    for activation, exact in (
        ("silu", functional.silu(gate)),
        ("gelu_tanh", functional.gelu(gate, approximate="tanh")),
    ):
        y = ops.reference.gated_activation(x, activation)
        assert ((y - exact * up).abs() <= 5e-6 * (exact * up).abs() + 1e-9).all(), activation


def test_strided_and_deep_inputs():
    weight = random_weight(48, 96, 2, 32)
    blob = ops.pack_weight(weight)
    gain = torch.randn(192)[::2]
    for x in (torch.randn(96, 7).t(), torch.randn(2, 3, 4, 96), torch.randn(96), torch.randn(3, 0, 96)):
        residual = torch.randn(*x.shape[:-1], 96)[..., ::2]
        y = ops.lut_linear_fused(x, blob, None, weight.geometry, 4, norm_weight=gain, residual=residual)
        copies = {"norm_weight": gain.clone(), "residual": residual.clone()}
        assert torch.equal(y, ops.lut_linear_fused(x.clone(), blob, None, weight.geometry, 4, **copies))


@pytest.mark.parametrize("kind", ["norm", "silu", "gelu_tanh"])
def test_gradients_are_those_of_separate_steps(kind):
    weight = random_weight(24, 64, 3, 32)
    blob, shape = ops.pack_weight(weight), weight.geometry
    x = torch.randn(3, 64 if kind == "norm" else 128, requires_grad=True)
    residual = torch.randn(3, 24, requires_grad=True)
    gain = torch.randn(64, requires_grad=True)
    prologue = {"norm_weight": gain, "norm_eps": 1e-5} if kind == "norm" else {"activation": kind}
    y = ops.lut_linear_fused(x, blob, None, shape, 16, residual=residual, **prologue)
    with torch.no_grad():
        assert torch.equal(y, ops.lut_linear_fused(x, blob, None, shape, 16, residual=residual, **prologue))
    if kind == "norm":
        before = functional.rms_norm(x, (64,), gain, 1e-5)
    else:
        gate, up = x.chunk(2, -1)
        before = (functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")) * up
    wanted = before @ ops.dequantize(blob, shape).T + residual
    inputs = (x, residual, gain) if kind == "norm" else (x, residual)
    for got, exact in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_opcheck(dtype, shape, activation):
    blob = ops.pack_weight(random_weight(24, 200, 2, 64))
    x = torch.randn(*shape, 400 if activation else 200).to(dtype)
    fused = {"activation": activation, "residual": torch.randn(*shape, 24).to(dtype)}
    if not activation:
        fused |= {"norm_weight": torch.randn(200), "norm_eps": 1e-6}
    torch.library.opcheck(torch.ops.rcp_kernels.lut_linear_fused.default, (x, blob, None, 24, 200, 2, 64, 4), fused)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 63)}, r"in_features \(64\).*got shape \[2, 63\]"),
        ({"activation": 1}, r"twice in_features \(64\).*got shape \[2, 64\]"),
        ({"activation": 3}, r"activation must be .* got 3"),
        ({"activation": -1}, r"activation must be .* got -1"),
        ({"activation": 1, "norm_weight": torch.ones(64)}, "beside a norm_weight, got 1"),
        ({"norm_weight": torch.ones(65)}, r"norm_weight must have shape \[64\], got \[65\]"),
        ({"norm_weight": torch.ones(64).double()}, "norm_weight must be float32.*got Double"),
        ({"norm_weight": torch.ones(64), "norm_eps": -1.0}, "norm_eps must be finite and at least 0.*got -1"),
        ({"residual": torch.ones(2, 17)}, r"residual must have shape \[2, 16\], got \[2, 17\]"),
        ({"residual": torch.ones(2, 16).half()}, "residual must be Float, got Half"),
        ({"rotation_group": 48}, "group_size must divide .* got 48"),
        ({"act_bits": 5}, "lut_linear_fused: act_bits must be 4, 8 or 16, got 5"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {
        "x": torch.ones(2, 64), "weight": ops.pack_weight(random_weight(16, 64, 2, 64)), "bias": None,
        "out_features": 16, "in_features": 64, "bits": 2, "group_size": 64, "act_bits": 4,
    }  # fmt: skip
    torch.ops.rcp_kernels.lut_linear_fused(**arguments)
    with pytest.raises(ValueError, match=message):
        torch.ops.rcp_kernels.lut_linear_fused(**(arguments | change))


@pytest.mark.parametrize("grad", [False, True])
def test_what_the_function_refuses(grad):
    """With and without a gradient, which are two implementations."""
    blob = ops.pack_weight(random_weight(16, 64, 2, 64))
    shape = (ops.Geometry(16, 64, 2, 64), 4)
    x = torch.ones((2, 64), requires_grad=grad)
    with pytest.raises(ValueError, match="activation"):
        ops.lut_linear_fused(x, blob, None, *shape, activation="relu")
    with pytest.raises(ValueError, match="twice"):
        ops.lut_linear_fused(x, blob, None, *shape, activation="silu")
    with pytest.raises(ValueError, match=r"weight must have shape .*3"):
        ops.lut_linear_fused(x, blob, None, *shape, norm_weight=torch.ones(3))
    with pytest.raises(ValueError, match="residual"):
        ops.lut_linear_fused(x, blob, None, *shape, residual=torch.ones(2, 3))
    with pytest.raises(ValueError, match="residual must be on the device of x"):
        ops.lut_linear_fused(torch.ones(2, 64), blob, None, *shape, residual=torch.ones((2, 16), device="meta"))
