"""Rotations of a whole model that preserve its function. docs/rotate.md explains them."""

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
