"""Parameters whose values are read only when they are needed, for models larger than memory.

Such a parameter lies on the meta device and has a source, a function that reads its values. Methods that walk a model
layer by layer read a weight when its turn comes, and drop it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Source", "has_values", "set_source", "source_of", "values_of"]

Source = Callable[[torch.device], Tensor]
"""(device) -> the values of a parameter on that device, as a new tensor of the parameter's shape and dtype."""

_ATTRIBUTE = "_rcp_source"


def set_source(parameter: Tensor, source: Source) -> None:
    """Give a parameter on the meta device the function that reads its values."""
    setattr(parameter, _ATTRIBUTE, source)


def has_values(parameter: Tensor) -> bool:
    """Whether a parameter is in memory, or on the meta device with a source."""
    return not parameter.is_meta or hasattr(parameter, _ATTRIBUTE)


def source_of(parameter: Tensor) -> Source:
    """The source of a parameter on the meta device. Raises ValueError if it has none."""
    source: Source | None = getattr(parameter, _ATTRIBUTE, None)
    if source is None:
        raise ValueError(
            f"source_of: a parameter on the meta device must have a source, got none for shape "
            f"{tuple(parameter.shape)}; load the checkpoint first"
        )
    return source


def values_of(parameter: Tensor, device: torch.device | str | None = None) -> Tensor:
    """The values of a parameter on a device, without a gradient.

    Args:
        parameter: in memory, or with a source.
        device: None for the device of the parameter, and for the CPU if it has a source.

    Returns:
        The parameter's own memory if it lies on that device, else a copy.

    Raises:
        ValueError: the parameter has no values.
    """
    if not parameter.is_meta:
        return parameter.detach().to(parameter.device if device is None else device)
    with torch.no_grad():
        return source_of(parameter)(torch.device("cpu" if device is None else device))
