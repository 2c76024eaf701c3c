"""Rotations of a language model that preserve its function and make it easier to quantize.

R1 to R4 are those of QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2024), as RCP uses them (arXiv
2502.15779). R1 rotates the residual stream and R2 the values of each head; both are fused into weights in float64. R3
rotates queries and keys after RoPE and R4 the input of down; both run online. R1 in blocks of the quantization group,
in sequency order, is GSR (arXiv 2505.03810). docs/rotate.md has the definitions and the costs.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...hardware import choose_device
from ...models import Architecture, describe
from ...models.hf import untie_head
from ...models.lazy import has_values, set_source, source_of
from ...nn.online_rotation import OnlineRotation
from ...nn.quant_linear import type_of
from ...nn.rotated_linear import RotatedLinear, rotate_around, rotate_output, rotate_queries_and_keys
from .plan import KINDS, MATRIX, ROTATIONS, MatrixRotation, Plan, Rotated, make_plan

__all__ = ["ROTATIONS", "Rotated", "apply_structure", "device_bytes", "rotate_model", "rotation_of"]

# Attribute of a rotated model. A second call could not detect R1 and R2 otherwise.
_RECORD = "_rcp_rotated"
# Weights of the embedding or the head that are rotated at once. In float64 one copy of them takes 128 MiB.
_PART_WEIGHTS = 1 << 24


def rotate_model(
    model: nn.Module,
    rotation: str | Tensor = "gsr",
    *,
    group_size: int = 128,
    r2: bool | None = None,
    r3: bool | None = None,
    r4: bool | None = None,
    r4_group_size: int | None = None,
    seed: int = 0,
    untie: bool = False,
    device: str | torch.device | None = None,
) -> Rotated:
    """Rotate a language model in place. Its logits stay the same up to rounding.

    With R1, the gains of the norms before linear layers are folded into these layers and set to one. R1 is fused into
    the embedding, the linear layers and the output head. Every weight is computed in float64 and rounded once. For R4,
    down becomes a :class:`RotatedLinear`; attention gets R3 by :func:`rotate_queries_and_keys`. Some families (gemma2,
    gemma3) have a norm between o or down and the residual stream. No weight can take the gains of such a norm, so R1
    runs online after it instead of in o and down.

    A head that is tied to the embedding stays tied; otherwise a quantized model could take more bytes than its source.
    The shared weight cannot take the gain of the final norm. That norm keeps its gain and works in the original basis,
    ``R norm(R^T x)`` (ours), which costs two fast transforms per token.

    Args:
        model: of a family in :data:`rcp_kernels.models.FAMILIES`, floating point, not rotated.
        rotation: R1. ``"none"``; ``"hadamard"``: all entries, natural order, random signs (QuaRot); ``"walsh"``: all
            entries, sequency order; ``"local_hadamard"`` and ``"gsr"``: groups in natural and in sequency order. Or an
            orthogonal floating point tensor R [hidden_size, hidden_size]: a token x becomes R x, the embedding
            ``embedding @ R^T``.
        group_size: of ``"local_hadamard"`` and ``"gsr"``: the quantization group of the weights.
        r2: rotate the values of each head. R2, R3 and R4 have R1's order of rows. None: if R1 is not ``"none"``.
        r3: rotate queries and keys after RoPE, which helps only if keys are quantized. None: as r2.
        r4: rotate the input of down. None: as r2.
        r4_group_size: entries that R4 mixes. None: group_size if R1 is in groups, else all of them.
        seed: of the random signs of ``"hadamard"``.
        untie: give a tied head its own weight, for engines that cannot run the rotations around the final norm. A
            matrix as R1 always unties.
        device: where weights are rotated, one after the other. None for the device of each weight. The weights stay
            where they are. A weight that is read later is rotated where and when it is read.

    Returns:
        The record from which a checkpoint rebuilds the structure.

    Raises:
        ValueError: an unsupported architecture, a missing module, an unknown rotation, a size without a Hadamard
            matrix, a group that does not divide a size, or a matrix of another shape, not orthogonal, or for a family
            in which R1 runs online. Also a model that is rotated already, has no values, or has NaN or Inf; the message
            names the module.
        TypeError: a layer to rotate is no ``nn.Linear`` of float32, float16 or bfloat16; the message names it. float64
            is allowed if nothing runs online.
    """
    architecture = describe(model)
    matrix = rotation if isinstance(rotation, Tensor) else None
    name = MATRIX if isinstance(rotation, Tensor) else rotation
    if name not in (*ROTATIONS, MATRIX) or (name == MATRIX and matrix is None):
        raise ValueError(
            f"rotate_model: rotation must be one of {ROTATIONS} or a tensor, got {rotation!r}; check the spelling"
        )
    rotates = name != "none"
    grouped = name in KINDS and KINDS[name].grouped
    r4 = rotates if r4 is None else r4
    if r4_group_size is None and grouped:
        r4_group_size = group_size
    head, embed = model.get_submodule(architecture.head), model.get_submodule(architecture.embed)
    # Without a gain in the final norm, the embedding's rotation is all that a shared weight needs.
    shared = rotates and head.weight is embed.weight and _has_gain(model, architecture)
    record = Rotated(
        model_type=architecture.model_type,
        rotation=name,
        group_size=group_size if grouped else None,
        r2=rotates if r2 is None else r2,
        r3=rotates if r3 is None else r3,
        r4=r4,
        r4_group_size=r4_group_size if r4 else None,
        seed=seed,
        untied=shared and (untie or matrix is not None),
        tied=shared and not untie and matrix is None,
    )
    plan = make_plan(record, architecture, matrix)
    _check_layers(model, architecture)
    _check_values(model, architecture, plan, record.tied)
    _fuse(model, architecture, plan, record, None if device is None else choose_device(device))
    _install(model, architecture, plan, record.tied)
    if record.changes_anything:
        setattr(model, _RECORD, record)
    return record


def device_bytes(architecture: Architecture, vocabulary: int, rotation: str = "gsr") -> int:
    """Peak bytes of :func:`rotate_model` on its device, if the model lies elsewhere.

    One weight in float32, and three copies in float64. Random signs need a fourth.

    Args:
        architecture: of the model.
        vocabulary: rows of the embedding, which is rotated in parts.
        rotation: R1.
    """
    embedding = min(_PART_WEIGHTS, vocabulary * architecture.hidden_size)
    weights = max(embedding, *(rows * columns for rows, columns in architecture.shapes.values()))
    return (36 if rotation in KINDS and KINDS[rotation].signs else 28) * weights


def rotation_of(model: nn.Module) -> Rotated | None:
    """The record of :func:`rotate_model` or :func:`apply_structure` for this model, or None."""
    record = getattr(model, _RECORD, None)
    assert record is None or isinstance(record, Rotated)
    return record


def apply_structure(model: nn.Module, record: Rotated) -> None:
    """Give an original model the structure of a rotated one, in place, without changing its weights.

    Unties the output head and installs the online rotations. The model then takes the ``state_dict`` of the rotated
    model. Works on the meta device. Does not make packed layers: if the checkpoint has a packed layer for a
    :class:`RotatedLinear`, make it with ``input_rotation=layer.input_rotation``.

    Raises:
        ValueError: the record is of another model_type, the model is rotated already, or as :func:`describe`.
    """
    architecture = describe(model)
    if architecture.model_type != record.model_type:
        raise ValueError(
            f"apply_structure: the model must be of the record's type {record.model_type!r}, got "
            f"{architecture.model_type!r}; build it from the checkpoint's own config"
        )
    without_matrix = dataclasses.replace(record, rotation="none") if record.rotation == MATRIX else record
    plan = make_plan(without_matrix, architecture)
    _check_layers(model, architecture, values=False)
    if record.untied:
        _untie(model, architecture)
    _install(model, architecture, plan, record.tied)
    setattr(model, _RECORD, record)


def _check_layers(model: nn.Module, architecture: Architecture, values: bool = True) -> None:
    """Raise ValueError or TypeError for a model that cannot be rotated, before anything is changed."""
    if rotation_of(model) is not None:
        raise ValueError(
            f"rotate_model: the model must not be rotated yet, got one with {rotation_of(model)}; load it again"
        )
    a = architecture
    shapes = {getattr(layer, part): shape for layer in a.layers for part, shape in a.shapes.items()}
    for name, (out_features, in_features) in {**shapes, a.head: (None, a.hidden_size)}.items():
        linear = model.get_submodule(name)
        if isinstance(linear, RotatedLinear):
            raise ValueError(f"rotate_model: {name} must not be rotated yet, got one that is; load the model again")
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(
                f"rotate_model: {name} must be a floating point nn.Linear, got {type_of(linear)}; rotate before "
                f"quantizing"
            )
        found = (linear.in_features, linear.out_features)
        if found != (in_features, out_features or linear.out_features):
            raise ValueError(
                f"rotate_model: {name} must have {in_features} input and {out_features} output features by the config, "
                f"got {found[0]} and {found[1]}; load the weights' own config"
            )
        if values and not has_values(linear.weight):
            raise ValueError(f"rotate_model: {name} must have values, got the meta device; load the weights first")


def _check_values(model: nn.Module, architecture: Architecture, plan: Plan, tied: bool) -> None:
    """Refuse NaN and Inf, which a rotation would spread over a layer, and dtypes that online rotations do not take."""
    residual_online = isinstance(plan.residual, OnlineRotation) and any(
        layer.attention_output_norm or layer.mlp_output_norm for layer in architecture.layers
    )
    online = tied or plan.qk is not None or plan.down_input is not None or residual_online
    allowed = (torch.float32, torch.float16, torch.bfloat16) + (() if online else (torch.float64,))
    names = [architecture.embed, architecture.final_norm, architecture.head]
    for layer in architecture.layers:
        norms = layer.attention_norm, layer.mlp_norm, layer.attention_output_norm, layer.mlp_output_norm
        names += [*layer.linears, *(name for name in norms if name is not None)]
    for name in names:
        for part, tensor in model.get_submodule(name).named_parameters(recurse=False):
            if tensor.dtype not in allowed:
                remedy = "convert the model with .float()"
                if tensor.dtype == torch.float64:
                    remedy += ", or pass r3=False, r4=False where the family allows it: fused rotations take float64"
                raise TypeError(
                    f"rotate_model: {part} of {name} must be one of {', '.join(map(str, allowed))}, got "
                    f"{tensor.dtype}; {remedy}"
                )
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"rotate_model: {part} of {name} must be finite, got NaN or Inf; check the checkpoint for overflow"
                )


def _fuse(
    model: nn.Module, architecture: Architecture, plan: Plan, record: Rotated, device: torch.device | None
) -> None:
    """Fold the gains of the norms, R1, R2 and R4 into the weights. Each weight is rounded once."""
    residual = plan.residual
    if record.untied:
        _untie(model, architecture)
    if residual is not None:
        embed = model.get_submodule(architecture.embed).weight
        assert isinstance(embed, Tensor)
        _rotate_in_place(embed, _Folded(None, residual, None), device)

    def fold(norm: str) -> Tensor | None:
        return None if residual is None else _take_gain(model.get_submodule(norm), architecture.gain_offset)

    def rewrite(
        name: str,
        gain: Tensor | None,
        inputs: OnlineRotation | MatrixRotation | None,
        outputs: OnlineRotation | MatrixRotation | None,
    ) -> None:
        if gain is not None or inputs is not None or outputs is not None:
            _rewrite(_linear(model, name), _Folded(gain, inputs, outputs), device)

    for layer in architecture.layers:
        gain = fold(layer.attention_norm)
        rewrite(layer.q, gain, residual, None)
        rewrite(layer.k, gain, residual, None)
        rewrite(layer.v, gain, residual, plan.v_output)
        rewrite(layer.o, None, plan.o_input, None if layer.attention_output_norm else residual)
        gain = fold(layer.mlp_norm)
        rewrite(layer.gate, gain, residual, None)
        rewrite(layer.up, gain, residual, None)
        rewrite(layer.down, None, plan.down_input, None if layer.mlp_output_norm else residual)
    head = _linear(model, architecture.head)
    if head.weight is not model.get_submodule(architecture.embed).weight:  # the embedding's rotation covers a tied head
        rewrite(architecture.head, fold(architecture.final_norm), residual, None)


@dataclass(frozen=True)
class _Folded:
    """The change of one weight: rotated x / gain goes in, rotated output comes out. None changes nothing."""

    gain: Tensor | None
    inputs: OnlineRotation | MatrixRotation | None
    outputs: OnlineRotation | MatrixRotation | None

    def __call__(self, weight: Tensor) -> Tensor:
        """The changed weight, in float64: [out_features, in_features] -> the same shape, on the same device."""
        weight = weight.to(torch.float64)
        if self.gain is not None:
            weight = weight * self.gain.to(weight.device)
        if self.inputs is not None:
            weight = self.inputs.rotate_weight(weight, "input")
        if self.outputs is not None:
            weight = self.outputs.rotate_weight(weight, "output")
        return weight


def _rewrite(linear: nn.Linear, folded: _Folded, device: torch.device | None) -> None:
    """Change a layer's weight and bias, or the source of its weight."""
    weight = linear.weight
    if weight.is_meta:
        before, dtype = source_of(weight), weight.dtype

        def changed(device: torch.device) -> Tensor:
            return folded(before(device)).to(dtype)

        set_source(weight, changed)
    else:
        _rotate_in_place(weight, folded, device)
    if folded.outputs is not None and linear.bias is not None:
        bias = linear.bias.detach().to(torch.float64)[:, None]
        _assign(linear.bias, folded.outputs.rotate_weight(bias, "output")[:, 0])


def _rotate_in_place(weight: Tensor, folded: _Folded, device: torch.device | None) -> None:
    """Change a weight on a device, in parts of its rows if its columns stay apart."""
    values = weight.detach()
    # Rows are independent unless the outputs are rotated. The embedding and the head can be larger than a layer.
    rows = len(values) if folded.outputs is not None else max(1, _PART_WEIGHTS // values.shape[1])
    for part in values.split(rows):
        _assign(part, folded(part.to(part.device if device is None else device)))


def _has_gain(model: nn.Module, architecture: Architecture) -> bool:
    """Whether the final norm's gain differs from one, and the output head would have to take it."""
    weight = model.get_submodule(architecture.final_norm).weight
    assert isinstance(weight, Tensor)
    return weight.is_meta or not bool((weight == 1.0 - architecture.gain_offset).all())


def _take_gain(norm: nn.Module, offset: float) -> Tensor:
    """Set the gain of a norm to one. Returns the old gain in float64."""
    assert isinstance(norm.weight, Tensor)
    gain = norm.weight.detach().to(torch.float64) + offset
    with torch.no_grad():
        norm.weight.fill_(1.0 - offset)
    return gain


@torch.no_grad()
def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _untie(model: nn.Module, architecture: Architecture) -> None:
    """Give the output head its own weight, and keep transformers from tying it again."""
    head = _linear(model, architecture.head)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    untie_head(model, architecture.head)


def _install(model: nn.Module, architecture: Architecture, plan: Plan, tied: bool) -> None:
    """Install the online rotations, a separate module for each place."""
    device = _linear(model, architecture.head).weight.device

    def copied(rotation: OnlineRotation) -> OnlineRotation:
        rotation = copy.deepcopy(rotation)
        # On the meta device the signs would lose their values, and no weight has a copy of them.
        return rotation if device.type == "meta" else rotation.to(device)

    if tied:
        assert isinstance(plan.residual, OnlineRotation)
        rotate_around(model.get_submodule(architecture.final_norm), copied(plan.residual))
    for layer in architecture.layers:
        if plan.qk is not None:
            rotate_queries_and_keys(model.get_submodule(layer.attention), copy.deepcopy(plan.qk))
        if plan.down_input is not None:
            down = RotatedLinear.from_linear(_linear(model, layer.down), copy.deepcopy(plan.down_input))
            model.set_submodule(layer.down, down)
        for name in (layer.attention_output_norm, layer.mlp_output_norm):
            if name is not None and isinstance(plan.residual, OnlineRotation):
                rotate_output(model.get_submodule(name), copied(plan.residual))
