"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) of a language model, layer by layer, on inputs of quantized layers.

docs/gptq.md has the formulas and names the choices that are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...formats import PackedWeight
from ...models import Layer, describe
from ...nn.quant_linear import QuantLinear
from ...ops.checks import check_clip, check_one_of
from ...ops.quantize_activation import quantize_activation
from ..layers import check_calibration_ids, first_layer_inputs, float_linears, run_layer
from ..student import fake_quantized_kv
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
# Bytes of outputs inside one decoder layer that are kept between passes over the text. Other outputs are computed
# again, which bounds memory for any length of text.
_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class LayerError:
    """Squared error of a layer's output on the calibration tokens, relative to the squared output.

    Attributes:
        name: of the linear layer.
        rtn: error with the same kind of levels and each weight rounded to the nearest.
        gptq: error with error feedback.
        damping: the damping that was used, as a share of the mean of the Hessian's diagonal.
    """

    name: str
    rtn: float
    gptq: float
    damping: float


class QuantizedLayers(dict[str, PackedWeight]):
    """Packed weights by layer name.

    Attributes:
        errors: a :class:`LayerError` for each layer, in the same order.
    """

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
    """Quantize the seven linear layers of every decoder layer in order, each on the inputs that it gets at run time.

    The calibration text runs through the model one decoder layer at a time. Inside a layer there are four steps: q k v,
    o, gate up, down. Every Hessian is therefore computed from the outputs of quantized layers, with quantized
    activations. Beyond the model, memory holds the hidden states of the text, one layer's weights, one Hessian, and at
    most 1 GB of outputs inside the layer.

    Args:
        model: a floating point causal language model that :func:`rcp_kernels.models.describe` knows, rotated by
            :func:`rcp_kernels.methods.rotate.rotate_model` or not. It is changed in place at the very end, so an error
            leaves it unchanged.
        calibration_ids: int64 [sequences, tokens].
        bits, group_size, levels, damping, block: as for :func:`gptq_quantize_weight`.
        act_bits: 4, 8 or 16 bits per activation, during calibration and in the packed layers.
        act_clip: in (0, 1].
        kv_bits: bits of keys and values during calibration; 16 leaves them in float.
        kv_clip: in (0, 1].
        simulate: write the dequantized weights into the linear layers, in their dtype, instead of replacing these by
            packed layers. The model then no longer quantizes activations.
        progress: called after each linear layer with the number of finished layers, their total and the layer's name.

    Returns:
        The packed weights by full name, and each layer's error.

    Raises:
        TypeError: calibration_ids are no integers.
        ValueError: an unknown architecture; bits or a clip outside its set; a layer that is packed already; a parameter
            on the meta device; calibration text shorter than one sequence, or with an id outside the vocabulary. With
            the name of the layer: NaN or Inf, or a Hessian that no damping makes positive definite.
    """
    where = "gptq_quantize_model"
    check_calibration_ids(calibration_ids, where)
    check_one_of(where, "act_bits", act_bits, (4, 8, 16), "16 leaves activations in float")
    check_one_of(where, "kv_bits", kv_bits, (*range(2, 9), 16), "16 leaves keys and values in float")
    check_clip(where, act_clip, "act_clip")
    check_clip(where, kv_clip, "kv_clip")
    architecture = describe(model)
    linears = float_linears(model, architecture, where)
    options = (bits, group_size, levels, damping, block)
    for name, linear in linears.items():
        check_arguments(linear.weight, *options, f"{where}: layer {name}")
    result = QuantizedLayers()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden, keywords = first_layer_inputs(model, calibration_ids)
            for layer, extra in zip(architecture.layers, keywords, strict=True):
                module = model.get_submodule(layer.name)
                with (
                    fake_quantized_kv(module, kv_bits, kv_clip, f"{where}: layer {layer.name}") as cache,
                    _captured_layer(model, layer, linears, {**extra, **cache}, act_bits, act_clip) as captured,
                ):
                    for names in _steps(layer):
                        for packed, error in _quantize_step(captured, hidden, names, *options):
                            result[error.name] = packed
                            result.errors.append(error)
                            if progress is not None:
                                progress(len(result), len(linears), error.name)
                    captured.forward(hidden)
    finally:
        model.train(training)
    for name, packed in result.items():
        linear = linears[name]
        if simulate:
            with torch.no_grad():
                linear.weight.copy_(packed.dequantize())
        else:
            rotation = getattr(linear, "input_rotation", None)
            quantized = QuantLinear.from_packed(packed, linear.bias, act_bits, act_clip, rotation)
            model.set_submodule(name, quantized.train(linear.training))
    return result


def _steps(layer: Layer) -> tuple[tuple[str, ...], ...]:
    """The linear layers of a decoder layer in the order of computation. Those of one step share their input."""
    return (layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,)


def _quantize_step(
    captured: _CapturedLayer,
    hidden: Tensor,
    names: Sequence[str],
    bits: int,
    group_size: int,
    levels: str | Chooser,
    damping: float,
    block: int,
) -> Iterator[tuple[PackedWeight, LayerError]]:
    """Quantize the linear layers of one step. Later passes use the dequantized weights."""
    where = f"gptq_quantize_model: layer {names[0]}"
    hessian = captured.hessian(hidden, names)
    factor = factor_hessian(hessian, damping, where)
    linears = [captured.linears[name] for name in names]
    try:
        packed = quantize_rows([each.linear.weight for each in linears], factor, bits, group_size, levels, block)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for each, weight in zip(linears, packed, strict=True):
        each.quantized = weight.dequantize()
        nearest = round_to_nearest(each.linear.weight, bits, group_size, levels)
        rtn, gptq = relative_errors(each.linear.weight, (nearest, each.quantized), hessian)
        yield weight, LayerError(each.name, rtn, gptq, factor.damping)


class KeptOutputs:
    """Outputs by module name and batch, up to a number of bytes.

    Attributes:
        batch: number of the current batch.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit`` bytes."""
        self.batch = 0
        self._room = limit
        self._kept: dict[tuple[str, int], tuple[Any, Tensor, int]] = {}

    def get(self, name: str) -> Any:
        """The output of a module for the current batch, or None if it was not kept or was changed in place."""
        output, tensor, version = self._kept.get((name, self.batch), (None, None, 0))
        return output if tensor is not None and tensor._version == version else None

    def keep(self, name: str, output: Any) -> None:
        """Keep a module's output: a tensor, or a tuple of a tensor and entries that are small or None."""
        self.drop([name])
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor) and tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[name, self.batch] = output, tensor, tensor._version

    def drop(self, names: Iterable[str]) -> None:
        """Drop the outputs of these modules for the current batch."""
        for name in names:
            entry = self._kept.pop((name, self.batch), None)
            if entry is not None:
                self._room += entry[1].nbytes


class _InputCaptured(Exception):
    """Ends a forward pass whose only purpose is the input of one step."""


class _CapturedLinear:
    """Replaces the forward of a linear layer while its decoder layer is quantized.

    Attributes:
        quantized: the dequantized weight to compute with, once there is one.
        collect: takes the input, rotated and quantized, instead of the computation, or None.
    """

    def __init__(self, name: str, linear: nn.Linear, act_bits: int, act_clip: float, kept: KeptOutputs) -> None:
        self.name = name
        self.linear = linear
        self.quantized: Tensor | None = None
        self.collect: Callable[[Tensor], None] | None = None
        self._act_bits = act_bits
        self._act_clip = act_clip
        self._kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor | None = self._kept.get(self.name)
        if output is not None:
            return output
        rotation = getattr(self.linear, "input_rotation", None)
        if rotation is not None:
            x = rotation(x)
        if self._act_bits != 16:
            try:
                q, scale = quantize_activation(x, self._act_bits, self._act_clip)
            except ValueError as error:
                raise ValueError(f"gptq_quantize_model: input of layer {self.name}: {error}") from error
            x = (q.to(torch.float32) * scale[..., None]).to(x.dtype)
        if self.collect is not None:
            self.collect(x)
            raise _InputCaptured
        assert self.quantized is not None
        output = functional.linear(x, self.quantized.to(x.dtype), self.linear.bias)
        self._kept.keep(self.name, output)
        return output


class _KeptAttention:
    """Replaces the forward of an attention module: keeps its output per batch and drops those of its linear layers."""

    def __init__(self, name: str, attention: nn.Module, linears: Sequence[str], kept: KeptOutputs) -> None:
        self._name = name
        self._forward = attention.forward
        self._linears = linears
        self._kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._kept.get(self._name)
        if output is None:
            output = self._forward(*args, **kwargs)
            self._kept.drop(self._linears)
            self._kept.keep(self._name, output)
        return output


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    installed = vars(module).get("forward")  # by a hook, for example accelerate's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if installed is not None:
            module.forward = installed


@contextlib.contextmanager
def _captured_layer(
    model: nn.Module,
    layer: Layer,
    linears: dict[str, nn.Linear],
    keywords: dict[str, Any],
    act_bits: int,
    act_clip: float,
) -> Iterator[_CapturedLayer]:
    """A decoder layer whose linear layers and attention have replaced forwards inside the ``with`` block."""
    kept = KeptOutputs(_KEPT_BYTES)
    captured = {name: _CapturedLinear(name, linears[name], act_bits, act_clip, kept) for name in layer.linears}
    with contextlib.ExitStack() as stack:
        for each in captured.values():
            stack.enter_context(_replaced_forward(each.linear, each))
        name = layer.o.rpartition(".")[0]
        if name != layer.name:
            attention = model.get_submodule(name)
            inside = (layer.q, layer.k, layer.v, layer.o)
            stack.enter_context(_replaced_forward(attention, _KeptAttention(name, attention, inside, kept)))
        yield _CapturedLayer(model.get_submodule(layer.name), captured, keywords, kept)


@dataclass(frozen=True)
class _CapturedLayer:
    module: nn.Module
    linears: dict[str, _CapturedLinear]
    keywords: dict[str, Any]
    kept: KeptOutputs

    def hessian(self, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """Mean of x x^T over the inputs of linear layers that share their input, float32 [K, K]."""
        features = self.linears[names[0]].linear.in_features
        total = torch.zeros((features, features), dtype=torch.float32, device=hidden.device)
        tokens = 0

        def add(x: Tensor) -> None:
            nonlocal tokens
            x = x.reshape(-1, features).to(torch.float32)
            add_gram(total, x)
            tokens += x.shape[0]

        for name in names:
            self.linears[name].collect = add
        for part in self._batches(hidden):
            with contextlib.suppress(_InputCaptured):
                run_layer(self.module, part, self.keywords)
        for name in names:
            self.linears[name].collect = None
        upper = total.triu().div_(tokens)
        return upper + upper.triu(1).T

    def forward(self, hidden: Tensor) -> None:
        """Replace the hidden states by the layer's output."""
        for part in self._batches(hidden):
            part.copy_(run_layer(self.module, part, self.keywords))

    def _batches(self, hidden: Tensor) -> Iterator[Tensor]:
        for batch, part in enumerate(hidden.split(max(1, _BATCH_TOKENS // hidden.shape[1]))):
            self.kept.batch = batch
            yield part
