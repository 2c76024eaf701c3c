"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) of a language model: layer by layer, on already quantized inputs.

docs/gptq.md has the formulas and what is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...formats import PackedWeight
from ...models import Layer, describe
from ...models.hf import cache_argument
from ...nn.quant_linear import QuantLinear
from ...ops.quantize_activation import quantize_activation
from ..layers import check_calibration_ids, check_vocabulary, first_layer_inputs, float_linears, run_layer
from ..student import FakeQuantKV
from .kept_outputs import KeptOutputs
from .quantize_weight import (
    Chooser,
    add_gram,
    check_arguments,
    factor_hessian,
    gptq_quantize_weight,
    quantize_rows,
    relative_errors,
    round_to_nearest,
)

__all__ = ["LayerError", "QuantizedLayers", "gptq_quantize_model", "gptq_quantize_weight"]

_BATCH_TOKENS = 2048
# Bytes of outputs inside one decoder layer that are kept from one pass over the text to the next. The others are
# computed again, so that memory does not grow with the text.
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class LayerError:
    """The squared error of a layer's output on the calibration tokens, relative to the output's own square.

    Attributes:
        name: of the linear layer.
        rtn: with the same kind of levels, each weight rounded to the nearest.
        gptq: with error feedback.
        damping: that was used, as a share of the mean of the Hessian's diagonal.
    """

    name: str
    rtn: float
    gptq: float
    damping: float


class QuantizedLayers(dict[str, PackedWeight]):
    """Packed weights by the name of the layer, with ``errors``, a :class:`LayerError` for each, in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[LayerError] = []


def gptq_quantize_model(
    model: nn.Module,
    calibration_ids: Tensor,
    *,
    bits: int = 2,
    group_size: int = 128,
    act_bits: int = 16,
    act_clip: float = 1.0,
    kv_bits: int = 16,
    kv_clip: float = 1.0,
    levels: str | Chooser = "uniform",
    damping: float = 0.01,
    block: int = 128,
    simulate: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> QuantizedLayers:
    """Quantize the seven linear layers of every decoder layer, in order, each on the inputs that it will see.

    The calibration text runs through the model one decoder layer at a time, and inside a layer in four steps, q k v, o,
    gate up, down, so that every Hessian is of inputs that come from layers quantized before, weights and activations
    alike. Beyond the model, memory holds the hidden states of the text, one layer's weights, one Hessian, and at most
    1 GB of outputs inside the layer.

    Args:
        model: a causal language model that :func:`rcp_kernels.models.describe` knows, in floating point, rotated by
            :func:`rcp_kernels.methods.rotate.rotate_model` or not; changed in place at the very end, so that an error
            leaves it as it was.
        calibration_ids: int64 [sequences, tokens].
        bits, group_size, levels, damping, block: as :func:`gptq_quantize_weight`.
        act_bits: 4, 8 or 16 bits an activation while calibrating, and of the packed layers.
        act_clip: in (0, 1].
        kv_bits: 16, or the bits of keys and values while calibrating.
        kv_clip: in (0, 1], of these.
        simulate: keep the linear layers and write the dequantized weights into them, in their dtype, instead of
            replacing them by packed ones. Activations are then not quantized any more.
        progress: called after each linear layer with the layers done, their total and the name of this one.

    Returns:
        The packed weights by full name, and each layer's error.

    Raises:
        TypeError: calibration_ids are no integers.
        ValueError: an unknown architecture, bits or a clip outside its set, a layer that is packed already, a parameter
            on the meta device, where accelerate keeps what it has offloaded, calibration text shorter than one sequence
            or with an id outside the vocabulary, NaN or Inf on the way (names the layer), or a Hessian that no damping
            makes positive definite (same).
    """
    where = "gptq_quantize_model"
    check_calibration_ids(calibration_ids, where)
    for name, value, allowed in (("act_bits", act_bits, (4, 8, 16)), ("kv_bits", kv_bits, (*range(2, 9), 16))):
        if type(value) is not int or value not in allowed:
            raise ValueError(f"{where}: {name} must be one of {allowed}, got {value!r}; 16 leaves them unquantized")
    clips: dict[str, Any] = {"act_clip": act_clip, "kv_clip": kv_clip}
    for name, clip in clips.items():
        if isinstance(clip, bool) or not isinstance(clip, Real) or not 0.0 < clip <= 1.0:  # type: ignore[operator]
            raise ValueError(f"{where}: {name} must be a number in (0, 1], got {clip!r}; 1.0 keeps the largest value")
    architecture = describe(model)
    check_vocabulary(model, calibration_ids, where)
    linears = float_linears(model, architecture, where)
    for name, linear in linears.items():
        check_arguments(linear.weight, bits, group_size, levels, damping, block, f"{where}: layer {name}")
    result = QuantizedLayers()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden, keywords = first_layer_inputs(model, calibration_ids)
            for layer, extra in zip(architecture.layers, keywords, strict=True):
                module = model.get_submodule(layer.name)
                cache = None if kv_bits == 16 else FakeQuantKV(kv_bits, kv_clip)
                if cache is not None:
                    extra = {**extra, **cache_argument(module, cache)}
                kept = KeptOutputs(_KEPT_BYTES)
                taps = {name: _Tap(name, linears[name], act_bits, act_clip, kept) for name in layer.linears}
                run = _LayerRun(model, layer, taps, extra, kept)
                with run:
                    for names in _steps(layer):
                        hessian = run.hessian(hidden, names)
                        factor = factor_hessian(hessian, damping, f"{where}: layer {names[0]}")
                        weights = [taps[name].linear.weight for name in names]
                        try:
                            rounded = quantize_rows(weights, factor, bits, group_size, levels, block)
                        except ValueError as error:
                            raise ValueError(f"{where}: layer {names[0]}: {error}") from error
                        for name, packed in zip(names, rounded, strict=True):
                            tap = taps[name]
                            tap.weight = packed.dequantize()
                            rtn = round_to_nearest(tap.linear.weight, bits, group_size, levels)
                            before, after = relative_errors(tap.linear.weight, (rtn, tap.weight), hessian)
                            result[name] = packed
                            result.errors.append(LayerError(name, before, after, factor.damping))
                            if progress is not None:
                                progress(len(result), len(linears), name)
                    run.forward(hidden)
                if cache is not None:
                    cache.check_asked(f"{where}: layer {layer.name}")
    finally:
        model.train(training)
    for name, packed in result.items():
        linear = linears[name]
        if simulate:
            with torch.no_grad():
                linear.weight.copy_(packed.dequantize())
            continue
        rotation = getattr(linear, "input_rotation", None)
        module = QuantLinear.from_packed(packed, linear.bias, act_bits, act_clip, rotation).train(linear.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return result


def _steps(layer: Layer) -> tuple[tuple[str, ...], ...]:
    """The linear layers of a decoder layer in the order of computation; those of a step share their input."""
    return (layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,)


class _Captured(Exception):
    """A step's input has been taken; the rest of the forward pass is not needed."""


class _Hessian:
    def __init__(self, features: int, device: torch.device) -> None:
        self.sum = torch.zeros((features, features), dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        add_gram(self.sum, x)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        upper = self.sum.triu().div_(self.tokens)
        return upper + upper.triu(1).T


class _Tap:
    """Stands in for the forward of a linear layer while its decoder layer is quantized: as at run time, in float."""

    def __init__(self, name: str, linear: nn.Module, act_bits: int, act_clip: float, kept: KeptOutputs) -> None:
        assert isinstance(linear, nn.Linear)
        self.name = name
        self.kept = kept
        self.linear = linear
        self.act_bits = act_bits
        self.act_clip = act_clip
        self.weight: Tensor | None = None
        self.hessian: _Hessian | None = None

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor | None = self.kept.get(self.name)
        if output is not None:
            return output
        rotation = getattr(self.linear, "input_rotation", None)
        if rotation is not None:
            x = rotation(x)
        if self.act_bits != 16:
            try:
                q, scale = quantize_activation(x, self.act_bits, self.act_clip)
            except ValueError as error:
                raise ValueError(f"gptq_quantize_model: input of layer {self.name}: {error}") from error
            x = (q.to(torch.float32) * scale[..., None]).to(x.dtype)
        if self.hessian is not None:
            self.hessian.add(x)
            raise _Captured
        assert self.weight is not None
        output = functional.linear(x, self.weight.to(x.dtype), self.linear.bias)
        self.kept.keep(self.name, output)
        return output


class _KeptAttention:
    """Stands in for the forward of an attention: the output of a batch is kept, and those of its linear layers are not
    needed any more."""

    def __init__(self, name: str, attention: nn.Module, inside: Sequence[str], kept: KeptOutputs) -> None:
        self.module = attention
        self._name = name
        self._forward = attention.forward
        self._inside = inside
        self._kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._kept.get(self._name)
        if output is None:
            output = self._forward(*args, **kwargs)
            self._kept.drop(self._inside)
            self._kept.keep(self._name, output)
        return output


class _LayerRun:
    """One decoder layer with taps in place of its linear layers, for as long as the ``with`` block lasts."""

    def __init__(
        self, model: nn.Module, layer: Layer, taps: dict[str, _Tap], keywords: dict[str, Any], kept: KeptOutputs
    ) -> None:
        self._layer = model.get_submodule(layer.name)
        self._taps = taps
        self._keywords = keywords
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._kept = kept
        self._attention = None
        name = layer.o.rpartition(".")[0]
        if name != layer.name:
            inside = (layer.q, layer.k, layer.v, layer.o)
            self._attention = _KeptAttention(name, model.get_submodule(name), inside, kept)

    def __enter__(self) -> None:
        stand_ins: list[tuple[nn.Module, Any]] = [(tap.linear, tap) for tap in self._taps.values()]
        if self._attention is not None:
            stand_ins.append((self._attention.module, self._attention))
        for module, stand_in in stand_ins:
            # A forward of its own is one that hooks have installed, accelerate's for example.
            self._forwards.append((module, vars(module).get("forward")))
            module.forward = stand_in

    def __exit__(self, *_: object) -> None:
        for module, forward in self._forwards:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._forwards.clear()

    def hessian(self, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """Mean of x x^T over the inputs of layers that share theirs, float32 [K, K]."""
        linear = self._taps[names[0]].linear
        hessian = _Hessian(linear.in_features, hidden.device)
        for name in names:
            self._taps[name].hessian = hessian
        for batch, part in enumerate(self._batches(hidden)):
            self._kept.batch = batch
            try:
                run_layer(self._layer, part, self._keywords)
            except _Captured:
                pass
        for name in names:
            self._taps[name].hessian = None
        return hessian.mean()

    def forward(self, hidden: Tensor) -> None:
        """Replace the hidden states by the layer's output."""
        for batch, part in enumerate(self._batches(hidden)):
            self._kept.batch = batch
            part.copy_(run_layer(self._layer, part, self._keywords))

    @staticmethod
    def _batches(hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(max(1, _BATCH_TOKENS // hidden.shape[1]))
