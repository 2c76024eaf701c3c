"""The record of a model's rotation, and the rotation matrices for a record and a model's sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models import Architecture
from ...nn.online_rotation import OnlineRotation
from ...ops.walsh_matrices import factor_size

__all__ = ["KINDS", "MATRIX", "ROTATIONS", "MatrixRotation", "Plan", "Rotated", "make_plan"]


@dataclass(frozen=True)
class RotationKind:
    """One kind of R1.

    Attributes:
        order: of the rows, "natural" or "sequency".
        grouped: whether R1 mixes the entries of each group only, or all entries.
        signs: whether random signs multiply the token first.
    """

    order: str
    grouped: bool = False
    signs: bool = False


KINDS = {
    "hadamard": RotationKind("natural", signs=True),
    "walsh": RotationKind("sequency"),
    "local_hadamard": RotationKind("natural", grouped=True),
    "gsr": RotationKind("sequency", grouped=True),
}
MATRIX = "matrix"
"""The name of R1 for a matrix that the caller passes."""

# Kind of R2 to R4 without one for R1: QuaRot's.
_DEFAULT_KIND = RotationKind("natural")

ROTATIONS = ("none", *KINDS)
"""The names of R1 that :func:`rotate_model` takes."""

# A float32 matrix from QR or Cayley steps is orthogonal within 1e-6. The model's logits should stay within 1e-4.
_ORTHOGONAL_WITHIN = 1e-5


@dataclass(frozen=True)
class Rotated:
    """The record of :func:`rotate_model` for a checkpoint. :func:`apply_structure` builds the same structure from it.

    Attributes:
        model_type: of the model's config.
        rotation: R1: one of `ROTATIONS`, or ``"matrix"`` for a matrix that the caller passed.
        group_size: entries that R1 mixes. None if it mixes all of them, is ``"none"``, or is a matrix.
        r2, r3, r4: which of these rotations the model has.
        r4_group_size: entries that R4 mixes. None if it mixes all of them, or there is no R4.
        seed: of R1's random signs.
        untied: whether the output head was tied to the embedding before, and is not now.
        tied: whether the output head is tied to the rotated embedding. The final norm then works in the original basis:
            ``R norm(R^T x)``.
    """

    model_type: str
    rotation: str
    group_size: int | None
    r2: bool
    r3: bool
    r4: bool
    r4_group_size: int | None
    seed: int
    untied: bool
    tied: bool = False

    @property
    def changes_anything(self) -> bool:
        """Whether there is any rotation at all."""
        return self.rotation != "none" or self.r2 or self.r3 or self.r4

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Rotated:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or of another type, or the rotation is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        fields = {"tied": False, **fields}  # versions before 0.2 did not write it
        if set(fields) != set(names):
            raise ValueError(
                f"Rotated: fields must be {names}, got {sorted(fields)}; the file is damaged, or was written by "
                f"another version of rcp-kernels"
            )
        types = {"str": (str,), "int": (int,), "bool": (bool,), "int | None": (int, type(None))}
        for field in dataclasses.fields(cls):
            value = fields[field.name]
            if type(value) not in types[str(field.type)]:
                raise ValueError(f"Rotated: {field.name} must be {field.type}, got {value!r}; the file is damaged")
        if fields["rotation"] not in (*ROTATIONS, MATRIX):
            raise ValueError(
                f"Rotated: rotation must be one of {(*ROTATIONS, MATRIX)}, got {fields['rotation']!r}; the file is "
                f"damaged, or was written by another version of rcp-kernels"
            )
        return cls(**fields)


class MatrixRotation:
    """R1 as a matrix of the caller, with the method of OnlineRotation that fuses it into weights."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def rotate_weight(self, weight: Tensor, side: str) -> Tensor:
        matrix = self.matrix.to(weight.device)
        weight = weight.detach().to(torch.float64)
        return weight @ matrix.T if side == "input" else matrix @ weight


@dataclass(frozen=True)
class Plan:
    """The rotations of a model; None for those that it does not have.

    Attributes:
        residual: R1.
        v_output: R2 for the output of v, as wide as all key/value heads.
        o_input: R2 for the input of o, as wide as all query heads.
        qk: R3, of one head.
        down_input: R4.
    """

    residual: OnlineRotation | MatrixRotation | None
    v_output: OnlineRotation | None
    o_input: OnlineRotation | None
    qk: OnlineRotation | None
    down_input: OnlineRotation | None


def make_plan(record: Rotated, architecture: Architecture, matrix: Tensor | None = None) -> Plan:
    """The rotations of a record. Raises ValueError for sizes without a Walsh matrix."""
    kind = KINDS.get(record.rotation, _DEFAULT_KIND)
    hidden, intermediate = architecture.hidden_size, architecture.intermediate_size
    head_dim, order = architecture.head_dim, kind.order
    _check_groups(record, architecture)
    residual: OnlineRotation | MatrixRotation | None = None
    if matrix is not None:
        residual = MatrixRotation(_check_matrix(matrix, architecture))
    elif record.rotation != "none":
        signs = None
        if kind.signs:
            # Explicitly on the CPU: a checkpoint's structure is built under torch.device("meta").
            generator = torch.Generator("cpu").manual_seed(record.seed)
            signs = torch.randint(2, (hidden,), generator=generator, device="cpu") * 2 - 1
        factor_size(record.group_size or hidden, "rotate_model: R1 of hidden_size")
        residual = OnlineRotation(hidden, record.group_size, order, signs=signs)
    if record.r2 or record.r3:
        factor_size(head_dim, "rotate_model: R2 and R3 of head_dim")
    if record.r4:
        try:
            factor_size(record.r4_group_size or intermediate, "rotate_model: R4 of intermediate_size")
        except ValueError as error:
            raise ValueError(f"{error}; pass that as r4_group_size, or r4=False") from None
    return Plan(
        residual=residual,
        v_output=OnlineRotation(architecture.num_kv_heads * head_dim, head_dim, order) if record.r2 else None,
        o_input=OnlineRotation(architecture.num_heads * head_dim, head_dim, order) if record.r2 else None,
        qk=OnlineRotation(head_dim, order=order) if record.r3 else None,
        down_input=OnlineRotation(intermediate, record.r4_group_size, order) if record.r4 else None,
    )


def _check_groups(record: Rotated, architecture: Architecture) -> None:
    sizes = {"hidden_size": architecture.hidden_size, "intermediate_size": architecture.intermediate_size}
    uses = {
        "group_size": (record.group_size, ["hidden_size"]),
        "r4_group_size": (record.r4_group_size, ["intermediate_size"]),
    }
    if record.group_size == record.r4_group_size:
        uses = {"group_size": (record.group_size, ["hidden_size", "intermediate_size"])}
    for argument, (group, names) in uses.items():
        if group is None or (group > 0 and not any(sizes[name] % group for name in names)):
            continue
        # Only powers of two, like the group sizes of packed weights.
        works = [1 << k for k in range(1, 20) if not any(sizes[name] % (1 << k) for name in names)]
        remedy = "no power of two does: use all entries (rotation='walsh')"
        if works:
            remedy = f"the nearest that works is {min(works, key=lambda size: abs(size - group))}"
        raise ValueError(
            f"rotate_model: {argument} must divide {' and '.join(names)} for rotation {record.rotation!r}, got "
            f"{group} and {' and '.join(str(sizes[name]) for name in names)}; {remedy}"
        )


def _check_matrix(matrix: Tensor, architecture: Architecture) -> Tensor:
    """The matrix in float64. Raises ValueError unless it is a rotation that can be fused."""
    size = architecture.hidden_size
    if tuple(matrix.shape) != (size, size) or not matrix.is_floating_point():
        raise ValueError(
            f"rotate_model: a rotation must be floating point [{size}, {size}] (hidden_size), got {matrix.dtype} "
            f"{list(matrix.shape)}; pass a matrix of this size"
        )
    matrix = matrix.detach().to(torch.float64)
    error = float((matrix @ matrix.T - torch.eye(size, dtype=torch.float64, device=matrix.device)).abs().max())
    if not error <= _ORTHOGONAL_WITHIN:
        raise ValueError(
            f"rotate_model: a rotation must be orthogonal, R R^T = I within {_ORTHOGONAL_WITHIN:g}, got {error:.3g}; "
            f"take q of torch.linalg.qr(matrix.double())"
        )
    if any(layer.attention_output_norm or layer.mlp_output_norm for layer in architecture.layers):
        raise ValueError(
            f"rotate_model: rotation must be one of {ROTATIONS} for a model of type {architecture.model_type!r}, got a "
            f"tensor; after output norms R1 runs online, where a dense matrix costs as much as a linear layer"
        )
    return matrix
