"""Argument checks for the whole package. Every error says the rule, the value found and the remedy."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "check_clip", "check_devices", "check_float", "check_int", "check_one_of", "check_tensor"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The floating point dtypes that the operators take."""


def check_one_of(
    where: str, name: str, value: object, allowed: Collection[Any], remedy: str = "choose one of them"
) -> None:
    """Raise ValueError unless ``value`` is in ``allowed``, with the type that it has there: 4.0 is not 4.

    Args:
        where: the caller; begins the message.
        name: of the argument.
        value: of the argument.
        allowed: all values that the argument may have, a tuple or a dict.
        remedy: ends the message.
    """
    if not any(isinstance(value, type(choice)) and value == choice for choice in allowed):
        raise ValueError(f"{where}: {name} must be one of {tuple(allowed)}, got {value!r}; {remedy}")


def check_int(where: str, name: str, value: object, low: int = 1, remedy: str = "choose another") -> None:
    """Raise ValueError unless ``value`` is an int of at least ``low``. A bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{where}: {name} must be an int of at least {low}, got {value!r}; {remedy}")


def check_clip(where: str, clip: object, name: str = "clip") -> None:
    """Raise ValueError unless ``clip`` is a number in (0, 1]: the share of the largest magnitude that is kept."""
    if isinstance(clip, bool) or not isinstance(clip, Real) or not 0.0 < float(clip) <= 1.0:
        raise ValueError(f"{where}: {name} must be in (0, 1], got {clip!r}; 1.0 keeps the largest value")


def check_float(where: str, name: str, value: Tensor | torch.dtype, remedy: str = "convert it first") -> None:
    """Raise ValueError unless a tensor, or a dtype, is one of :data:`FLOAT_DTYPES`."""
    dtype = value if isinstance(value, torch.dtype) else value.dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{where}: {name} must be float32, float16 or bfloat16, got {dtype}; {remedy}")


def check_tensor(
    where: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], remedy: str = "check its source"
) -> None:
    """Raise ValueError unless ``tensor`` has this dtype and this shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{where}: {name} must be {dtype} of shape {tuple(shape)}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; {remedy}"
        )


def check_devices(where: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on the device of ``x``.

    A fake kernel must check this: torch calls it for a meta tensor among real tensors, and would return uninitialised
    memory as the result.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{where}: {name} must be on the device of x ({x.device}), got {tensor.device}; move them together, or "
                f"load the weights of a meta layer with load_state_dict(..., assign=True)"
            )
