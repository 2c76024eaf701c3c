"""The parts of a given model: full module names and sizes, by the names of its family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import FAMILIES, Family

__all__ = ["Architecture", "Layer", "describe"]


@dataclass(frozen=True)
class Layer:
    """Full dotted names of a decoder layer and its modules, described in :class:`Family`.

    ``model.get_submodule(layer.q)`` is the module.
    """

    name: str
    attention: str
    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str
    attention_output_norm: str | None
    mlp_output_norm: str | None
    q_norm: str | None
    k_norm: str | None

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the seven linear layers in the order of computation: q k v o gate up down."""
        return (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)


@dataclass(frozen=True)
class Architecture:
    """Names and sizes of the parts of a decoder-only language model.

    Attributes:
        model_type: of the config.
        embed, final_norm, head: full dotted names.
        layers: of the decoder, in order.
        hidden_size: features of the residual stream.
        intermediate_size: input features of down.
        num_heads, num_kv_heads, head_dim: of attention. q has num_heads * head_dim output features, k and v have
            num_kv_heads * head_dim.
        gain_offset: a norm multiplies by ``gain_offset + weight``.
    """

    model_type: str
    embed: str
    final_norm: str
    head: str
    layers: tuple[Layer, ...]
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gain_offset: float

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linear layers of a decoder layer: q k v o gate up down."""
        queries, values = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return {
            "q": (queries, hidden),
            "k": (values, hidden),
            "v": (values, hidden),
            "o": (hidden, queries),
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
        }

    @property
    def layer_weights(self) -> int:
        """Number of weights in the linear layers of a decoder layer."""
        return sum(rows * columns for rows, columns in self.shapes.values())


def describe(model: nn.Module) -> Architecture:
    """The architecture of a model, by its ``config.model_type``.

    Args:
        model: with a ``config`` as in ``transformers``. Any device, including meta, and float or packed linear layers.

    Raises:
        ValueError: the model has no config, its model_type is not in `FAMILIES`, or it lacks a module of the family.
            The message names the module.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if config is None or model_type is None or family is None:
        found = f"a {type(model).__name__} without config.model_type" if model_type is None else repr(model_type)
        raise ValueError(
            f"describe: config.model_type must be one of {', '.join(sorted(FAMILIES))}, got {found}; pass the language "
            f"model itself, or add an entry to rcp_kernels/models/families.py"
        )
    heads = int(config.num_attention_heads)
    architecture = Architecture(
        model_type=model_type,
        embed=family.embed,
        final_norm=family.final_norm,
        head=family.head,
        layers=tuple(_layer(family, f"{family.layers}.{index}") for index in range(int(config.num_hidden_layers))),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        gain_offset=family.gain_offset,
    )
    names = dict(model.named_modules(remove_duplicate=False))
    needed = [architecture.embed, architecture.final_norm, architecture.head]
    for layer in architecture.layers:
        needed += [name for name in vars(layer).values() if name is not None]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"describe: a model of type {model_type!r} must have the module {missing[0]}, got a "
            f"{type(model).__name__} without it ({len(missing)} missing in all); pass the model with its output head, "
            f"unchanged in structure"
        )
    return architecture


def _layer(family: Family, name: str) -> Layer:
    parts = {part: getattr(family, part) for part in Layer.__dataclass_fields__ if part != "name"}
    full: dict[str, Any] = {part: None if inner is None else f"{name}.{inner}" for part, inner in parts.items()}
    return Layer(name, **full)
