"""Cases of the linear layer: lut_linear, lut_linear_fused, and packing a weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..formats import PackedWeight, num_groups
from ..ops.walsh_transform import transform_tables
from .cases import Case, Comparison, bound_of_cast, exactly, name_of, noise, shape_text, within

__all__ = ["linear_cases"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4)
ACT_BITS = (4, 8, 16)
# (out_features, in_features): one row, tails in rows and columns, a column more than a unit of CUDA's layout, a layer.
SHAPES = ((1, 32), (16, 128), (17, 100), (48, 513), (130, 1000), (256, 2048), (64, 1536))
# Around the numbers of tokens at which the kernels change, and a prompt.
TOKENS = (1, 2, 5, 8, 9, 16, 17, 33, 128, 512)
# None is one group a row. Five entries, which 7 shapes and 10 tokens do not divide evenly.
GROUPS = (128, 32, None, 64, 128, 64, 32, None, 128, 64, 32)
_BOUND = "float32 sums of the exact integers (docs/numerics.md), and the cast"


def random_weight(rows: int, columns: int, bits: int, group_size: int | None, seed: int = 0) -> PackedWeight:
    """A weight in packed form: random codes, ascending random levels, random scales. group_size None: one group."""
    generator = torch.Generator().manual_seed(seed)
    group_size = group_size or columns
    groups = num_groups(columns, group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    levels = torch.randint(-128, 128, (rows, groups, 2**bits), generator=generator).sort(-1).values.to(torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) * 0.01 + 0.001).half()
    return PackedWeight.pack(codes, levels, scales, 0.25, bits=bits, group_size=group_size)


def linear_bound(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, act_bits: int, clip: float, cuda: bool
) -> tuple[Tensor, Tensor]:
    """The exact result in float64, and the bound of a device's result for each value.

    The CPU's bound is that of docs/numerics.md. CUDA sums parts of a group, each of at most 128 columns, and for 16
    bits in another order (csrc/include/rcp/cuda/lut_linear_a16.cuh).
    """
    columns = weight.in_features
    dense = weight.dequantize().double().abs()
    group = min(weight.group_size, 128) if cuda else weight.group_size
    steps = -(-columns // group) + (2 * -(-columns // 512) + 3 if cuda else 2)
    exact = ops.reference.lut_linear(x, weight, bias, act_bits, clip)
    if act_bits == 16:
        magnitude = x.double().abs() @ dense.T
        if cuda:
            padding = (0, -columns % 512)
            peaks = torch.nn.functional.pad(x.double().abs(), padding).unflatten(-1, (-1, 512)).amax(-1)
            units = torch.nn.functional.pad(dense, padding).unflatten(-1, (-1, 512)).sum(-1)
            bound = (3 * steps + group / 8) * 2**-23 * magnitude + 2**-30 * (peaks @ units.T)
        else:
            # Subnormal bfloat16 inputs count as zero.
            bound = (steps + group / 4 + 2) * 2**-24 * magnitude + 2.0**-126 * dense.sum(1)
    else:
        q, scale = ops.reference.quantize_activation(x, act_bits, clip)
        bound = steps * 2**-24 * (q.double().abs() @ dense.T) * scale.double()[..., None]
    if bias is not None:
        bound = bound + 2**-24 * (bias.double().abs() + exact.abs())
    return exact, bound_of_cast(exact, bound, x.dtype)


def linear_cases() -> Iterator[Case]:
    """Every kind of weight and activation at every shape; then everything that is an option of the layer."""
    groups, tokens = itertools.cycle(GROUPS), itertools.cycle(TOKENS)
    for bits, act_bits, dtype in itertools.product(BITS, ACT_BITS, DTYPES):
        for shape in SHAPES:
            for _ in range(2):
                yield _linear(shape, next(tokens), bits, next(groups), act_bits, dtype)
    for act_bits in ACT_BITS:
        for number, dtype in enumerate(DTYPES):
            yield _linear((130, 1000), 3, 2, 128, act_bits, dtype, bias=DTYPES[number - 1], clip=0.9)
        yield _linear((64, 512), 0, 2, 128, act_bits, torch.float16)
        for layout in ("strided", "misaligned"):
            yield _linear((48, 512), 2, 3, 64, act_bits, torch.float16, layout=layout)
        yield Case(
            "lut_linear",
            "input_order",
            f"A{act_bits} 48 x 513, 5 tokens",
            "equal to reordered inputs",
            partial(_input_order, act_bits),
        )
    for order, group in itertools.product(("sequency", "natural"), (32, 64, 128, 256, 96, 1536)):
        for count in (1, 5, 20):
            dtype = DTYPES[count % 3]
            name = f"{order} in runs of {group}, W2A4 64 x 1536, {count} tokens, {name_of(dtype)}"
            run = partial(_rotation, order, group, count, dtype)
            yield Case("lut_linear", "rotation", name, f"{_BOUND}, after walsh_transform", run)
    for bits, group_size in itertools.product(BITS, (32, 64, 128, None)):
        for shape in SHAPES:
            if group_size is None and shape[1] in (32, 64, 128):
                continue  # that is a group of this size
            name = f"W{bits} {shape_text(shape)}, groups of {group_size or shape[1]}"
            yield Case("pack_weight", f"W{bits}", name, "equal", partial(_packing, shape, bits, group_size))
    for act_bits, prologue in itertools.product(ACT_BITS, ("norm", "silu", "gelu_tanh")):
        name = f"{prologue}, W4A{act_bits} 48 x 256, 3 tokens, float16"
        run = partial(_fused, prologue, act_bits)
        yield Case("lut_linear_fused", prologue, name, "equal to its separate steps", run)


def _linear(
    shape: tuple[int, int],
    tokens: int,
    bits: int,
    group_size: int | None,
    act_bits: int,
    dtype: torch.dtype,
    **options: Any,
) -> Case:
    extra = "".join(f", {name} {name_of(value) if name == 'bias' else value}" for name, value in options.items())
    name = f"W{bits}A{act_bits} {shape_text(shape)}, {tokens} tokens, groups of {group_size or shape[1]}, "
    run = partial(_compare, shape, tokens, bits, group_size, act_bits, dtype, **options)
    return Case("lut_linear", f"W{bits}A{act_bits}", f"{name}{name_of(dtype)}{extra}", _BOUND, run)


def _compare(
    shape: tuple[int, int],
    tokens: int,
    bits: int,
    group_size: int | None,
    act_bits: int,
    dtype: torch.dtype,
    device: torch.device,
    bias: torch.dtype | None = None,
    clip: float = 1.0,
    layout: str = "contiguous",
) -> Iterator[Comparison]:
    weight = random_weight(*shape, bits, group_size)
    x = noise(tokens, shape[1], dtype=dtype)
    on_device = _with_layout(x, layout, device)
    added = None if bias is None else noise(shape[0], dtype=bias, seed=2)
    blob = ops.pack_weight(weight.to(device))

    def call() -> Tensor:
        moved = None if added is None else added.to(device)
        return ops.lut_linear(on_device, blob, moved, weight.geometry, act_bits, clip)

    y = call()
    exact, bound = linear_bound(x, weight, added, act_bits, clip, device.type == "cuda")
    yield within("y", y, exact, bound)
    yield exactly("a second run", call(), y)


def _with_layout(x: Tensor, layout: str, device: torch.device) -> Tensor:
    """x on a device, with strides or at an odd address."""
    if layout == "strided":
        return torch.stack((x, x), -1).to(device)[..., 0]
    if layout == "misaligned":
        return torch.cat((x.new_zeros(1), x.flatten())).to(device)[1:].view(x.shape)
    return x.to(device)


def _input_order(act_bits: int, device: torch.device) -> Iterator[Comparison]:
    weight = random_weight(48, 513, 3, 64)
    order = torch.randperm(513, generator=torch.Generator().manual_seed(0))
    x = noise(5, 513, dtype=torch.float16)
    blob = ops.pack_weight(weight.to(device))
    y = ops.lut_linear(x.to(device), blob, None, weight.geometry, act_bits, input_order=order.to(device))
    yield exactly("y", y, ops.lut_linear(x[:, order].to(device), blob, None, weight.geometry, act_bits))
    yield within("y", y, *linear_bound(x[:, order], weight, None, act_bits, 1.0, device.type == "cuda"))


def _rotation(order: str, group: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    weight = random_weight(64, 1536, 2, 128)
    x = noise(tokens, 1536, dtype=dtype).to(device)
    blob = ops.pack_weight(weight.to(device))
    rotation = ops.Rotation(*transform_tables("check", x, group, order), group)
    y = ops.lut_linear(x, blob, None, weight.geometry, 4, rotation=rotation)
    # walsh_transform has cases of its own. A reference of x itself would round some activations to other integers.
    rotated = ops.walsh_transform(x, order, group).cpu()
    yield within("y", y, *linear_bound(rotated, weight, None, 4, 1.0, device.type == "cuda"))
    yield exactly("a second run", ops.lut_linear(x, blob, None, weight.geometry, 4, rotation=rotation), y)


def _packing(shape: tuple[int, int], bits: int, group_size: int | None, device: torch.device) -> Iterator[Comparison]:
    weight = random_weight(*shape, bits, group_size)
    blob = ops.pack_weight(weight.to(device))
    back = ops.unpack_weight(blob, weight.geometry)
    for name in PackedWeight.TENSORS:
        yield exactly(f"unpack_weight's {name}", getattr(back, name), getattr(weight, name))
    for dtype in DTYPES:
        dense = ops.dequantize(blob, weight.geometry, dtype)
        yield exactly(f"dequantize to {name_of(dtype)}", dense, weight.dequantize().to(dtype))


def _fused(prologue: str, act_bits: int, device: torch.device) -> Iterator[Comparison]:
    weight = random_weight(48, 256, 4, 64)
    blob = ops.pack_weight(weight.to(device))
    residual = noise(3, 48, dtype=torch.float16, seed=3)
    gain = noise(256, dtype=torch.float16, seed=2)
    options: dict[str, Any] = (
        {"norm_weight": gain, "norm_eps": 1e-5} if prologue == "norm" else {"activation": prologue}
    )
    x = noise(3, 256 if prologue == "norm" else 512, dtype=torch.float16)
    moved: dict[str, Any] = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()
    }

    def call() -> Tensor:
        return ops.lut_linear_fused(
            x.to(device), blob, None, weight.geometry, act_bits, residual=residual.to(device), **moved
        )

    y = call()
    steps = ops.reference.prologue(x.to(device), **moved)
    separate = ops.lut_linear(steps, blob, None, weight.geometry, act_bits)
    yield exactly("y", y, residual.to(device) + separate)
    yield exactly("a second run", call(), y)
