"""Sizes of a model as stored: its packed layers, and every parameter in floating point by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ..formats import num_groups, row_bytes
from .quant_linear import QuantLinear

__all__ = ["FloatPart", "StorageReport", "storage_report", "stored_bytes"]

# The text sums up parts below this share of all weights, such as the norms and biases of every layer.
_SMALL = 0.001


class FloatPart(NamedTuple):
    """Parameters that are not packed.

    Attributes:
        name: full name of the parameter.
        kind: "linear layer", "embedding", "vector" (norms, biases), or "not an nn.Linear": a matrix that a packed
            layer cannot replace, such as the fused experts of a mixture.
        weights: their number.
        bytes: their size.
    """

    name: str
    kind: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class StorageReport:
    """The sizes of a model as stored. ``str()`` gives a few lines.

    Attributes:
        layers: number of packed layers.
        packed_weights: number of weights in them.
        packed_bytes: bytes of these weights as stored, without biases.
        parts: the parameters in floating point. A parameter with several names is listed once.
    """

    layers: int
    packed_weights: int
    packed_bytes: int
    parts: tuple[FloatPart, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each packed weight: codes, levels, scales and padding."""
        return 8 * self.packed_bytes / max(1, self.packed_weights)

    @property
    def float_weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def float_share(self) -> float:
        """The share of all weights in floating point."""
        return self.float_weights / max(1, self.float_weights + self.packed_weights)

    @property
    def bytes(self) -> int:
        return self.packed_bytes + sum(part.bytes for part in self.parts)

    def __str__(self) -> str:
        total = self.float_weights + self.packed_weights
        lines = [f"{self.layers} layers packed, {self.bits_per_weight:.3f} bits a weight"]
        large = [part for part in self.parts if part.weights >= _SMALL * total]
        rest = [part for part in self.parts if part.weights < _SMALL * total]
        named: dict[tuple[str, str], tuple[int, int]] = {}
        for part in large:  # one line for all layers of a decoder
            key = (".".join("*" if piece.isdigit() else piece for piece in part.name.split(".")), part.kind)
            weights, size = named.get(key, (0, 0))
            named[key] = (weights + part.weights, size + part.bytes)
        if rest:
            named[f"{len(rest)} small ones", "norms, biases and the like"] = (
                sum(part.weights for part in rest),
                sum(part.bytes for part in rest),
            )
        lines.append(f"in floating point: {self.float_share:.1%} of the weights")
        for (name, kind), (weights, size) in sorted(named.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {name} ({kind}): {weights / 1e6:.2f} M weights, {size / 1e6:.1f} MB")
        return "\n".join(lines)


def stored_bytes(layer: QuantLinear) -> int:
    """Bytes of a layer's weight as stored: codes, levels and scales (docs/format.md)."""
    groups = num_groups(layer.in_features, layer.group_size)
    levels = 1 if layer.kind == "uniform" else 2**layer.bits
    row = row_bytes(layer.in_features, layer.bits, layer.group_size) + groups * (levels + 2)
    return layer.out_features * row + 4  # the tensor scale


def storage_report(model: nn.Module) -> StorageReport:
    """Count the packed weights and the float parameters of a model, with or without packed layers."""
    packed = {id(module): module for module in model.modules() if isinstance(module, QuantLinear)}.values()
    parts: dict[int, FloatPart] = {}  # the first name of a shared parameter
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() < 2:
                kind = "vector"
            elif isinstance(module, nn.Linear):
                kind = "linear layer"
            elif isinstance(module, nn.Embedding):
                kind = "embedding"
            else:
                kind = "not an nn.Linear"
            parts.setdefault(id(parameter), FloatPart(name, kind, parameter.numel(), parameter.nbytes))
    return StorageReport(
        layers=len(packed),
        packed_weights=sum(layer.in_features * layer.out_features for layer in packed),
        packed_bytes=sum(stored_bytes(layer) for layer in packed),
        parts=tuple(parts.values()),
    )
