"""opcheck of every operator, and torch.compile of models with QuantLinear."""

import pytest
import torch
from torch import nn

from rcp_kernels import QuantLinear, ops, quantize_activation, quantize_model, quantize_weight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(7,), (3, 64), (2, 3, 33), (0, 16)])
@pytest.mark.parametrize(("bits", "packed"), [(4, False), (4, True), (8, False)])
def test_opcheck_quantize_activation(dtype: torch.dtype, shape: tuple[int, ...], bits: int, packed: bool) -> None:
    x = torch.randn(shape, dtype=dtype)
    torch.library.opcheck(torch.ops.rcp_kernels.quantize_activation.default, (x, bits, 0.9, packed))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize(("bits", "act_bits"), [(2, 4), (3, 8), (4, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_lut_linear(dtype: torch.dtype, shape: tuple[int, ...], bits: int, act_bits: int, bias: bool) -> None:
    blob = ops.pack_weight(quantize_weight(torch.randn(24, 200), bits, 64))
    arguments = (torch.randn(shape, dtype=dtype), blob, torch.randn(24) if bias else None, 24, 200, bits, 64, act_bits)
    torch.library.opcheck(torch.ops.rcp_kernels.lut_linear.default, arguments, {"clip": 0.9})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(200,), (2, 3, 200), (0, 200)])
@pytest.mark.parametrize(("bits", "act_bits"), [(2, 4), (3, 8), (4, 16)])
def test_opcheck_lut_linear_with_an_input_order(
    dtype: torch.dtype, shape: tuple[int, ...], bits: int, act_bits: int
) -> None:
    blob = ops.pack_weight(quantize_weight(torch.randn(24, 200), bits, 64))
    arguments = (torch.randn(shape, dtype=dtype), blob, torch.randn(24), 24, 200, bits, 64, act_bits)
    torch.library.opcheck(torch.ops.rcp_kernels.lut_linear.default, arguments, {"input_order": torch.randperm(200)})


@pytest.mark.parametrize(("bits", "in_features", "group_size"), [(2, 200, 64), (3, 77, 77), (4, 128, 128)])
def test_opcheck_pack_and_unpack_weight(bits: int, in_features: int, group_size: int) -> None:
    weight = quantize_weight(torch.randn(24, in_features), bits, group_size)
    tensors = (weight.codes, weight.levels, weight.scales, weight.tensor_scale)
    torch.library.opcheck(torch.ops.rcp_kernels.pack_weight.default, (*tensors, in_features, bits, group_size))
    blob = ops.pack_weight(weight)
    torch.library.opcheck(torch.ops.rcp_kernels.unpack_weight.default, (blob, 24, in_features, bits, group_size))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 48, bias=False), nn.LayerNorm(48), nn.Linear(48, 8)
    )
    quantize_model(model, bits=3, group_size=32, act_bits=8)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_model_equals_eager(backend: str) -> None:
    model = make_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (1, 5, 9):  # the second and third make the number of tokens symbolic
            x = torch.randn(2, tokens, 96)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


def test_compiled_layer_is_bit_equal() -> None:
    layer = make_model()[0]
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_compiled_layer_with_an_input_order() -> None:
    torch.manual_seed(0)
    layer = QuantLinear.from_packed(
        quantize_weight(torch.randn(24, 96), 3, 32), torch.randn(24), 8, input_order=torch.randperm(96)
    )
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5, 9):
        x = torch.randn(tokens, 96)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        x.requires_grad_()
        found, expected = (torch.autograd.grad(module(x).square().sum(), x)[0] for module in (compiled, layer))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_layer_under_autocast(dtype: torch.dtype) -> None:
    layer = make_model()[0]
    x = torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        y = compiled(x)
        assert y.dtype == dtype
        assert torch.equal(y, layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_gradients_equal_eager(backend: str) -> None:
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn((4, 96), requires_grad=True)
    parameters = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_compiled_quantize_activation() -> None:
    x = torch.randn(3, 33)
    compiled = torch.compile(lambda x: quantize_activation(x, 4, packed=True), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x), quantize_activation(x, 4, packed=True), strict=True):
        assert torch.equal(found, expected)


def test_export() -> None:
    model = make_model().eval()
    x = torch.randn(3, 96)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))


def test_fake_kernels_check_their_input() -> None:
    x = torch.empty((3, 200), device="meta")
    layer = QuantLinear(200, 24, device="meta")
    assert layer(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match=r"200 features in its last dimension.*got shape \(3, 199\); pass"):
        layer(x[:, 1:])
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch.float64; convert"):
        layer(x.double())
    for arguments, message in (
        ((x, 5), r"bits must be one of \(4, 8\), got 5"),
        ((x, 4, 0.0), r"clip must be in \(0, 1\], got 0.0"),
        ((x, 8, 1.0, True), r"packed storage is for 4 bits, got bits=8"),
        ((torch.empty((), device="meta"),), r"at least one dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_activation(*arguments)
    q, scale = quantize_activation(x, 4, packed=True)
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((3, 100), torch.uint8, (3,), torch.float32)
