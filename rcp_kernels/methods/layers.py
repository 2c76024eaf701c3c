"""Running a language model one decoder layer at a time, for methods that quantize layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import to_device_of
from ..models import Architecture, describe
from ..nn.quant_linear import type_of

__all__ = ["Diverged", "check_calibration_ids", "check_vocabulary", "first_layer_inputs", "float_linears", "run_layer"]


class Diverged(RuntimeError):
    """A training met a loss that is not finite. The last checkpoint is unchanged."""


class _Stop(Exception):
    """Raised by a hook to end a forward pass early."""


def check_calibration_ids(ids: Tensor, where: str) -> None:
    """Raise TypeError or ValueError unless ``ids`` are integers [sequences, tokens] with at least 2 tokens."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool:
        found = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"{where}: calibration_ids must be an int64 tensor of token ids, got {found}; tokenize the text"
        )
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"{where}: calibration_ids must be [sequences, tokens] with at least one sequence of at least 2 tokens, "
            f"got shape {tuple(ids.shape)}; the calibration text is shorter than one sequence: pass more text or "
            f"shorter sequences"
        )


def check_vocabulary(model: nn.Module, ids: Tensor, where: str) -> None:
    """Raise ValueError if a token id is outside [0, rows of the model's embedding)."""
    size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.numel():
        raise ValueError(
            f"{where}: token ids must be in [0, {size}), the model's vocabulary, got {int(outside[0])}; tokenize the "
            f"text with the model's own tokenizer"
        )


def float_linears(model: nn.Module, architecture: Architecture, where: str) -> dict[str, nn.Linear]:
    """The linear layers of the decoder by full name.

    Raises:
        ValueError: a layer is no ``nn.Linear``, for example because it is packed already, or a parameter of the model
            has no values.
    """
    linears = {name: model.get_submodule(name) for layer in architecture.layers for name in layer.linears}
    for name, module in linears.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{where}: layer {name} must be an nn.Linear, got {type_of(module)}; start from the floating point "
                f"model"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{where}: {name} must have values, got a parameter on the meta device, where accelerate keeps "
                f"offloaded parameters; load the whole model into memory, without offloading"
            )
    return linears  # type: ignore[return-value]


@torch.no_grad()
def first_layer_inputs(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The input of the first decoder layer, and the other arguments of each layer.

    The other arguments (attention mask, position embeddings, ...) depend only on the length of the sequences. One pass
    of the first sequence through all layers records them. Their batch dimension is 1, so they serve any batch.

    Args:
        model: a causal language model that :func:`rcp_kernels.models.describe` knows, in eval mode.
        ids: int64 [n, seq], full sequences without padding.

    Returns:
        hidden [n, seq, hidden_size] in the dtype and on the device of the model, and for each layer a dictionary of
        keyword arguments for :func:`run_layer`.

    Raises:
        ValueError: as describe and :func:`check_vocabulary`.
    """
    architecture = describe(model)
    check_vocabulary(model, ids, "first_layer_inputs")
    layers = [model.get_submodule(layer.name) for layer in architecture.layers]
    hidden: list[Tensor] = []
    keywords: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(module.forward).parameters)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        x = call.pop(names[0])
        if module is layers[0]:
            hidden.append(x)
        if len(keywords) < len(layers):
            keywords.append(call)
        if len(keywords) == len(layers):
            raise _Stop

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        for row in ids.split(1):
            try:
                model(input_ids=to_device_of(model, row), use_cache=False)
            except _Stop:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(hidden), keywords


def run_layer(layer: Callable[..., Any], hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Apply one decoder layer to hidden states: [n, seq, hidden_size] -> the same shape. Differentiable.

    Args:
        layer: a decoder layer, or a function with the same arguments.
        hidden: [n, seq, hidden_size], any n.
        keywords: the layer's, from :func:`first_layer_inputs` with sequences of the same length.
    """
    output = layer(hidden, **keywords)
    return output[0] if isinstance(output, tuple) else output
