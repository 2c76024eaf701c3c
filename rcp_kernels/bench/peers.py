"""The competitors of our ops: torch, memory itself, and other libraries. Each is built for one shape, data included.

A function here returns None where its library is not installed or not made for the shape. Which op and device takes
which competitor stands in ``competitors()`` of each benchmark.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import extras, hardware, ops
from ..ops.walsh_matrices import base_matrix, factor_size, hadamard_matrix
from .driver import Peer, WrongResult
from .timing import CPU, Call, copies_needed, plain_read, read_buffer

# Largest relative error that passes for a transform, in units of the dtype's precision. Rows in another order would
# give an error of 1.4.
_TOLERANCE = 64
_CHECKED_ROWS = 4


# Memory.


def memory_read() -> Peer:
    """Reading memory and nothing else: the limit of every op at batch 1 on a CPU."""
    buffer = read_buffer()
    return Peer(lambda _: lambda i: plain_read(buffer), buffer.nbytes)


def device_copy(nbytes: int, device: torch.device) -> Peer:
    """Copying nbytes on a GPU. Reads and writes both count as moved bytes: the limit of every op at batch 1 there."""
    count = copies_needed(nbytes, device)
    sources = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.empty_like(source) for source in sources]
    return Peer(lambda _: lambda i: targets[i % count].copy_(sources[i % count]), 2 * nbytes, count)


# y = x W^T. The load is the batch size.


def linear(calls: Sequence[Callable[[Tensor], object]], in_features: int, x: Tensor, nbytes: int) -> Peer:
    """A linear layer with one function of x per copy of its weight. The input has x's dtype and device."""

    def bind(batch: int) -> Call:
        tokens = torch.randn(batch, in_features, device=x.device).to(x.dtype)
        return lambda i: calls[i % len(calls)](tokens)

    return Peer(bind, nbytes, len(calls))


def torch_linear(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device = CPU) -> Peer:
    """torch.nn.functional.linear with x and W of one float dtype. On a GPU that is cuBLAS."""
    weight = (torch.randn(out_features, in_features, device=device) * in_features**-0.5).to(dtype)
    copies = [weight.clone() for _ in range(copies_needed(weight.nbytes, device))]
    calls = [lambda x, copy=copy: F.linear(x, copy) for copy in copies]
    return linear(calls, in_features, weight, weight.nbytes)


def torch_int4(out_features: int, in_features: int, group_size: int) -> Peer | None:
    """torch's int4 weight-only kernel: bfloat16 x, a scale and a zero-point per group."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    del codes
    scales = torch.rand(in_features // group_size, out_features, 2).bfloat16()
    nbytes = weight.nbytes + scales.nbytes
    op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    copies = [(weight.clone(), scales.clone()) for _ in range(copies_needed(nbytes))]
    calls = [lambda x, copy=copy: op(x, copy[0], group_size, copy[1]) for copy in copies]
    return linear(calls, in_features, scales, nbytes)


def gemlite(out_features: int, in_features: int, bits: int, group_size: int, device: torch.device) -> Peer | None:
    """GemLite's weight-only kernel in Triton: even levels, float16 x. It has no 3 bits."""
    if importlib.util.find_spec("gemlite") is None or bits not in (2, 4):
        return None
    from gemlite.helper import A16Wn_HQQ_INT

    codes = torch.randint(0, 2**bits, (out_features, in_features), device=device).to(torch.uint8)
    scales = torch.rand(out_features * in_features // group_size, 1, device=device).half()
    make = A16Wn_HQQ_INT(device=str(device), dtype=torch.float16, W_nbits=bits)
    nbytes = codes.numel() * bits // 8 + 4 * scales.numel()
    layers = [make.from_weights(codes, scales, torch.ones_like(scales)) for _ in range(copies_needed(nbytes, device))]
    return linear(layers, in_features, scales, nbytes)


def humming(
    out_features: int, in_features: int, bits: int, act_bits: int, group_size: int, device: torch.device
) -> Peer | None:
    """Humming's kernel: even levels; float16 x for 16 activation bits, else int8, the closest that it has to 4 bits."""
    if importlib.util.find_spec("humming") is None:
        return None
    from humming.layer import HummingLayer

    weight = torch.randn(out_features, in_features, device=device).half()
    nbytes = weight.numel() * bits // 8 + 2 * weight.numel() // group_size
    layers: list[nn.Module] = []
    for _ in range(copies_needed(nbytes, device)):
        layer = HummingLayer(
            shape_n=out_features,
            shape_k=in_features,
            weight_config={"dtype": f"int{bits}", "group_size": group_size},
            input_config=None if act_bits == 16 else {"dtype": "int8"},
            torch_dtype=torch.float16,
        ).to(device)
        layer.load_from_unquantized(weight)
        layer.transform()
        layers.append(layer)
    return linear(layers, in_features, weight, nbytes)


# Walsh-Hadamard transforms of x [rows, size] along the last dimension. The load is x, the same for all competitors.


def transform(
    name: str, bind: Callable[[Tensor], Callable[[int], Tensor]], order: str = "natural", factor: float = 1.0
) -> Peer:
    """A competitor whose result is compared with the float64 reference before it is timed.

    Args:
        name: begins the error.
        bind: makes the function to time from x. The function returns `factor` times the orthonormal transform.
        order: of the result's entries, "natural" or "sequency".
        factor: other than 1 for a transform in place that does not normalize. It is timed on zeros, because its values
            would overflow after a few calls.

    Raises:
        WrongResult: from the peer's ``bind``, if the result is something else.
    """

    def checked(x: Tensor) -> Call:
        y = bind(x)(0)[:_CHECKED_ROWS].double() / factor
        expected = ops.reference.walsh_transform(x[:_CHECKED_ROWS], order)
        error = ((y - expected).norm() / expected.norm()).item()
        if not error <= _TOLERANCE * torch.finfo(x.dtype).eps:
            raise WrongResult(
                f"{name} does not compute the {order}-order transform of size {x.shape[-1]}: its relative error is "
                f"{error:.2g}"
            )
        return bind(torch.zeros_like(x) if factor != 1 else x)

    return Peer(checked)


def memcpy() -> Peer:
    """Copying x into a tensor that exists already."""

    def bind(x: Tensor) -> Call:
        y = torch.zeros_like(x)
        return lambda i: y.copy_(x)

    return Peer(bind)


def dense_matmul(name: str, size: int, dtype: torch.dtype, device: torch.device = CPU) -> Peer | None:
    """The product with the size x size matrix. None where memory does not hold the matrix."""
    available = hardware.memory_available_bytes()
    # Two int8 matrices while it is made, then float32 and dtype side by side.
    if available is not None and 10 * size**2 > available:
        return None
    matrix = hadamard_matrix(size).float().mul_(size**-0.5).to(device, dtype)
    return transform(name, lambda x: lambda i: F.linear(x, matrix))


def torch_butterfly(name: str, size: int, dtype: torch.dtype, device: torch.device = CPU) -> Peer:
    """The fast transform in plain torch: log2(2^k) passes over x, and a product with the m x m matrix for m > 1."""
    m, power = factor_size(size, name)
    base = base_matrix(m).to(device, dtype) if m > 1 else None

    def butterfly(x: Tensor) -> Tensor:
        stride = 1
        y = x
        while stride < power:
            first, second = y.view(-1, 2, stride).unbind(1)
            y = torch.stack((first + second, first - second), dim=1)
            stride *= 2
        if base is not None:
            y = base @ y.view(-1, m, power)
        return y.view(x.shape) * size**-0.5

    return transform(name, lambda x: lambda i: butterfly(x))


def hadamard_transform(name: str, size: int) -> Peer | None:
    """The PyPI package hadamard-transform, in plain torch: powers of two only."""
    if not is_power_of_two(size) or not extras.EXTRAS["hadamard_transform"].found:
        return None
    compute = importlib.import_module("hadamard_transform").hadamard_transform
    return transform(name, lambda x: lambda i: compute(x))


def pyfwht(name: str, size: int) -> Peer | None:
    """The PyPI package pyfwht, in C: powers of two only.

    It works in place, does not normalize, and has a CPU kernel for one float type, float64. Several rows go through
    its batch function with torch's number of threads. A single row takes its single-threaded kernel: starting OpenMP
    tasks costs more than a transform that small.
    """
    if not is_power_of_two(size) or not extras.EXTRAS["pyfwht"].found:
        return None
    package: Any = importlib.import_module("pyfwht")

    def bind(x: Tensor) -> Callable[[int], Tensor]:
        if package.has_openmp():
            # The package has no function for this. Its OpenMP may be another one than torch's.
            ctypes.CDLL(package._pyfwht.__file__).omp_set_num_threads(torch.get_num_threads())
        y = x.to(torch.float64, copy=True)
        rows = list(y.numpy())

        def one(i: int) -> Tensor:
            package.transform(rows[0], package.Backend.CPU)
            return y

        def many(i: int) -> Tensor:
            package.vectorized_batch_f64(rows, size)
            return y

        return one if len(rows) == 1 else many

    return transform(name, bind, factor=size**0.5)


def is_power_of_two(size: int) -> bool:
    """True for 1, 2, 4, ..."""
    return size & (size - 1) == 0


# Attention of one query token on a cache of `context` positions, batch 1.


def sdpa(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, context: int, device: torch.device = CPU
) -> Peer:
    """torch's attention on a float cache. Query heads that share a key-value head are queries of that head."""
    keys, values = (torch.randn(1, kv_heads, context, head_dim, device=device).to(dtype) for _ in range(2))
    nbytes = keys.nbytes + values.nbytes
    copies = [(keys.clone(), values.clone()) for _ in range(copies_needed(nbytes, device))]
    query = torch.randn(1, kv_heads, heads // kv_heads, head_dim, device=device).to(dtype)

    def call(i: int) -> Tensor:
        return F.scaled_dot_product_attention(query, *copies[i % len(copies)])

    return Peer(lambda _: call, nbytes, len(copies))
