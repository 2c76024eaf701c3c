"""What transformers calls things: names that differ between the releases that this package supports."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["cache_keyword", "output_cache"]


def cache_keyword(target: nn.Module | Callable[..., Any]) -> str:
    """The keyword by which a model, one of its layers, or a function takes the key/value cache.

    transformers 5.24 renamed ``past_key_values`` to ``cache`` and will drop the old name.

    Args:
        target: a module, whose ``forward`` is looked at, or a function.

    Returns:
        ``"cache"`` if there is a parameter of that name, else ``"past_key_values"``.
    """
    call = target.forward if isinstance(target, nn.Module) else target
    return "cache" if "cache" in inspect.signature(call).parameters else "past_key_values"


def output_cache(output: Any) -> Any:
    """The key/value cache in the output of a model, or None if the model was called without one."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
