"""Differences between releases of ``transformers``. Other modules of this package do not depend on the release.

Supported: transformers 5.0 and later (pyproject.toml). The differences so far:

- 5.24 renames the cache argument of models and layers from ``past_key_values`` to ``cache``; 5.40 drops the old name.
  A layer that gets the old name beside ``cache=None`` only warns and ignores it.
- 5.0 computes positions on the host, from the cache's length, unless ``cache_position`` is passed. Later releases
  compute them on the device, and have no such argument.
- Later releases than 5.0 have ``AttentionInterface.get_interface``.
- 5.24 lets a StaticCache take tokens back (``crop``).
- 5.24 passes a layer's keyword arguments to ``Cache.update`` as ``kwargs``; 5.0 takes a dict of RoPE's tables.
- ``_adjust_missing_and_unexpected_keys`` takes two sets and returns them in 5.0; it takes one report later.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "attention_function",
    "cache_argument",
    "cache_capacity",
    "cache_keyword",
    "cast",
    "croppable",
    "file_names",
    "float32_modules",
    "output_cache",
    "position_argument",
    "skeleton",
    "tensor_state",
    "untie_head",
    "watch_loading",
    "without_bars",
]


def attention_function(registry: Any, implementation: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function of an implementation.

    Args:
        registry: ``ALL_ATTENTION_FUNCTIONS`` of transformers.
        implementation: of the model's config.
        eager: the model's own function for ``"eager"``.
    """
    if hasattr(registry, "get_interface"):
        return registry.get_interface(implementation, eager)
    return eager if implementation == "eager" else registry[implementation]


def cache_keyword(module: nn.Module | Callable[..., Any]) -> str:
    """The name of the key/value cache argument of a model or a decoder layer.

    Args:
        module: a module with a ``forward``, or a function.

    Returns:
        ``"cache"`` or ``"past_key_values"``. ``"cache"`` also for a function that takes any keyword and names neither.

    Raises:
        ValueError: the function takes neither.
    """
    parameters = inspect.signature(module.forward if isinstance(module, nn.Module) else module).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return "cache"
    raise ValueError(
        f"{type(module).__name__}: its forward must take cache or past_key_values, got {sorted(parameters)}; a model "
        f"with a key/value cache is needed here"
    )


def cache_argument(module: nn.Module | Callable[..., Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass ``cache`` to a model or a decoder layer."""
    return {cache_keyword(module): cache}


def output_cache(output: Any) -> Any:
    """The key/value cache in a model's output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def croppable(cache: Any) -> Any:
    """A StaticCache whose last tokens can be taken back. Before 5.24 its layers lack that, but count in a tensor."""
    from transformers.cache_utils import StaticLayer

    class CroppableStaticLayer(StaticLayer):
        is_croppable = True

        def crop(self, tokens_to_remove: int) -> None:
            self.cumulative_length.sub_(abs(tokens_to_remove))

    for layer in cache.layers:
        if (
            type(layer) is StaticLayer
            and not getattr(layer, "is_croppable", False)
            and isinstance(getattr(layer, "cumulative_length", None), Tensor)
        ):
            layer.__class__ = CroppableStaticLayer
    return cache


def cache_capacity(cache: Any) -> int | None:
    """The most positions that a cache holds, or None if it grows or rolls over."""
    most = []
    for layer in cache.layers:
        # Before 5.24 the method has another name.
        positions = (layer.get_max_length if hasattr(layer, "get_max_length") else layer.get_max_cache_shape)()
        if positions is not None and positions >= 0 and not getattr(layer, "is_sliding", False):
            most.append(positions)
    return min(most, default=None)


def position_argument(module: nn.Module, position: Tensor) -> dict[str, Tensor]:
    """Keyword arguments that pass the positions of a step to a model, and keep it from reading the cache's length.

    Args:
        module: a causal language model.
        position: int64 [1, tokens]. The result holds views of it.
    """
    parameters = inspect.signature(module.forward).parameters
    if "cache_position" in parameters:
        return {"cache_position": position[0]}
    return {"position_ids": position} if "position_ids" in parameters else {}


def untie_head(model: nn.Module, head: str) -> None:
    """Mark the output head as untied, which keeps transformers from tying it to the embedding again.

    Args:
        model: of transformers.
        head: full name of the head's module.
    """
    model.config.get_text_config().tie_word_embeddings = False  # type: ignore[union-attr, operator]
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    tied = getattr(model, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        tied.pop(f"{head}.weight", None)


def file_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Tensor names in a checkpoint's files by the model's own tensor names.

    transformers renames modules of some families when it loads and saves (Mixtral's ``block_sparse_moe`` is ``mlp`` in
    the model). Other names map to themselves. Merged or split tensors are not supported.

    Args:
        model: of transformers.
        names: tensor names in the files.

    Returns:
        File names by model names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    return {rename_source_key(name, renamings, [])[0]: name for name in names}


def watch_loading(model: nn.Module, own: Collection[str], found: Callable[[set[str], set[str]], None]) -> None:
    """Report the tensors that the files of a model lack. transformers fills these with random numbers.

    Args:
        model: an instance under construction in ``from_pretrained``.
        own: full names of modules that the caller loads; transformers does not warn about their tensors.
        found: called once with the names that the files lack and the names that the model lacks.
    """
    adjust: Any = model._adjust_missing_and_unexpected_keys
    prefixes = tuple(f"{name}." for name in own)

    def adjust_and_tell(*args: Any) -> Any:
        del model._adjust_missing_and_unexpected_keys
        unexpected = args[0].unexpected_keys if len(args) == 1 else args[1]
        unexpected.difference_update([name for name in unexpected if name.startswith(prefixes)])
        result = adjust(*args)
        missing, unexpected = (args[0].missing_keys, args[0].unexpected_keys) if result is None else result
        found(set(missing), set(unexpected))
        return result

    model._adjust_missing_and_unexpected_keys = adjust_and_tell  # type: ignore[assignment]


@contextmanager
def without_bars() -> Iterator[None]:
    """Suppress the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def skeleton(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A new model of the same class and config, without values, as ``from_pretrained(dtype=...)`` would make it.

    Args:
        model: of transformers.
        dtype: of the parameters, and of buffers that do not choose another dtype.
    """
    with torch.device("meta"), _default_dtype(dtype):
        return type(model)(copy.deepcopy(model.config))


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters of a model in place, biases of packed layers too, and set the dtype in its config.

    Buffers get the dtype that they have in a model that is loaded in ``dtype``. RoPE's tables stay float32, which
    ``model.to(dtype)`` would cast.
    """
    for parameter in model.parameters():
        parameter.data = parameter.to(dtype)
    tables = dict(skeleton(model, dtype).named_buffers())
    for name, buffer in model.named_buffers():
        if name in tables:
            buffer.data = buffer.to(tables[name].dtype)
    config: Any = model.config
    config.dtype = dtype


def float32_modules(model: nn.Module) -> set[str]:
    """Last or inner names of the modules that ``from_pretrained`` keeps in float32 for any requested dtype."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names.update(getattr(model, attribute, None) or ())
    return names


def tensor_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's ``state_dict`` with one name for each tied tensor."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state: dict[str, Tensor] = remove_tied_weights_from_state_dict(model.state_dict(), model)  # type: ignore[arg-type]
    return state
