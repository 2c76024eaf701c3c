"""The student: a model whose linear layers fake-quantize weight and input in every forward pass, differentiably."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ..models import Architecture, describe
from ..models.hf import cache_argument
from ..nn.online_rotation import OnlineRotation
from ..nn.quant_linear import QuantLinear
from ..ops.checks import check_one_of
from ..ops.kv_cache import fake_quantize_kv
from ..ops.quantize_activation import quantize_activation
from .layers import float_linears
from .ldp import LearnableDirectPartitioning

__all__ = [
    "FakeQuantKV",
    "FakeQuantLinear",
    "export_student",
    "fake_quantize_activation",
    "fake_quantized_kv",
    "make_student",
    "students",
    "with_quantized_weights",
]

INITS = ("uniform", "clip", "kmeans")
"""Initial levels of a student: LearnableDirectPartitioning's init_uniform, init_clip_search, init_kmeans."""


class FakeQuantLinear(nn.Module):
    """``y = Q(x) Q(W)^T + bias`` in float, differentiable, equal to the exported QuantLinear up to rounding.

    The weight is quantized in every forward pass, or once for all passes between :meth:`hold` and :meth:`release`.

    Attributes:
        weight: float32 [N, K], trained.
        quantizer: LearnableDirectPartitioning of the weight.
        bias: [N], not trained, or None.
        input_rotation: applied to x before x is quantized, or None.
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
        self._quantized: Tensor | None = None
        self._graph: Tensor | None = None

    def hold(self, dtype: torch.dtype) -> None:
        """Quantize the weight now, for all forward passes until :meth:`release`.

        With gradients enabled, the passes accumulate the gradient of the quantized weight. ``release`` then passes the
        sum through the quantizer once, instead of once per forward pass.
        """
        quantized = self.quantizer(self.weight, dtype)
        self._graph = quantized if quantized.requires_grad else None
        self._quantized = quantized.detach().requires_grad_(quantized.requires_grad)

    def release(self, backward: bool = True) -> None:
        """Drop the quantized weight of :meth:`hold`.

        Args:
            backward: first pass its gradient on to the weight and the quantizer.
        """
        if backward and self._graph is not None and self._quantized is not None and self._quantized.grad is not None:
            torch.autograd.backward(self._graph, self._quantized.grad)
        self._graph = self._quantized = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.input_rotation is not None:
            x = self.input_rotation(x)
        if self.act_bits != 16:
            try:
                x = fake_quantize_activation(x, self.act_bits, self.act_clip)
            except ValueError as error:
                raise ValueError(f"layer {self.name}: {error}") from None
        weight = self._quantized
        if weight is None:
            kind = "cpu" if x.is_meta else x.device.type  # torch has no autocast for the meta device
            autocast = torch.is_autocast_enabled(kind)
            weight = self.quantizer(self.weight, torch.get_autocast_dtype(kind) if autocast else x.dtype)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(weight.dtype))

    def export(self) -> QuantLinear:
        """The packed layer. Its weight is bit for bit the quantized weight of training."""
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
    """``q * scale`` of :func:`rcp_kernels.quantize_activation`. Straight-through; clipped entries get no gradient.

    Args:
        x: float32, float16 or bfloat16 [..., K].
        bits: 4 or 8.
        clip: in (0, 1].

    Raises:
        ValueError: as :func:`rcp_kernels.quantize_activation`, also for NaN and Inf.
    """
    return _FakeQuantizeActivation.apply(x, bits, clip)


class FakeQuantKV:
    """An empty key/value cache for a model's forward pass: returns keys and values quantized, and stores nothing.

    Keys arrive after RoPE and R3, as in a real cache.

    Attributes:
        bits, clip: of :func:`rcp_kernels.ops.fake_quantize_kv`.
        updates: number of calls of :meth:`update`.
    """

    is_compileable = False

    def __init__(self, bits: int, clip: float = 1.0) -> None:
        self.bits = bits
        self.clip = clip
        self.updates = 0

    def check_asked(self, where: str) -> None:
        """Raise RuntimeError if no layer has used this cache: a model may ignore an argument that it does not know."""
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


@contextlib.contextmanager
def fake_quantized_kv(module: nn.Module, bits: int, clip: float, where: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments with which a model or a decoder layer quantizes keys and values, inside the ``with`` block.

    16 bits give no arguments. Raises RuntimeError at the end of the block if the module did not use the cache.
    """
    if bits == 16:
        yield {}
        return
    cache = FakeQuantKV(bits, clip)
    yield cache_argument(module, cache)
    cache.check_asked(where)


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
    device: torch.device | None = None,
) -> Architecture:
    """Replace the linear layers of a model's decoder by :class:`FakeQuantLinear`, in place, and freeze the rest.

    Args:
        model: float, rotated or not.
        bits, group_size, learn_clip, learn_partition: as for LearnableDirectPartitioning.
        act_bits, act_clip: of the layers' inputs.
        init: one of `INITS`.
        device: to choose the initial levels on, one weight at a time; the student stays where the model is. None: the
            device of each weight.

    Raises:
        ValueError: an unknown init, an architecture that :func:`describe` does not know, or a layer that is no
            ``nn.Linear``. The message names the layer.
    """
    check_one_of("make_student", "init", init, INITS, "check the spelling")
    architecture = describe(model)
    linears = float_linears(model, architecture, "make_student")
    model.requires_grad_(False)
    for name, linear in linears.items():
        weight = linear.weight.detach()
        weight = weight if device is None else weight.to(device)
        quantizer = LearnableDirectPartitioning(
            tuple(weight.shape), bits, group_size, learn_clip, learn_partition, device=weight.device
        )
        if init == "kmeans":
            quantizer.init_kmeans(weight)
        elif init == "clip":
            quantizer.init_clip_search(weight)
        quantizer.to(linear.weight.device)
        model.set_submodule(name, FakeQuantLinear(linear, quantizer, act_bits, act_clip, name))
    return architecture


def students(model: nn.Module) -> list[FakeQuantLinear]:
    """The trainable layers of a model, in the model's order."""
    return [module for module in model.modules() if isinstance(module, FakeQuantLinear)]


@contextlib.contextmanager
def with_quantized_weights(
    model: nn.Module,
    dtype: torch.dtype,
    run: Callable[[Callable[[Any], Any], Iterable[Any]], object] = lambda f, items: list(map(f, items)),
) -> Iterator[None]:
    """Quantize all weights of a student once for all forward and backward passes inside the ``with`` block.

    ``dtype`` is that of the quantized weights. ``run`` is like ``map`` and may use threads.
    """
    layers = students(model)
    gradients = torch.is_grad_enabled()

    def hold(layer: FakeQuantLinear) -> None:
        with torch.set_grad_enabled(gradients):  # in a new thread gradients are enabled
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
            model.set_submodule(name, module.export().train(module.training))


def is_finite(value: Tensor) -> bool:
    """Whether the tensor, or this process's shard of it, is finite."""
    part = value.to_local() if isinstance(value, DTensor) else value
    return bool(torch.isfinite(part).all())


@torch.no_grad()
def first_bad_layer(model: nn.Module, forward: Callable[[], object], otherwise: str) -> str:
    """The layer where NaN or Inf began: in a weight, else in the first output, else in the gradient nearest the loss.

    ``forward`` runs the student on the tokens that gave the loss. ``otherwise`` is returned if no layer is bad.
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
    with contextlib.suppress(ValueError):  # quantizers refuse NaN after the layer that produced it
        forward()
    for handle in handles:
        handle.remove()
    for layer in reversed(layers):
        if not all(is_finite(p.grad) for p in layer.parameters() if p.grad is not None):
            bad.append(layer.name)
    return bad[0] if bad else otherwise
