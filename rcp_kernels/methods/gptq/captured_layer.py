"""A decoder layer whose linear layers are quantized one step after the other, and the outputs kept between passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...models import Layer
from ...ops.quantize_activation import quantize_activation
from ..layers import replaced_forward, run_layer
from .quantize_weight import add_gram

__all__ = ["BATCH_TOKENS", "CapturedLayer", "CapturedLinear", "KeptOutputs", "captured_layer"]

BATCH_TOKENS = 2048
"""Tokens of the text that go through a layer at once."""


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


class CapturedLinear:
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
def captured_layer(
    model: nn.Module,
    layer: Layer,
    linears: dict[str, nn.Linear],
    keywords: dict[str, Any],
    act_bits: int,
    act_clip: float,
    device: torch.device,
    kept_bytes: int,
) -> Iterator[CapturedLayer]:
    """A decoder layer whose linear layers and attention have replaced forwards inside the ``with`` block.

    Args:
        model: its other parameters lie on ``device`` already.
        layer: the names.
        linears: by full name. Their weights may lie anywhere.
        keywords: of the layer, on ``device``.
        act_bits, act_clip: of the inputs of the linear layers.
        device: where the layer runs.
        kept_bytes: limit of the outputs that are kept between passes over the text. Others are computed again.
    """
    kept = KeptOutputs(kept_bytes)
    captured = {name: CapturedLinear(name, linears[name], act_bits, act_clip, kept) for name in layer.linears}
    with contextlib.ExitStack() as stack:
        for each in captured.values():
            stack.enter_context(replaced_forward(each.linear, each))
        name = layer.o.rpartition(".")[0]
        if name != layer.name:
            attention = model.get_submodule(name)
            inside = (layer.q, layer.k, layer.v, layer.o)
            stack.enter_context(replaced_forward(attention, _KeptAttention(name, attention, inside, kept)))
        yield CapturedLayer(model.get_submodule(layer.name), captured, keywords, kept, device)


@dataclass(frozen=True)
class CapturedLayer:
    """A decoder layer inside :func:`captured_layer`. ``linears`` are by full name."""

    module: nn.Module
    linears: dict[str, CapturedLinear]
    keywords: dict[str, Any]
    kept: KeptOutputs
    device: torch.device

    def hessian(self, hidden: Tensor, names: Sequence[str]) -> Tensor:
        """Mean of x x^T over the inputs of linear layers that share their input, float32 [K, K]."""
        features = self.linears[names[0]].linear.in_features
        total = torch.zeros((features, features), dtype=torch.float32, device=self.device)
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
                run_layer(self.module, part.to(self.device), self.keywords)
        for name in names:
            self.linears[name].collect = None
        total.triu_().div_(tokens)
        return total + total.triu(1).T

    def forward(self, hidden: Tensor) -> None:
        """Replace the hidden states by the layer's output."""
        for part in self._batches(hidden):
            part.copy_(run_layer(self.module, part.to(self.device), self.keywords))

    def _batches(self, hidden: Tensor) -> Iterator[Tensor]:
        for batch, part in enumerate(hidden.split(max(1, BATCH_TOKENS // hidden.shape[1]))):
            self.kept.batch = batch
            yield part
