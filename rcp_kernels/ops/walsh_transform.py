"""The fast Walsh-Hadamard transform in sequency or natural order, alone and with quantization after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .checks import check_float, check_one_of
from .quantize_activation import check_quantization, empty_quantized, quantize_activation_reference
from .walsh_matrices import _base, _sequency_permutation, factor_size, hadamard_matrix

__all__ = [
    "ORDERS",
    "transform_blocks",
    "transform_tables",
    "walsh_quantize",
    "walsh_quantize_reference",
    "walsh_transform",
    "walsh_transform_reference",
]

ORDERS = ("sequency", "natural")
"""Orders of the rows of a Walsh matrix."""

# The float32 base matrix and the int32 permutation of the operators, or None, by size, order and device.
_Tables = tuple[Tensor | None, Tensor | None]
_tables_cache: dict[tuple[int, str, torch.device], _Tables] = {}


def walsh_transform(
    x: Tensor,
    order: str = "sequency",
    group_size: int | None = None,
    scale: float | None = None,
    inverse: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``x @ walsh_matrix(n).T * scale`` along the last dimension, with n log n additions instead of n^2.

    With ``order="natural"`` the matrix is ``hadamard_matrix(n)``; with group_size it is the block diagonal of that
    kind. The computation is float32, rounded once to x.dtype (docs/walsh.md gives every step). Two runs agree bit for
    bit, and so do any two instruction sets. Differentiable: the gradient is the transform in the other direction.

    Args:
        x: float32, float16 or bfloat16 [..., n], any strides; n = m * 2^k with m in
            ``rcp_kernels.ops.walsh_matrices.BASE_ORDERS`` unless group_size is given.
        order: of the rows of the matrix: ``"sequency"`` (number of sign changes) or ``"natural"``.
        group_size: transform each run of this many entries by itself. It divides n and is m * 2^k. None: n.
        scale: factor of the result. None is 1/sqrt(group_size or n), which makes the transform orthogonal.
        inverse: apply the transpose of the matrix. With the default scale this undoes the transform. For powers of two
            both matrices are symmetric, and this changes nothing.
        inplace: overwrite x, which must be contiguous, and return it. Not differentiable.

    Returns:
        x.dtype [..., n], in the order of the coefficients.

    Raises:
        ValueError: a size without a matrix, a group_size that does not divide n, another order or dtype, or an x that
            cannot be overwritten.
    """
    size, scale, base, permutation = _prepare("walsh_transform", x, order, group_size, scale)
    if not inplace:
        return transform_blocks(x, base, permutation, size, scale, inverse)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "walsh_transform: inplace needs an x that does not require grad, got one that does; pass inplace=False, or "
            "work under torch.no_grad()"
        )
    torch.ops.rcp_kernels.walsh_transform_.default(x, base, permutation, size, scale, inverse)
    # torch's stable ABI cannot tell autograd that x has changed. A compiled graph knows from the schema.
    if not (torch.compiler.is_compiling() or x.is_inference()):
        torch.autograd.graph.increment_version(x)
    return x


def walsh_quantize(
    x: Tensor,
    bits: int = 4,
    clip: float = 1.0,
    packed: bool = False,
    order: str = "sequency",
    group_size: int | None = None,
    scale: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``quantize_activation(walsh_transform(x, ...), bits, clip, packed)`` in one pass, equal bit for bit.

    The transformed x is rounded to x.dtype before it is quantized. Not differentiable.

    Args:
        x: float32, float16 or bfloat16 [..., n], any strides.
        bits, clip, packed: as :func:`rcp_kernels.quantize_activation`; a token is all n entries with any group_size.
        order, group_size, scale, inverse: as :func:`walsh_transform`.

    Returns:
        q, int8 [..., n] or, packed, uint8 [..., ceil(n / 2)]; and the token's quantization scale, float32 [...].

    Raises:
        ValueError: as the two operators do.
    """
    size, scale, base, permutation = _prepare("walsh_quantize", x, order, group_size, scale)
    return torch.ops.rcp_kernels.walsh_quantize.default(x, base, permutation, size, scale, inverse, bits, clip, packed)


def _prepare(
    caller: str, x: Tensor, order: str, group_size: int | None, scale: float | None
) -> tuple[int, float, Tensor | None, Tensor | None]:
    if group_size is None:
        if x.dim() < 1:
            raise ValueError(f"{caller}: x must have at least one dimension, got a scalar; use x[None]")
        group_size = int(x.shape[-1])
    base, permutation = transform_tables(caller, x, group_size, order)
    return group_size, group_size**-0.5 if scale is None else scale, base, permutation


def transform_tables(caller: str, x: Tensor, size: int, order: str) -> _Tables:
    """The base matrix and the permutation of the operators for blocks of ``size``, on the device of x.

    Returns:
        float32 [m, m] or None for powers of two; int32 [size] or None for natural order.
    """
    # A fake tensor needs fake tables, which must not outlive its mode. Under torch.compile x is not a FakeTensor here.
    make = _make_tables if isinstance(x, FakeTensor) else _tables
    return make(caller, size, order, x.device)


def _tables(caller: str, size: int, order: str, device: torch.device) -> _Tables:
    """The tables of a size and an order, made once for each device."""
    tables = _tables_cache.get((size, order, device))
    if tables is None:
        tables = _tables_cache[size, order, device] = _make_tables(caller, size, order, device)
    return tables


# torch.compiler.assume_constant_result does the same, but imports torch._dynamo, which takes a second.
_tables._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make_tables(caller: str, size: int, order: str, device: torch.device) -> _Tables:
    check_one_of(caller, "order", order, ORDERS, "check the spelling")
    m, _ = factor_size(size, caller)
    base = permutation = None
    with torch.inference_mode(False):  # autograd cannot save an inference tensor
        if m > 1:
            base = torch.tensor(_base(m), dtype=torch.float32, device=device)
        if order == "sequency":
            permutation = torch.tensor(_sequency_permutation(size, caller), dtype=torch.int32, device=device)
    return base, permutation


def transform_blocks(
    x: Tensor, base: Tensor | None, permutation: Tensor | None, size: int, scale: float, inverse: bool
) -> Tensor:
    """Transform every run of ``size`` entries along the last dimension, with given tables. Differentiable in x."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _WalshTransform.apply(x, base, permutation, size, scale, inverse)
    return torch.ops.rcp_kernels.walsh_transform.default(x, base, permutation, size, scale, inverse)


class _WalshTransform(torch.autograd.Function):
    """The gradient of a linear map is its transpose. register_autograd would make every call slower."""

    @staticmethod
    def forward(
        x: Tensor, base: Tensor | None, permutation: Tensor | None, size: int, scale: float, inverse: bool
    ) -> Tensor:
        return torch.ops.rcp_kernels.walsh_transform.default(x, base, permutation, size, scale, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, base, permutation, *ctx.rest = inputs
        ctx.save_for_backward(base, permutation)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        base, permutation = ctx.saved_tensors
        size, scale, inverse = ctx.rest
        return transform_blocks(grad_y, base, permutation, size, scale, not inverse), None, None, None, None, None


def _check_x(caller: str, x: Tensor, group_size: int) -> None:
    check_float(caller, "x", x)
    _check_groups(caller, x, group_size)


def _check_groups(caller: str, x: Tensor, group_size: int) -> None:
    if x.dim() < 1 or x.shape[-1] % group_size:
        raise ValueError(
            f"{caller}: group_size must divide the last dimension of x, got group_size {group_size} and shape "
            f"{tuple(x.shape)}; choose a divisor"
        )


@torch.library.register_fake("rcp_kernels::walsh_transform")
def _fake(x: Tensor, base: Tensor | None, permutation: Tensor | None, group_size: int, *rest: Any) -> Tensor:
    _check_x("walsh_transform", x, group_size)
    return x.new_empty(x.shape)


@torch.library.register_fake("rcp_kernels::walsh_transform_")
def _fake_inplace(x: Tensor, base: Tensor | None, permutation: Tensor | None, group_size: int, *rest: Any) -> None:
    _check_x("walsh_transform_", x, group_size)
    if not x.is_contiguous():
        raise ValueError(
            f"walsh_transform_: x must be contiguous to be overwritten, got strides {x.stride()}; pass inplace=False"
        )


@torch.library.register_fake("rcp_kernels::walsh_quantize")
def _fake_quantize(
    x: Tensor,
    base: Tensor | None,
    permutation: Tensor | None,
    group_size: int,
    scale: float,
    inverse: bool,
    bits: int,
    clip: float = 1.0,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_x("walsh_quantize", x, group_size)
    check_quantization(x, bits, clip, packed)
    return empty_quantized(x, packed)


def walsh_transform_reference(
    x: Tensor,
    order: str = "sequency",
    group_size: int | None = None,
    scale: float | None = None,
    inverse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """:func:`walsh_transform` in plain torch, every step rounded to ``dtype``: the same steps in the same order.

    float64 gives the exact result for the purposes of a test. float32, cast to x.dtype, gives the operator's result bit
    for bit, except for subnormal numbers, which the operator flushes. x.dtype gives the result of a butterfly in torch.

    Args:
        x: floating point [..., n].
        order, group_size, scale, inverse: as :func:`walsh_transform`.
        dtype: floating point, of every step and of the result.

    Returns:
        dtype [..., n].

    Raises:
        ValueError: as the operator does, but for the dtype of x.
    """
    size, scale, base, permutation = _prepare("walsh_transform", x, order, group_size, scale)
    _check_groups("walsh_transform", x, size)
    m = 1 if base is None else base.shape[0]
    inverse = inverse and m > 1  # without a base the matrix is symmetric
    values = x.detach().to(dtype).unflatten(-1, (x.shape[-1] // size, size))
    if inverse and permutation is not None:
        values = values[..., torch.argsort(permutation)]
    values = values.unflatten(-1, (m, size // m))
    if base is not None:
        base = (base.T if inverse else base).to(values)
    values = (_products if dtype == torch.float64 else _butterflies)(values, base).flatten(-2)
    if not inverse and permutation is not None:
        values = values[..., permutation]
    return values.flatten(-2) * values.new_tensor(scale)


def _products(values: Tensor, base: Tensor | None) -> Tensor:
    """[..., m, 2^k] by dense factors, which are 2 to 6 times faster than butterflies. Float64 needs no fixed order."""
    power = values.shape[-1]
    inner = min(power, 256)
    values = values.unflatten(-1, (power // inner, inner)) @ hadamard_matrix(inner).to(values)
    if inner < power:
        values = hadamard_matrix(power // inner).to(values) @ values
    values = values.flatten(-2)
    return values if base is None else base @ values


def _butterflies(values: Tensor, base: Tensor | None) -> Tensor:
    """[..., m, 2^k] by the operator's steps: butterflies, then the product with the base column by column."""
    stride = 1
    while stride < values.shape[-1]:
        first, second = values.unflatten(-1, (-1, 2, stride)).unbind(-2)
        values = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        stride *= 2
    if base is None:
        return values
    columns = base.unbind(1)
    total = values[..., :1, :] * columns[0][:, None]
    for j in range(1, len(columns)):
        total = total + values[..., j : j + 1, :] * columns[j][:, None]
    return total


def walsh_quantize_reference(
    x: Tensor,
    bits: int = 4,
    clip: float = 1.0,
    packed: bool = False,
    order: str = "sequency",
    group_size: int | None = None,
    scale: float | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`walsh_quantize` in plain torch, as two separate steps: equal bit for bit.

    Raises:
        ValueError: as the operator does.
    """
    rotated = walsh_transform_reference(x, order, group_size, scale, inverse, torch.float32).to(x.dtype)
    return quantize_activation_reference(rotated, bits, clip, packed)
