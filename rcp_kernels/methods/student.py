"""The trainable low-bit model: linear layers that quantize their weight and input in the forward pass, in float."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ..models import Architecture, describe
from ..nn.online_rotation import OnlineRotation
from ..nn.quant_linear import QuantLinear
from ..ops.kv_cache import fake_quantize_kv
from ..ops.quantize_activation import quantize_activation
from .layers import float_linears
from .ldp import LearnableDirectPartitioning

__all__ = ["FakeQuantKV", "FakeQuantLinear", "export_student", "fake_quantize_activation", "make_student", "students"]

INITS = ("uniform", "clip", "kmeans")
"""How the levels of a student start: LearnableDirectPartitioning's init_uniform, init_clip_search, init_kmeans."""


class FakeQuantLinear(nn.Module):
    """``y = Q(x) Q(W)^T + bias`` in float: what QuantLinear will compute, up to rounding, and differentiable.

    The weight is quantized in every forward pass, or, between :meth:`hold` and :meth:`release`, once for several.

    Attributes:
        weight: float32 [N, K], trained.
        quantizer: LearnableDirectPartitioning of the weight.
        bias: [N], not trained, or None.
        input_rotation: applied to x before it is quantized, or None.
        act_bits: 4, 8 or 16.
        act_clip: in (0, 1].
        name: full name in the model, for messages.
    """

    bias: Tensor | None

    def __init__(
        self, linear: nn.Linear, quantizer: LearnableDirectPartitioning, act_bits: int, act_clip: float, name: str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float32, copy=True))
        self.quantizer = quantizer
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        self.input_rotation: OnlineRotation | None = getattr(linear, "input_rotation", None)
        self.act_bits = act_bits
        self.act_clip = act_clip
        self.name = name
        self._held: Tensor | None = None
        self._graph: Tensor | None = None

    def hold(self, dtype: torch.dtype) -> None:
        """Quantize the weight now, for all forward passes until :meth:`release`.

        With gradients enabled the passes accumulate their gradient at the quantized weight, and ``release`` takes it
        through the quantizer once, instead of once a pass.
        """
        quantized = self.quantizer(self.weight, dtype)
        self._graph = quantized if quantized.requires_grad else None
        self._held = quantized.detach().requires_grad_(quantized.requires_grad)

    def release(self, backward: bool = True) -> None:
        """Forget the held weight, after its gradient has gone on to the weight and the quantizer, if backward."""
        if backward and self._graph is not None and self._held is not None and self._held.grad is not None:
            torch.autograd.backward(self._graph, self._held.grad)
        self._graph = self._held = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.input_rotation is not None:
            x = self.input_rotation(x)
        if self.act_bits != 16:
            try:
                x = fake_quantize_activation(x, self.act_bits, self.act_clip)
            except ValueError as error:
                raise ValueError(f"layer {self.name}: {error}") from None
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        weight = self.quantizer(self.weight, dtype) if self._held is None else self._held
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(dtype))

    def export(self) -> QuantLinear:
        """The packed layer, whose weight is bit for bit the one trained with."""
        packed = self.quantizer.export(self.weight)
        return QuantLinear.from_packed(packed, self.bias, self.act_bits, self.act_clip, self.input_rotation)


class _FakeQuantizeActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, clip: float) -> Tensor:
        q, scale = quantize_activation(x, bits, clip)
        ctx.clipped = clip < 1.0
        if ctx.clipped:
            ctx.save_for_backward(x.abs() <= clip * x.abs().amax(-1, keepdim=True))
        return (q.to(torch.float32) * scale.unsqueeze(-1)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.clipped:
            (inside,) = ctx.saved_tensors
            grad = grad * inside
        return grad, None, None


def fake_quantize_activation(x: Tensor, bits: int = 4, clip: float = 1.0) -> Tensor:
    """``q * scale`` of :func:`rcp_kernels.quantize_activation`, straight-through; clipped entries get no gradient.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        bits: 4 or 8.
        clip: in (0, 1].

    Raises:
        ValueError: as that operator, NaN and Inf included.
    """
    return _FakeQuantizeActivation.apply(x, bits, clip)


class FakeQuantKV:
    """What a model takes for an empty key/value cache: hands keys and values back quantized, and keeps nothing.

    Keys arrive after RoPE and R3, as in a real cache.

    Attributes:
        bits, clip: of :func:`rcp_kernels.ops.fake_quantize_kv`.
        updates: how often a layer has handed keys and values in.
    """

    is_compileable = False

    def __init__(self, bits: int, clip: float = 1.0) -> None:
        self.bits = bits
        self.clip = clip
        self.updates = 0

    def check_asked(self, where: str) -> None:
        """Raise unless a layer has used this cache: a model may ignore an argument that it does not know.

        Raises:
            RuntimeError: no layer has.
        """
        if not self.updates:
            raise RuntimeError(
                f"{where}: keys and values must pass through the cache of {self.bits} bits, got a forward pass that "
                f"never asked it; this release of transformers is not supported: use kv_bits=16 or another release"
            )

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.updates += 1
        return fake_quantize_kv(keys, self.bits, self.clip), fake_quantize_kv(values, self.bits, self.clip)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_query_offset(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return length, 0


def make_student(
    model: nn.Module,
    *,
    bits: int = 2,
    group_size: int = 128,
    act_bits: int = 4,
    act_clip: float = 1.0,
    init: str = "kmeans",
    learn_clip: bool = True,
    learn_partition: bool | None = None,
) -> Architecture:
    """Replace the linear layers of a model's decoder by :class:`FakeQuantLinear`, in place, and freeze all the rest.

    Args:
        model: float, rotated or not.
        bits, group_size, learn_clip, learn_partition: as LearnableDirectPartitioning.
        act_bits, act_clip: of the layers' inputs.
        init: one of `INITS`.

    Raises:
        ValueError: an unknown init, an architecture that :func:`describe` does not know, or a layer that is no
            ``nn.Linear``, named.
    """
    if init not in INITS:
        raise ValueError(f"make_student: init must be one of {INITS}, got {init!r}; check the spelling")
    architecture = describe(model)
    linears = float_linears(model, architecture, "make_student")
    model.requires_grad_(False)
    for name, linear in linears.items():
        quantizer = LearnableDirectPartitioning(
            tuple(linear.weight.shape), bits, group_size, learn_clip, learn_partition, device=linear.weight.device
        )
        if init == "kmeans":
            quantizer.init_kmeans(linear.weight)
        elif init == "clip":
            quantizer.init_clip_search(linear.weight)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FakeQuantLinear(linear, quantizer, act_bits, act_clip, name))
    return architecture


def students(model: nn.Module) -> list[FakeQuantLinear]:
    """The trainable layers of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, FakeQuantLinear)]


@contextlib.contextmanager
def held(
    model: nn.Module,
    dtype: torch.dtype,
    run: Callable[[Callable[[Any], Any], Iterable[Any]], object] = lambda f, items: list(map(f, items)),
) -> Iterator[None]:
    """All weights of a student quantized once, for the forward and backward passes inside the ``with`` block.

    Args:
        model: with layers of :func:`make_student`.
        dtype: of the quantized weights.
        run: a map, which may use threads.
    """
    layers = students(model)
    gradients = torch.is_grad_enabled()

    def hold(layer: FakeQuantLinear) -> None:
        with torch.set_grad_enabled(gradients):  # threads begin with gradients on
            layer.hold(dtype)

    run(hold, layers)
    try:
        yield
    except BaseException:
        for layer in layers:
            layer.release(backward=False)
        raise
    run(FakeQuantLinear.release, layers)


def export_student(model: nn.Module) -> None:
    """Replace every :class:`FakeQuantLinear` of a model by the packed layer, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.export().train(module.training))


def is_finite(value: Tensor) -> bool:
    """Whether all of it, or of this process's part, is finite."""
    part = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(part).all())


@torch.no_grad()
def first_bad_layer(model: nn.Module, forward: Callable[[], object], otherwise: str) -> str:
    """Where NaN or Inf began: a weight, else the first output, else the gradient nearest to the loss.

    Args:
        model: with layers of :func:`make_student`.
        forward: runs it on what gave the loss.
        otherwise: the name if no layer has any.
    """
    layers = students(model)
    bad: list[str] = []

    def watch(layer: FakeQuantLinear) -> Any:
        def check(module: nn.Module, args: Any, output: Tensor) -> None:
            if not bool(torch.isfinite(output).all()):
                bad.append(layer.name)

        return layer.register_forward_hook(check)

    for layer in layers:
        if not all(is_finite(value) for value in layer.parameters()):
            return layer.name
    handles = [watch(layer) for layer in layers]
    with contextlib.suppress(ValueError):  # what refuses NaN comes after the layer that gave it
        forward()
    for handle in handles:
        handle.remove()
    for layer in reversed(layers):
        if not all(is_finite(p.grad) for p in layer.parameters() if p.grad is not None):
            bad.append(layer.name)
    return bad[0] if bad else otherwise
