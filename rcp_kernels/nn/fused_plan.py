"""The names and settings of a decoder layer that its fused forward passes need, and the checks that it can be fused."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.architecture import Architecture, Layer
from ..models.families import FAMILIES
from ..ops.token_prologue import rms_norm_reference
from .merged_linear import Norm
from .quant_linear import QuantLinear
from .quantize_model import count_hooks

__all__ = ["AttentionPlan", "LayerPlan", "MlpPlan", "namespace_of", "plan_layer"]


@dataclass(frozen=True)
class LayerPlan:
    """The names of a decoder layer's modules in that layer."""

    attention: str
    mlp: str
    attention_norm: str
    mlp_norm: str
    attention_output_norm: str | None
    mlp_output_norm: str | None
    gain_offset: float

    def norm(self, layer: nn.Module, name: str) -> Norm:
        module = layer._modules[name]
        return Norm(module._parameters["weight"], _epsilon(module), self.gain_offset)  # type: ignore[arg-type, union-attr]


@dataclass(frozen=True)
class AttentionPlan:
    """The names of an attention module's submodules, and the arguments of its attention function.

    Attributes:
        sizes: features of q, k and v.
        decodes: whether :func:`rcp_kernels.ops.decode_attention` computes this attention for one token.
    """

    q: str
    k: str
    v: str
    o: str
    q_norm: str | None
    k_norm: str | None
    arguments: tuple[tuple[str, Any], ...]
    sizes: tuple[int, ...]
    decodes: bool


@dataclass(frozen=True)
class MlpPlan:
    """The names of an MLP's submodules, and its activation for :func:`rcp_kernels.ops.lut_linear_fused`."""

    gate: str
    up: str
    down: str
    activation: str


def namespace_of(attention: type[nn.Module]) -> dict[str, Any]:
    """The globals of the module in which a class of attention modules is defined."""
    return inspect.unwrap(attention.forward).__globals__


def plan_layer(
    model: nn.Module, architecture: Architecture, layer: Layer, decode: bool
) -> tuple[LayerPlan, AttentionPlan, MlpPlan]:
    """The plans of a decoder layer.

    Args:
        model: of transformers.
        architecture: of the model.
        layer: one of its layers.
        decode: whether to use :func:`rcp_kernels.ops.decode_attention` if the layer allows that.

    Raises:
        ValueError: the layer has a part that the fused layers do not compute. The message names it.
    """
    mlp_name = _check_modules(model, layer)
    for name in (layer.attention_norm, layer.mlp_norm):
        _check_norm(name, model.get_submodule(name), architecture.gain_offset)
    attention: Any = model.get_submodule(layer.attention)
    namespace = namespace_of(type(attention))
    if "apply_rotary_pos_emb" not in namespace:
        raise ValueError(
            f"fuse_decoder: forward of {type(attention).__name__} must call apply_rotary_pos_emb, which its source "
            f"does not have; this family is not supported"
        )
    family = FAMILIES[architecture.model_type]
    arguments = tuple(
        (name, operator.attrgetter(attribute)(attention)) for name, attribute in family.attention_arguments
    )
    decode = (
        decode
        and (layer.q_norm is None) == (layer.k_norm is None)
        and all(value is None for _, value in arguments)
        and attention.head_dim % 2 == 0
        and getattr(attention, "qk_rotation", None) is None
        and _rotates_halves(namespace["apply_rotary_pos_emb"], attention.head_dim)
    )
    sizes: tuple[Any, ...] = tuple(model.get_submodule(name).out_features for name in (layer.q, layer.k, layer.v))
    q, k, v, o, gate, up, down = (_last(name) for name in layer.linears)
    return (
        LayerPlan(
            attention=_last(layer.attention),
            mlp=_last(mlp_name),
            attention_norm=_last(layer.attention_norm),
            mlp_norm=_last(layer.mlp_norm),
            attention_output_norm=_last_or_none(layer.attention_output_norm),
            mlp_output_norm=_last_or_none(layer.mlp_output_norm),
            gain_offset=architecture.gain_offset,
        ),
        AttentionPlan(q, k, v, o, _last_or_none(layer.q_norm), _last_or_none(layer.k_norm), arguments, sizes, decode),
        MlpPlan(gate, up, down, _activation(mlp_name, model.get_submodule(mlp_name))),
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _last_or_none(name: str | None) -> str | None:
    return None if name is None else _last(name)


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _check_modules(model: nn.Module, layer: Layer) -> str:
    """Check the types, places, hooks and forwards of a layer's modules, and return the name of its MLP."""
    for name in layer.linears:
        linear = model.get_submodule(name)
        if type(linear) is not QuantLinear:
            raise ValueError(
                f"fuse_decoder: {name} must be a QuantLinear, got {type(linear).__name__}; quantize all seven linear "
                f"layers of each decoder layer, and fuse before replacing any of them"
            )
    parents = {name.rpartition(".")[0] for name in (layer.gate, layer.up, layer.down)}
    if len(parents) != 1 or any(name.rpartition(".")[0] != layer.attention for name in layer.linears[:4]):
        raise ValueError(
            f"fuse_decoder: q, k, v, o and gate, up, down must be in one module each, got {layer.linears}; this family "
            f"is not supported"
        )
    mlp_name = parents.pop()
    hooked = (*layer.linears, layer.attention_norm, layer.mlp_norm, layer.name, mlp_name)
    for name in hooked:
        hooks = count_hooks(model.get_submodule(name))
        if hooks:
            raise ValueError(
                f"fuse_decoder: {name} must have no hooks, as the fused layer does not call it, got {hooks}; "
                f"remove them, or do not fuse the model"
            )
    for name in (*hooked, layer.attention):
        # accelerate sets a forward in the instance when it spreads a model over devices.
        if "forward" in model.get_submodule(name).__dict__:
            raise ValueError(
                f"fuse_decoder: {name} must have the forward of its class, got another in the instance; load the model "
                f"on one device, or restore the forward"
            )
    return mlp_name


def _check_norm(name: str, module: Any, gain_offset: float) -> None:
    """Compare a norm with the operator's on one token. Another formula differs in the first digits."""
    weight = module._parameters.get("weight")
    if weight is None or not (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        raise ValueError(
            f"fuse_decoder: {name} must be an RMS norm with a weight and an epsilon, got {type(module).__name__}; this "
            f"norm is not supported"
        )
    if weight.is_meta:
        return
    token = torch.linspace(-2, 3, weight.numel(), device=weight.device).to(weight.dtype)[None]
    with torch.no_grad():
        found, expected = module(token), rms_norm_reference(token, weight, _epsilon(module), gain_offset)
    if not torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=1e-3):
        raise ValueError(
            f"fuse_decoder: {name} must be x / sqrt(mean(x**2) + eps) * ({gain_offset:g} + weight), got a "
            f"{type(module).__name__} with another formula; this norm is not supported"
        )


def _activation(name: str, mlp: nn.Module) -> str:
    """The name of an MLP's gated activation, found by comparing values."""
    function = getattr(mlp, "act_fn", None)
    gate = torch.linspace(-4, 4, 33)
    if callable(function):
        with torch.no_grad():
            values = function(gate)
        if torch.allclose(values, functional.silu(gate), rtol=1e-5, atol=1e-5):
            return "silu"
        if torch.allclose(values, functional.gelu(gate, approximate="tanh"), rtol=1e-5, atol=1e-5):
            return "gelu_tanh"
    raise ValueError(
        f"fuse_decoder: act_fn of {name} must be SiLU or GELU with the tanh approximation, got "
        f"{type(function).__name__}; this activation is not supported"
    )


def _rotates_halves(rotary: Any, head_dim: int) -> bool:
    """Whether a rotary embedding is that of ops.decode_attention, found by comparing values."""
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, 1, 1, head_dim, generator=generator) for _ in range(3))
    first, second = x.chunk(2, -1)
    expected: Tensor = x * cos + torch.cat((-second, first), -1) * sin
    return torch.equal(rotary(x, x, cos[0], sin[0])[0], expected)
