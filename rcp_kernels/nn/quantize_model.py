"""Swapping the linear layers of a model for packed ones, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..ops.quantize_weight import quantize_weight
from .quant_linear import QuantLinear
from .report import StorageReport, storage_report
from .rotated_linear import RotatedLinear

__all__ = ["LayerReport", "QuantizationReport", "quantize_model"]

# The output head sets the quality of every token and, tied to the embedding, is stored in 16 bits anyway.
_DEFAULT_SKIP = ("lm_head",)
# The fast path of the encoder's reads linear1.weight and linear2.weight in eval mode; the decoder's is treated alike.
_READERS_OF_WEIGHTS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass(frozen=True)
class LayerReport:
    """One swapped layer: its dotted name, its shape, and what its weight takes before and after, in bytes."""

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
    """What :func:`quantize_model` did; ``print(report)`` shows a table.

    Bytes are those of the swapped weights as stored; biases and the rest of the model do not change.

    Attributes:
        layers: the swapped layers, in the order of the model; one that the model uses under several names is here once.
        kept: dotted names of the linear layers left in floating point, by skip or for what would be lost or break.
        storage: what the whole model stores now; names and counts every parameter in floating point, those too that
            are no nn.Linear (the fused experts of a mixture).
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
        """Number of weights in the swapped layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each swapped weight: codes, tables, scales and padding."""
        return 8 * self.bytes_after / self.weights

    def __str__(self) -> str:
        header = ("layer", "out x in", "bits", "group", "bits/weight", "MB before", "MB after")
        rows = [
            (
                layer.name,
                f"{layer.out_features} x {layer.in_features}",
                str(layer.bits),
                str(layer.group_size),
                f"{layer.bits_per_weight:.3f}",
                f"{layer.bytes_before / 1e6:.2f}",
                f"{layer.bytes_after / 1e6:.2f}",
            )
            for layer in self.layers
        ]
        total = (
            f"{len(self.layers)} layers",
            "",
            "",
            "",
            f"{self.bits_per_weight:.3f}",
            f"{self.bytes_before / 1e6:.2f}",
            f"{self.bytes_after / 1e6:.2f}",
        )
        widths = [max(len(row[i]) for row in (header, *rows, total)) for i in range(len(header))]
        rule = "  ".join("-" * width for width in widths)
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in (header, *rows, total)
        ]
        lines[1:1] = [rule]
        lines[-1:-1] = [rule]
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
) -> QuantizationReport:
    """Replace every ``nn.Linear`` of a model by a :class:`QuantLinear`, in place.

    A :class:`RotatedLinear` hands its ``input_rotation`` on: its weight has the rotation in it, and is quantized as it
    is. Left alone, and listed in the report as kept, are the layers that a replacement would break or take something
    from: other subclasses of ``nn.Linear`` (parametrizations make one); layers with forward or backward hooks, the
    older ``weight_norm`` and pruning among them, or with a ``forward`` of their own; and those directly inside an
    ``nn.TransformerEncoderLayer``, which reads their weights itself in eval mode, or an ``nn.TransformerDecoderLayer``.
    Nothing is replaced until every layer has been quantized: an error leaves the model as it was.

    Args:
        model: any module that contains linear layers; a module used under several names is replaced once, everywhere.
        bits, group_size, levels: as :func:`rcp_kernels.quantize_weight`, for every layer.
        act_bits: 4, 8 or 16.
        skip: modules to leave in floating point, with all that is inside them: the last component of a name ("lm_head")
            or a full dotted name ("model.layers.0.mlp").
        act_clip: in (0, 1].
        progress: called after each layer with the layers done, their total and the name of this one.

    Returns:
        What was replaced and what it takes.

    Raises:
        TypeError: model is not a module, or skip is a string or no collection.
        ValueError: no layer to replace, a skip entry without a match (the default "lm_head" may be absent), or a layer
            that cannot be quantized, named.
    """
    if isinstance(skip, str):
        raise TypeError(
            f"quantize_model: skip must be a collection of names, got the string {skip!r}; pass ({skip!r},)"
        )
    if not isinstance(skip, Iterable):
        raise TypeError(
            f"quantize_model: skip must be a collection of names, got {skip!r}; pass () to leave no layer out"
        )
    skip = tuple(skip)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"quantize_model: model must be an nn.Module, got {type(model).__name__}; for a tensor use quantize_weight"
        )
    if type(model) is nn.Linear:
        raise ValueError(
            "quantize_model: model must contain linear layers, got an nn.Linear, which cannot be replaced in place; "
            "use QuantLinear.from_linear(model)"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = {name for name in modules if name and (name in skip or name.rpartition(".")[2] in skip)}
    matched = skipped | {name.rpartition(".")[2] for name in skipped}
    unmatched = [entry for entry in skip if entry not in matched and entry not in _DEFAULT_SKIP]
    if unmatched:
        raise ValueError(
            f"quantize_model: every entry of skip must name a module, by its last component or in full, got "
            f"{unmatched} without a match; look at model.named_modules()"
        )
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    # A module that is skipped under one name is kept under all of them.
    kept = {
        id(modules[name])
        for name in linears
        if _inside(name, skipped)
        or _is_more_than_linear(modules[name])
        or isinstance(modules[name.rpartition(".")[0]], _READERS_OF_WEIGHTS)
    }
    targets: dict[int, list[str]] = {}
    for name in linears:
        if id(modules[name]) not in kept:
            targets.setdefault(id(modules[name]), []).append(name)
    if not targets:
        raise ValueError(_nothing_to_replace(model, linears))
    replacements: list[QuantLinear] = []
    layers: list[LayerReport] = []
    for done, names in enumerate(targets.values(), start=1):
        linear = modules[names[0]]
        assert isinstance(linear, nn.Linear)
        try:
            weight = quantize_weight(linear.weight, bits, group_size, levels)
            rotation = linear.input_rotation if isinstance(linear, RotatedLinear) else None
            module = QuantLinear.from_packed(weight, linear.bias, act_bits, act_clip, rotation).train(linear.training)
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize_model: layer {names[0]}: {error}") from error
        replacements.append(module)
        layers.append(
            LayerReport(
                name=names[0],
                in_features=weight.in_features,
                out_features=weight.out_features,
                bits=bits,
                group_size=group_size,
                bits_per_weight=weight.bits_per_weight,
                bytes_before=linear.weight.nbytes,
                bytes_after=weight.nbytes,
            )
        )
        if progress is not None:
            progress(done, len(targets), names[0])
    for names, module in zip(targets.values(), replacements, strict=True):
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    kept_names = [name for name in linears if id(modules[name]) in kept]
    return QuantizationReport(layers, kept_names, storage_report(model))


def _is_more_than_linear(module: nn.Module) -> bool:
    """Whether an nn.Linear does something that a QuantLinear made of its weight and bias would not."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) not in (nn.Linear, RotatedLinear) or any(hooks) or "forward" in vars(module)


def _nothing_to_replace(model: nn.Module, linears: list[str]) -> str:
    rule = f"quantize_model: model must contain an nn.Linear to replace, got a {type(model).__name__} with"
    packed = sum(isinstance(module, QuantLinear) for module in model.modules())
    if packed:
        found = f"{len(linears)} linear layers to be kept" if linears else "none"
        return f"{rule} {found}, but {packed} QuantLinear: it is quantized already; start from the floating point model"
    if linears:
        return (
            f"{rule} {len(linears)} linear layers, all of them to be kept ({linears[0]}, for one): named in skip, of a "
            f"subclass, with hooks, or in a transformer layer of torch's; check skip and the model"
        )
    return f"{rule} none; pass the module that holds the linear layers (others, such as convolutions, are not replaced)"


def _inside(name: str, modules: set[str]) -> bool:
    """Whether ``name`` is one of ``modules`` or lies below one."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))
