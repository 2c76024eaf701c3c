"""Rotations of a whole model that leave its function as it is. docs/rotate.md explains them."""

from .rotate_model import (
    ROTATIONS,
    Rotated,
    apply_structure,
    rotate_model,
    rotation_of,
)

__all__ = [
    "ROTATIONS",
    "Rotated",
    "apply_structure",
    "rotate_model",
    "rotation_of",
]
