"""Running a language model one decoder layer at a time, for methods that quantize layer by layer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..hardware import to_device_of
from ..models import Architecture, describe
from ..models.lazy import has_values, values_of
from ..nn.quant_linear import type_of

__all__ = [
    "Diverged",
    "check_calibration_ids",
    "check_vocabulary",
    "device_of",
    "first_layer_inputs",
    "float_linears",
    "on_device",
    "placed",
    "replaced_forward",
    "run_layer",
]


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
        if not has_values(parameter):
            raise ValueError(
                f"{where}: {name} must have values, got a parameter on the meta device, where accelerate keeps "
                f"offloaded parameters; load the whole model into memory, without offloading"
            )
    return linears  # type: ignore[return-value]


def device_of(model: nn.Module) -> torch.device:
    """The device of a language model: that of its embedding."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight.device


def on_device(
    hidden: Tensor, device: torch.device, budget: int | None, needed: int, copies: int = 1
) -> tuple[Tensor, int]:
    """Hidden states on a device if a budget allows it.

    Args:
        hidden: any shape, on any device.
        device: where the layers run.
        budget: bytes on the device for activations between layers. None for 9/10 of the memory that is free there, less
            ``needed``, and for 0 where torch cannot tell the free memory.
        needed: bytes that the layers take on the device.
        copies: tensors like ``hidden`` that have to fit together.

    Returns:
        The hidden states, and the bytes of the budget that are left.
    """
    if budget is None:
        ask = None if device.type == "cpu" else getattr(torch.get_device_module(device), "mem_get_info", None)
        budget = 0 if ask is None else max(0, ask(device)[0] * 9 // 10 - needed)
    size = copies * hidden.nbytes
    return (hidden, budget) if size > budget else (hidden.to(device), budget - size)


@contextlib.contextmanager
def placed(module: nn.Module, device: torch.device, skip: Collection[int] = ()) -> Iterator[None]:
    """Put a module on a device inside the ``with`` block. Its own parameters and buffers come back unchanged.

    Changes that are made on another device are therefore lost.

    Args:
        module: float. Parameters on the meta device are read from their source.
        device: where the module runs.
        skip: ``id`` of parameters that stay where they are.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for inner in module.modules():
            tables: tuple[dict[str, Any], ...] = inner._parameters, inner._buffers
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or tensor.device == device or id(tensor) in skip:
                        continue
                    moved = values_of(tensor, device)
                    if isinstance(tensor, nn.Parameter):
                        moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
                    kept.append((table, name, tensor))
                    table[name] = moved
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the ``forward`` of a module inside the ``with`` block."""
    installed = vars(module).get("forward")  # by a hook, for example accelerate's
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if installed is not None:
            module.forward = installed


@torch.no_grad()
def first_layer_inputs(
    model: nn.Module, ids: Tensor, device: torch.device | None = None
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The input of the first decoder layer, and the other arguments of each layer.

    The other arguments (attention mask, position embeddings, ...) depend only on the length of the sequences. One pass
    of the first sequence records them. Their batch dimension is 1, so they serve any batch. The decoder layers do not
    run, so their weights may lie anywhere.

    Args:
        model: a causal language model that :func:`rcp_kernels.models.describe` knows, in eval mode.
        ids: int64 [n, seq] on any device, full sequences without padding.
        device: of the other arguments. None for the model's.

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

    def recorder(module: nn.Module) -> Callable[..., Tensor]:
        names = list(inspect.signature(module.forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            call = {**dict(zip(names, args, strict=False)), **kwargs}
            x = call.pop(names[0])
            if module is layers[0]:
                hidden.append(x)
            if len(keywords) < len(layers):
                keywords.append(call)
            if len(keywords) == len(layers):
                raise _Stop
            # Where a layer returns a tuple, the model takes the first row of this. No argument depends on it.
            return hidden[0]

        return forward

    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, recorder(layer)))
        for row in ids.split(1):
            with contextlib.suppress(_Stop):
                model(input_ids=to_device_of(model, row), use_cache=False)
    moved: dict[int, Tensor] = {}
    device = device_of(model) if device is None else device
    return torch.cat(hidden), [_moved(call, device, moved) for call in keywords]


def _moved(value: Any, device: torch.device, seen: dict[int, Tensor]) -> Any:
    """Arguments of a layer on a device. ``seen`` has the tensors that were moved: layers share them."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.to(device)
        return seen[id(value)]
    if isinstance(value, dict):
        return {key: _moved(each, device, seen) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(each, device, seen) for each in value)
    return value


def run_layer(layer: Callable[..., Any], hidden: Tensor, keywords: dict[str, Any]) -> Tensor:
    """Apply one decoder layer to hidden states: [n, seq, hidden_size] -> the same shape. Differentiable.

    Args:
        layer: a decoder layer, or a function with the same arguments.
        hidden: [n, seq, hidden_size], any n.
        keywords: the layer's, from :func:`first_layer_inputs` with sequences of the same length.
    """
    output = layer(hidden, **keywords)
    return output[0] if isinstance(output, tuple) else output
