"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) of a language model, layer by layer, on inputs of quantized layers.

docs/gptq.md has the formulas and names the choices that are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...formats import PackedWeight
from ...hardware import choose_device
from ...models import Layer, describe
from ...models.lazy import values_of
from ...nn.quant_linear import QuantLinear
from ...ops.checks import check_clip, check_one_of
from ..layers import (
    check_calibration_ids,
    device_of,
    first_layer_inputs,
    float_linears,
    on_device,
    placed,
)
from ..student import fake_quantized_kv
from .captured_layer import CapturedLayer, captured_layer
from .memory import device_bytes
from .quantize_weight import (
    Chooser,
    check_arguments,
    factor_hessian,
    gptq_quantize_weight,
    quantize_rows,
    relative_errors,
    round_to_nearest,
)

__all__ = ["LayerError", "QuantizedLayers", "gptq_quantize_model", "gptq_quantize_weight"]

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
    device: str | torch.device | None = None,
    device_budget: int | None = None,
) -> QuantizedLayers:
    """Quantize the seven linear layers of every decoder layer in order, each on the inputs that it gets at run time.

    The calibration text runs through the model one decoder layer at a time. Inside a layer there are four steps: q k v,
    o, gate up, down. Every Hessian is therefore computed from the outputs of quantized layers, with quantized
    activations. Beyond the model, memory holds the hidden states of the text, one layer's weights, one Hessian, and at
    most 1 GB of outputs inside the layer.

    The model may lie on the CPU and be larger than the device that computes. Then one decoder layer at a time lies on
    the device (:func:`rcp_kernels.methods.gptq.device_bytes`). The embedding and the head stay where they are.

    Args:
        model: a floating point causal language model that :func:`rcp_kernels.models.describe` knows, rotated by
            :func:`rcp_kernels.methods.rotate.rotate_model` or not. It is changed in place at the very end, so an error
            leaves it unchanged.
        calibration_ids: int64 [sequences, tokens], on any device.
        bits, group_size, levels, damping, block: as for :func:`gptq_quantize_weight`.
        act_bits: 4, 8 or 16 bits per activation, during calibration and in the packed layers.
        act_clip: in (0, 1].
        kv_bits: bits of keys and values during calibration; 16 leaves them in float.
        kv_clip: in (0, 1].
        simulate: write the dequantized weights into the linear layers, in their dtype, instead of replacing these by
            packed layers. The model then no longer quantizes activations.
        progress: called after each linear layer with the number of finished layers, their total and the layer's name.
        device: where the layers run. None for the device of the model.
        device_budget: bytes on that device for the hidden states and the kept outputs. Hidden states that do not fit
            stay beside the model. None for the memory that torch counts as free, less the need of a layer. The results
            do not depend on it.

    Returns:
        The packed weights by full name, on the device of the model, and each layer's error.

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
    home = device_of(model)
    device = home if device is None else choose_device(device)
    result = QuantizedLayers()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden, keywords = first_layer_inputs(model, calibration_ids, device)
            kept_bytes = _KEPT_BYTES
            if device != home:
                hidden, room = on_device(hidden, device, device_budget, device_bytes(architecture, *hidden.shape[:2]))
                kept_bytes = min(kept_bytes, room)
            for layer, extra in zip(architecture.layers, keywords, strict=True):
                module = model.get_submodule(layer.name)
                with (
                    placed(module, device, skip={id(linears[name].weight) for name in layer.linears}),
                    fake_quantized_kv(module, kv_bits, kv_clip, f"{where}: layer {layer.name}") as cache,
                    captured_layer(
                        model, layer, linears, {**extra, **cache}, act_bits, act_clip, device, kept_bytes
                    ) as captured,
                ):
                    for names in _steps(layer):
                        for packed, error in _quantize_step(captured, hidden, names, *options):
                            result[error.name] = packed.to(home)
                            result.errors.append(error)
                            if progress is not None:
                                progress(len(result), len(linears), error.name)
                    captured.forward(hidden)
    finally:
        model.train(training)
    for name, packed in result.items():
        linear = linears[name]
        if simulate:
            values = packed.dequantize().to(linear.weight.dtype)
            if linear.weight.is_meta:
                linear.weight = nn.Parameter(values, linear.weight.requires_grad)
            else:
                linear.weight.data.copy_(values)
        else:
            rotation = getattr(linear, "input_rotation", None)
            quantized = QuantLinear.from_packed(packed, linear.bias, act_bits, act_clip, rotation)
            model.set_submodule(name, quantized.train(linear.training))
    return result


def _steps(layer: Layer) -> tuple[tuple[str, ...], ...]:
    """The linear layers of a decoder layer in the order of computation. Those of one step share their input."""
    return (layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,)


def _quantize_step(
    captured: CapturedLayer,
    hidden: Tensor,
    names: Sequence[str],
    bits: int,
    group_size: int,
    levels: str | Chooser,
    damping: float,
    block: int,
) -> Iterator[tuple[PackedWeight, LayerError]]:
    """Quantize the linear layers of one step. Later passes use the dequantized weights.

    The original weights lie on the device for this step only.
    """
    where = f"gptq_quantize_model: layer {names[0]}"
    hessian = captured.hessian(hidden, names)
    factor = factor_hessian(hessian, damping, where)
    linears = [captured.linears[name] for name in names]
    weights = [values_of(each.linear.weight, captured.device) for each in linears]
    try:
        packed = quantize_rows(weights, factor, bits, group_size, levels, block)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    for each, weight, quantized in zip(linears, weights, packed, strict=True):
        each.quantized = quantized.dequantize()
        nearest = round_to_nearest(weight, bits, group_size, levels)
        rtn, gptq = relative_errors(weight, (nearest, each.quantized), hessian)
        yield quantized, LayerError(each.name, rtn, gptq, factor.damping)
