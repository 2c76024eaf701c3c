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

from ..formats import PackedWeight
from ..models import Layer, describe
from ..models.hf import cache_argument
from ..nn.quant_linear import QuantLinear
from ..ops.quantize_activation import quantize_activation
from .calibration import check_calibration_ids, check_vocabulary, first_layer_inputs, float_linears, run_layer
from .gptq_weight import (
    Chooser,
    check_arguments,
    factor_hessian,
    gptq_quantize_weight,
    quantize_rows,
    relative_error,
    round_to_nearest,
)
from .student import FakeQuantKV

__all__ = ["LayerError", "QuantizedLayers", "gptq_quantize_model", "gptq_quantize_weight"]

_BATCH_TOKENS = 2048


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
    alike. Beyond the model, memory holds the hidden states of the text, one layer's weights and one Hessian.

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
                taps = {name: _Tap(name, linears[name], act_bits, act_clip) for name in layer.linears}
                run = _LayerRun(module, taps, extra)
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
                            before, after = (relative_error(tap.linear.weight, w, hessian) for w in (rtn, tap.weight))
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
        self.sum.addmm_(x.T, x)
        self.tokens += x.shape[0]


class _Tap:
    """Stands in for the forward of a linear layer while its decoder layer is quantized: as at run time, in float."""

    def __init__(self, name: str, linear: nn.Module, act_bits: int, act_clip: float) -> None:
        assert isinstance(linear, nn.Linear)
        self.name = name
        self.linear = linear
        self.act_bits = act_bits
        self.act_clip = act_clip
        self.weight: Tensor | None = None
        self.hessian: _Hessian | None = None

    def __call__(self, x: Tensor) -> Tensor:
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
        return functional.linear(x, self.weight.to(x.dtype), self.linear.bias)


class _LayerRun:
    """One decoder layer with taps in place of its linear layers, for as long as the ``with`` block lasts."""

    def __init__(self, layer: nn.Module, taps: dict[str, _Tap], keywords: dict[str, Any]) -> None:
        self._layer = layer
        self._taps = taps
        self._keywords = keywords
        self._forwards: dict[str, Any] = {}

    def __enter__(self) -> None:
        for name, tap in self._taps.items():
            if "forward" in vars(tap.linear):  # of accelerate's hooks, for one
                self._forwards[name] = tap.linear.forward
            tap.linear.forward = tap  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for name, tap in self._taps.items():
            del tap.linear.forward
            if name in self._forwards:
                tap.linear.forward = self._forwards[name]  # type: ignore[method-assign]

    def hessian(self, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """Mean of x x^T over the inputs of layers that share theirs, float32 [K, K]."""
        linear = self._taps[names[0]].linear
        hessian = _Hessian(linear.in_features, hidden.device)
        for name in names:
            self._taps[name].hessian = hessian
        for part in self._batches(hidden):
            try:
                run_layer(self._layer, part, self._keywords)
            except _Captured:
                pass
        for name in names:
            self._taps[name].hessian = None
        return hessian.sum.div_(hessian.tokens)

    def forward(self, hidden: Tensor) -> None:
        """Replace the hidden states by the layer's output."""
        for part in self._batches(hidden):
            part.copy_(run_layer(self._layer, part, self._keywords))

    @staticmethod
    def _batches(hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden.split(max(1, _BATCH_TOKENS // hidden.shape[1]))
