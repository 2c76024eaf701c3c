"""Decoder layers of ``transformers`` that run their norms, activations and residuals inside the packed layers.

docs/fused_decoding.md says what changes, what does not, and how equal the results are.
"""

from __future__ import annotations

import functools
import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.architecture import Architecture, Layer, describe
from ..models.families import FAMILIES
from ..models.hf import attention_function, cache_keyword
from ..ops.decode_attention import decode_attention
from .merged_linear import Norm, apply_linear, apply_merged, merge_linears, split_linears
from .quant_linear import QuantLinear

__all__ = ["fuse_decoder", "is_fused", "unfuse_decoder"]

_PLAN = "_rcp_fused"
_STORAGE = "_rcp_storage"
# Storage of keys and values grows by so many positions.
_GROWTH = 256
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


@dataclass(frozen=True)
class _LayerPlan:
    """What a fused decoder layer knows of its modules, by their names in it."""

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
class _AttentionPlan:
    q: str
    k: str
    v: str
    o: str
    q_norm: str | None
    k_norm: str | None
    arguments: tuple[tuple[str, Any], ...]
    sizes: tuple[int, int, int]
    decodes: bool  # whether ops.decode_attention computes what the module does with one token


@dataclass(frozen=True)
class _MlpPlan:
    gate: str
    up: str
    down: str
    activation: str


def fuse_decoder(model: nn.Module, attention: bool = True) -> None:
    """Let a model's decoder layers run their norms, gated activations and residual sums inside the packed layers.

    In place, undone by :func:`unfuse_decoder`. q, k and v become one weight, and so do gate and up, where one weight
    gives the same bits; else they stay apart. Each token is then quantized once for all of them. ``state_dict`` and
    ``save_pretrained`` give what they gave before. Under ``torch.autocast`` the layers run as they did before.

    The result differs from the model's own by the norm, whose float32 sum is in another order, and by float32 rounding
    of the activation (docs/fused_decoding.md).

    Args:
        model: a causal language model of transformers, of a family in ``rcp_kernels.models.families``, with all seven
            linear layers of each decoder layer packed.
        attention: let one new token of each sequence on the CPU go through
            :func:`rcp_kernels.ops.decode_attention` where that computes what the model does: implementation ``"sdpa"``,
            a plain DynamicCache, no mask, window, softcap, norm of queries or R3. False leaves all attention to
            transformers.

    Raises:
        ValueError: the model is fused already, is of another family, or has a part that the fused layers do not
            compute, named. Nothing is changed then.
    """
    if is_fused(model):
        raise ValueError(
            "fuse_decoder: the model must not be fused yet, got one that is; call unfuse_decoder(model) first"
        )
    architecture = describe(model)
    plans = [_check(model, architecture, layer, attention) for layer in architecture.layers]
    for layer, (layer_plan, attention_plan, mlp_plan) in zip(architecture.layers, plans, strict=True):
        module = model.get_submodule(layer.name)
        mlp = module._modules[layer_plan.mlp]
        assert mlp is not None
        for names in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            merge_linears([_packed(model, name) for name in names])
        for target, plan, make in (
            (module, layer_plan, _fused_layer),
            (model.get_submodule(layer.attention), attention_plan, _fused_attention),
            (mlp, mlp_plan, _fused_mlp),
        ):
            target.__dict__[_PLAN] = plan
            target.__class__ = make(type(target))  # type: ignore[arg-type]  # classes do have a hash


def unfuse_decoder(model: nn.Module) -> None:
    """Undo :func:`fuse_decoder`: the layers are of their own classes again, each with its own weight, bit for bit.

    Raises:
        ValueError: the model is not fused.
    """
    if not is_fused(model):
        raise ValueError("unfuse_decoder: the model must be fused, got one that is not; call fuse_decoder(model) first")
    for layer in describe(model).layers:
        for names in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            split_linears([model.get_submodule(name) for name in names])
    for module in model.modules():
        if _PLAN in module.__dict__:
            del module.__dict__[_PLAN]
            module.__class__ = type(module).__mro__[1]


def is_fused(model: nn.Module) -> bool:
    """Whether a module of the model is one that :func:`fuse_decoder` made."""
    return any(_PLAN in module.__dict__ for module in model.modules())


def _packed(model: nn.Module, name: str) -> QuantLinear:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    return layer


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def _check(
    model: nn.Module, architecture: Architecture, layer: Layer, decode: bool
) -> tuple[_LayerPlan, _AttentionPlan, _MlpPlan]:
    """What a layer is to become, or an error that names what stands against it."""
    for name in layer.linears:
        linear = model.get_submodule(name)
        if type(linear) is not QuantLinear:
            raise ValueError(
                f"fuse_decoder: {name} must be a QuantLinear, got {type(linear).__name__}; quantize all seven linear "
                f"layers of each decoder layer, and fuse before anything replaces them"
            )
    parents = {name.rpartition(".")[0] for name in (layer.gate, layer.up, layer.down)}
    if len(parents) != 1 or any(name.rpartition(".")[0] != layer.attention for name in layer.linears[:4]):
        raise ValueError(
            f"fuse_decoder: q, k, v, o and gate, up, down must be in one module each, got {layer.linears}; this family "
            f"is not supported"
        )
    mlp_name = parents.pop()
    norms = [layer.attention_norm, layer.mlp_norm]
    hooked = [*layer.linears, *norms, layer.name, mlp_name]
    for name in hooked:
        module = model.get_submodule(name)
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"fuse_decoder: {name} must have no forward hooks, as the fused layer does not call it, got "
                f"{len(module._forward_hooks) + len(module._forward_pre_hooks)}; remove them, or leave the model as "
                f"it is"
            )
    for name in (*hooked, layer.attention):
        if "forward" in model.get_submodule(name).__dict__:  # what accelerate does to a model it spreads over devices
            raise ValueError(
                f"fuse_decoder: {name} must have the forward of its class, got one of its own; load the model on one "
                f"device, or restore it"
            )
    for name in norms:
        norm: Any = model.get_submodule(name)
        weight = norm._parameters.get("weight")
        if weight is None or not (hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")):
            raise ValueError(
                f"fuse_decoder: {name} must be an RMS norm with a weight and an epsilon, got {type(norm).__name__}; "
                f"this norm is not supported"
            )
        _check_norm(name, norm, Norm(weight, _epsilon(norm), architecture.gain_offset))
    mlp: Any = model.get_submodule(mlp_name)
    attention: Any = model.get_submodule(layer.attention)
    if "apply_rotary_pos_emb" not in _namespace(type(attention)):
        raise ValueError(
            f"fuse_decoder: forward of {type(attention).__name__} must call apply_rotary_pos_emb, which its source "
            f"does not have; this family is not supported"
        )

    def short(name: str | None) -> str | None:
        return None if name is None else name.rpartition(".")[2]

    family = FAMILIES[architecture.model_type]
    arguments = tuple(
        (name, operator.attrgetter(attribute)(attention)) for name, attribute in family.attention_arguments
    )
    q, k, v, o, gate, up, down = (name.rpartition(".")[2] for name in layer.linears)
    decode = (
        decode
        and layer.q_norm is None
        and layer.k_norm is None
        and all(value is None for _, value in arguments)
        and attention.head_dim % 2 == 0
        and getattr(attention, "qk_rotation", None) is None
        and _rotates_halves(_namespace(type(attention))["apply_rotary_pos_emb"], attention.head_dim)
    )
    sizes = tuple(_packed(model, name).out_features for name in (layer.q, layer.k, layer.v))
    return (
        _LayerPlan(
            attention=str(short(layer.attention)),
            mlp=str(short(mlp_name)),
            attention_norm=str(short(layer.attention_norm)),
            mlp_norm=str(short(layer.mlp_norm)),
            attention_output_norm=short(layer.attention_output_norm),
            mlp_output_norm=short(layer.mlp_output_norm),
            gain_offset=architecture.gain_offset,
        ),
        _AttentionPlan(q, k, v, o, short(layer.q_norm), short(layer.k_norm), arguments, sizes, decode),  # type: ignore[arg-type]
        _MlpPlan(gate, up, down, _activation(mlp_name, mlp)),
    )


def _check_norm(name: str, module: nn.Module, norm: Norm) -> None:
    """Compare a norm with what the operator computes on one token: another formula shows in the first digits."""
    if norm.weight.is_meta:
        return
    from ..ops.token_prologue import rms_norm_reference

    token = torch.linspace(-2, 3, norm.weight.numel(), device=norm.weight.device).to(norm.weight.dtype)[None]
    with torch.no_grad():
        found, expected = module(token).float(), rms_norm_reference(token, *norm).float()
    if not torch.allclose(found, expected, rtol=2e-2, atol=1e-3):
        raise ValueError(
            f"fuse_decoder: {name} must be x / sqrt(mean(x**2) + eps) * ({norm.offset:g} + weight), got a "
            f"{type(module).__name__} that computes something else; this norm is not supported"
        )


def _activation(name: str, mlp: nn.Module) -> str:
    """The gated activation of an MLP, told by its values."""
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
    """Whether a model's rotary embedding is the one of ops.decode_attention, told by its values."""
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(1, 1, 1, head_dim, generator=generator) for _ in range(3))
    first, second = x.chunk(2, -1)
    expected = x * cos + torch.cat((-second, first), -1) * sin
    return torch.equal(rotary(x, x, cos[0], sin[0])[0], expected)


def _namespace(attention: type[nn.Module]) -> dict[str, Any]:
    return inspect.unwrap(attention.forward).__globals__


# The classes are made once for each class of transformers. They are subclasses, so that whoever looks for layers of
# that class finds these.


@functools.cache
def _fused_layer(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or _is_any_autocast_enabled():
            return base.forward(self, hidden_states, *args, **kwargs)
        plan: _LayerPlan = self.__dict__[_PLAN]
        modules: Any = self._modules
        attention, mlp = modules[plan.attention], modules[plan.mlp]
        norm = plan.norm(self, plan.attention_norm)
        if plan.attention_output_norm is None:
            hidden_states, _ = attention(hidden_states=hidden_states, fused=(norm, hidden_states), **kwargs)
        else:
            output, _ = attention(hidden_states=hidden_states, fused=(norm, None), **kwargs)
            hidden_states = hidden_states + modules[plan.attention_output_norm](output)
        norm = plan.norm(self, plan.mlp_norm)
        if plan.mlp_output_norm is None:
            return mlp(hidden_states, (norm, hidden_states))
        return hidden_states + modules[plan.mlp_output_norm](mlp(hidden_states, (norm, None)))

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


@functools.cache
def _fused_attention(base: type[nn.Module]) -> type[nn.Module]:
    namespace = _namespace(base)
    keyword = cache_keyword(base.forward)

    @functools.wraps(base.forward)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        fused: tuple[Norm | None, Tensor | None] = (None, None),
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if args or position_embeddings is None or _is_any_autocast_enabled():
            return base.forward(self, hidden_states, position_embeddings, attention_mask, *args, **kwargs)
        plan: _AttentionPlan = self.__dict__[_PLAN]
        modules = self._modules
        norm, residual = fused
        merged = apply_merged((modules[plan.q], modules[plan.k], modules[plan.v]), hidden_states, norm)
        lead = hidden_states.shape[:-1]
        o = modules[plan.o]
        if plan.decodes and lead[1] == 1 and attention_mask is None and merged.device.type == "cpu":
            output = _decode(self, merged, position_embeddings, kwargs.get(keyword))
            if output is not None:
                return apply_linear(o, output, o._parameters["bias"], residual=residual), None
        heads = merged.view(*lead, -1, self.head_dim).transpose(1, 2)
        q_heads, k_heads, v_heads = (size // self.head_dim for size in plan.sizes)
        query, key, value = heads.split((q_heads, k_heads, v_heads), 1)
        if plan.q_norm is not None:
            query = modules[plan.q_norm](query)
        if plan.k_norm is not None:
            key = modules[plan.k_norm](key)
        cos, sin = position_embeddings
        # Looked up in each call: rotate_queries_and_keys replaces it.
        query, key = namespace["apply_rotary_pos_emb"](query, key, cos, sin)
        cache = kwargs.pop(keyword, None)
        if cache is not None:
            if keyword == "cache":
                key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
            else:
                own = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
                key, value = cache.update(key, value, self.layer_idx, own)
        interface = attention_function(
            namespace["ALL_ATTENTION_FUNCTIONS"],
            self.config._attn_implementation,
            namespace["eager_attention_forward"],
        )
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **dict(plan.arguments),
            **kwargs,
        )
        return apply_linear(o, output.reshape(*lead, -1), o._parameters["bias"], residual=residual), weights

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})


def _decode(attention: Any, qkv: Tensor, tables: tuple[Tensor, Any], cache: Any) -> Tensor | None:
    """One token through :func:`rcp_kernels.ops.decode_attention`; None where transformers has to do it.

    The cache's keys and values become views of larger storage, which holds the tokens to come too. Whoever replaces
    them (beams, cropping) has tensors of his own again, and the next token makes new storage.
    """
    cos, sin = tables
    index = attention.layer_idx
    if (
        type(cache) is not _dynamic_cache()
        or attention.config._attn_implementation != "sdpa"
        or torch.compiler.is_compiling()
        or attention.training
        or (torch.is_grad_enabled() and qkv.requires_grad)
        or attention.__dict__["_modules"].get("qk_rotation") is not None
        or index >= len(cache.layers)
        or getattr(cache, "offloading", False)
    ):
        return None
    layer = cache.layers[index]
    if type(layer) is not _dynamic_layer() or not layer.is_initialized:
        return None
    keys = layer.keys
    if keys.dtype != qkv.dtype or keys.dim() != 4 or keys.shape != layer.values.shape or cos.dtype != qkv.dtype:
        return None
    length = keys.shape[2]
    storage = layer.__dict__.get(_STORAGE)
    if storage is None or storage[2] is not keys or storage[3] is not layer.values or storage[0].shape[2] <= length:
        if length == 0:
            return None
        storage = [_with_room(keys), _with_room(layer.values), None, None]
        layer.__dict__[_STORAGE] = storage
    output = decode_attention(qkv, cos, sin, storage[0], storage[1], length, attention.scaling)
    layer.keys = storage[2] = storage[0].narrow(2, 0, length + 1)
    layer.values = storage[3] = storage[1].narrow(2, 0, length + 1)
    return output


def _with_room(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    storage = x.new_empty((batch, heads, (length // _GROWTH + 1) * _GROWTH, dim))
    storage[:, :, :length] = x
    return storage


@functools.cache
def _dynamic_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache


@functools.cache
def _dynamic_layer() -> Any:
    from transformers.cache_utils import DynamicLayer

    return DynamicLayer


@functools.cache
def _fused_mlp(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: Any, x: Tensor, fused: tuple[Norm | None, Tensor | None] = (None, None)) -> Tensor:
        if _is_any_autocast_enabled():
            return base.forward(self, x)
        plan: _MlpPlan = self.__dict__[_PLAN]
        modules = self._modules
        norm, residual = fused
        both = apply_merged((modules[plan.gate], modules[plan.up]), x, norm)
        down = modules[plan.down]
        return apply_linear(down, both, down._parameters["bias"], None, plan.activation, residual)

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})
