"""Replace the linear layers of a model by packed layers, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.lazy import values_of
from ..ops.nearest_codes import CHUNK_WEIGHTS
from ..ops.quantize_weight import quantize_weight
from .quant_linear import QuantLinear
from .report import StorageReport, storage_report
from .rotated_linear import RotatedLinear

__all__ = ["LayerReport", "QuantizationReport", "device_bytes", "quantize_model"]

# The output head decides the quality of every token. A head that is tied to the embedding is stored in 16 bits anyway.
_DEFAULT_SKIP = ("lm_head",)
# In eval mode the fast path of the encoder layer reads linear1.weight and linear2.weight. The decoder layer is kept
# too.
_READERS_OF_WEIGHTS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class LayerReport:
    """A replaced layer: its dotted name, its shape, and the bytes of its weight before and after."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizationReport:
    """The result of :func:`quantize_model`; ``print(report)`` shows a table.

    Bytes are those of the replaced weights as stored. Biases and the rest of the model do not change.

    Attributes:
        layers: the replaced layers, in the order of the model. A layer with several names is listed once.
        kept: dotted names of the linear layers that stay in floating point, because of skip or because a replacement
            would break them.
        storage: of the whole model. It names and counts every parameter in floating point, also those outside of
            nn.Linear (the fused experts of a mixture).
    """

    layers: list[LayerReport]
    kept: list[str]
    storage: StorageReport

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def weights(self) -> int:
        """Number of weights in the replaced layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each replaced weight: codes, tables, scales and padding."""
        return 8 * self.bytes_after / self.weights

    def __str__(self) -> str:
        def sizes(x: LayerReport | QuantizationReport) -> list[str]:
            return [f"{x.bits_per_weight:.3f}", f"{x.bytes_before / 1e6:.2f}", f"{x.bytes_after / 1e6:.2f}"]

        rows = [["layer", "out x in", "bits", "group", "bits/weight", "MB before", "MB after"]]
        for x in self.layers:
            rows.append([x.name, f"{x.out_features} x {x.in_features}", str(x.bits), str(x.group_size), *sizes(x)])
        rows.append([f"{len(self.layers)} layers", "", "", "", *sizes(self)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for edge in (1, -1):
            rows.insert(edge, ["-" * width for width in widths])
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        if self.kept:
            lines.append(f"kept in floating point: {', '.join(self.kept)}")
        lines.append(str(self.storage))
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    bits: int = 2,
    group_size: int = 128,
    act_bits: int = 4,
    levels: str | Tensor = "kmeans",
    skip: Iterable[str] = _DEFAULT_SKIP,
    act_clip: float = 1.0,
    progress: Callable[[int, int, str], None] | None = None,
    device: str | torch.device | None = None,
) -> QuantizationReport:
    """Replace every ``nn.Linear`` of a model by a :class:`QuantLinear`, in place.

    The QuantLinear of a :class:`RotatedLinear` gets its ``input_rotation``; the weight has that rotation already.
    Layers that a replacement would break are kept and listed in the report:

    - other subclasses of ``nn.Linear`` (parametrizations make one);
    - layers with forward or backward hooks, as the older ``weight_norm`` and pruning set, or with a ``forward`` in the
      instance;
    - layers directly inside an ``nn.TransformerEncoderLayer``, which reads their weights in eval mode, or an
      ``nn.TransformerDecoderLayer``.

    Layers are replaced after all of them have been quantized: after an error the model has not changed.

    Args:
        model: any module that contains linear layers. A module with several names is replaced under all of them.
        bits, group_size, levels: as :func:`rcp_kernels.quantize_weight`, for every layer.
        act_bits: 4, 8 or 16.
        skip: modules to keep in floating point, with everything inside them: the last component of a name ("lm_head")
            or a full dotted name ("model.layers.0.mlp").
        act_clip: in (0, 1].
        progress: called after each layer with the number of finished layers, their total, and the name of the layer.
        device: where weights are quantized, one after the other. None for the device of each layer. Packed layers are
            on the device of their linear layers.

    Returns:
        The replaced layers and their sizes.

    Raises:
        TypeError: model is not a module, or skip is not a collection of names.
        ValueError: no layer to replace, a skip entry without a match (the default "lm_head" may be absent), or a layer
            that cannot be quantized; the message names it.
    """
    targets, kept = _targets(model, skip)
    replacements: list[QuantLinear] = []
    layers: list[LayerReport] = []
    for done, (linear, names) in enumerate(targets, start=1):
        try:
            home = "cpu" if linear.weight.is_meta else linear.weight.device
            weight = quantize_weight(values_of(linear.weight, device), bits, group_size, levels).to(home)
            rotation = linear.input_rotation if isinstance(linear, RotatedLinear) else None
            module = QuantLinear.from_packed(weight, linear.bias, act_bits, act_clip, rotation).train(linear.training)
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize_model: layer {names[0]}: {error}") from error
        replacements.append(module)
        rows, columns, *_ = weight.geometry
        sizes = (weight.bits_per_weight, linear.weight.nbytes, weight.nbytes)
        layers.append(LayerReport(names[0], columns, rows, bits, group_size, *sizes))
        if progress is not None:
            progress(done, len(targets), names[0])
    for (_, names), module in zip(targets, replacements, strict=True):
        for name in names:
            model.set_submodule(name, module)
    return QuantizationReport(layers, kept, storage_report(model))


def device_bytes(weights: int, levels: str = "kmeans") -> int:
    """Peak bytes of :func:`quantize_model` on its device, if the model lies elsewhere.

    Args:
        weights: of the largest layer.
        levels: as :func:`rcp_kernels.quantize_weight`. The figures are for tables of 16 levels a group of 128.
    """
    chosen = {"uniform": 12, "clip": 42, "kmeans": 45}[levels]
    # The check for NaN takes 7 bytes a weight beside the 4 of the weight itself. Levels are chosen in parts.
    return 4 * weights + max(7 * weights, chosen * min(weights, CHUNK_WEIGHTS))


def _targets(model: nn.Module, skip: Iterable[str]) -> tuple[list[tuple[nn.Linear, list[str]]], list[str]]:
    """The layers to replace, each with all of its names, and the names of the linear layers to keep."""
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        found, remedy = (f"the string {skip!r}", f"({skip!r},)") if isinstance(skip, str) else (repr(skip), "()")
        raise TypeError(f"quantize_model: skip must be a collection of names, got {found}; pass {remedy}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"quantize_model: model must be an nn.Module, got {type(model).__name__}; for a tensor use quantize_weight"
        )
    if type(model) is nn.Linear:
        raise ValueError(
            "quantize_model: model must contain linear layers, got an nn.Linear, which cannot be replaced in place; "
            "use QuantLinear.from_linear(model)"
        )
    skip = tuple(skip)
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = {name for name in modules if name and (name in skip or name.rpartition(".")[2] in skip)}
    matched = skipped | {name.rpartition(".")[2] for name in skipped}
    unmatched = [entry for entry in skip if entry not in matched and entry not in _DEFAULT_SKIP]
    if unmatched:
        raise ValueError(
            f"quantize_model: every entry of skip must name a module, by its last component or in full, got "
            f"{unmatched} without a match; look at model.named_modules()"
        )
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    # A module that is skipped under one name is kept under all of its names.
    kept = {
        id(module)
        for name, module in linears.items()
        if _inside(name, skipped)
        or is_more_than_linear(module)
        or isinstance(modules[name.rpartition(".")[0]], _READERS_OF_WEIGHTS)
    }
    targets: dict[int, tuple[nn.Linear, list[str]]] = {}
    for name, module in linears.items():
        if id(module) not in kept:
            targets.setdefault(id(module), (module, []))[1].append(name)
    if not targets:
        raise ValueError(_nothing_to_replace(model, list(linears)))
    return list(targets.values()), [name for name, module in linears.items() if id(module) in kept]


def count_hooks(module: nn.Module) -> int:
    """The number of forward and backward hooks of a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return sum(map(len, hooks))


def is_more_than_linear(module: nn.Module) -> bool:
    """Whether a module does more than a QuantLinear of its weight and bias would do."""
    return type(module) not in (nn.Linear, RotatedLinear) or count_hooks(module) > 0 or "forward" in vars(module)


def _nothing_to_replace(model: nn.Module, linears: list[str]) -> str:
    rule = f"quantize_model: model must contain an nn.Linear to replace, got a {type(model).__name__} with"
    packed = sum(isinstance(module, QuantLinear) for module in model.modules())
    if packed:
        found = f"{len(linears)} linear layers to be kept" if linears else "none"
        return f"{rule} {found}, but {packed} QuantLinear: it is quantized already; start from the floating point model"
    if linears:
        return (
            f"{rule} {len(linears)} linear layers, all of them to be kept ({linears[0]}, for one): named in skip, of a "
            f"subclass, with hooks, or in torch's transformer layers; check skip and the model"
        )
    return f"{rule} none; pass the module with the linear layers (convolutions and other layers are not replaced)"


def _inside(name: str, modules: set[str]) -> bool:
    """Whether ``name`` is one of ``modules`` or lies below one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))
