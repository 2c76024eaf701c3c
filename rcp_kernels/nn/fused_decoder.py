"""Decoder layers of ``transformers`` that run their norms, activations and residual sums inside the packed layers.

docs/fused_decoding.md says what changes and how equal the results are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..models.architecture import describe
from ..models.hf import attention_function, cache_keyword
from ..ops.decode_attention import decode_attention
from .fused_plan import AttentionPlan, LayerPlan, MlpPlan, namespace_of, plan_layer
from .merged_linear import Norm, apply_linear, apply_merged, merge_linears, split_linears

__all__ = ["fuse_decoder", "is_fused", "unfuse_decoder"]

_PLAN = "_rcp_fused"
_STORAGE = "_rcp_storage"
# Storage of keys and values grows by this many positions.
_GROWTH = 256
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def fuse_decoder(model: nn.Module, attention: bool = True) -> None:
    """Make a model's decoder layers run norms, gated activations and residual sums inside the packed layers.

    In place; :func:`unfuse_decoder` undoes it. q, k and v become one weight, and so do gate and up, if one weight gives
    the same bits. Each token is then quantized once for all of them. ``state_dict`` and ``save_pretrained`` give the
    same tensors as before. Under ``torch.autocast`` the layers run their original forward.

    The result differs from the original model's by the norm, whose float32 sum has another order, and by float32
    rounding of the activation (docs/fused_decoding.md).

    Args:
        model: a causal language model of transformers, of a family in ``rcp_kernels.models.families``, with all seven
            linear layers of each decoder layer packed.
        attention: use :func:`rcp_kernels.ops.decode_attention` for one new token of each sequence on the CPU. It needs
            implementation ``"sdpa"``, a plain DynamicCache, and no mask, window, softcap or R3; other
            attention stays in transformers. False leaves all attention to transformers.

    Raises:
        ValueError: the model is fused already, is of another family, or has a part that the fused layers do not
            compute; the message names it. The model does not change then.
    """
    if is_fused(model):
        raise ValueError(
            "fuse_decoder: the model must not be fused yet, got one that is; call unfuse_decoder(model) first"
        )
    architecture = describe(model)
    plans = [plan_layer(model, architecture, layer, attention) for layer in architecture.layers]
    for layer, (layer_plan, attention_plan, mlp_plan) in zip(architecture.layers, plans, strict=True):
        for names in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
            merge_linears([model.get_submodule(name) for name in names])  # type: ignore[misc]  # plan_layer checked it
        module = model.get_submodule(layer.name)
        for target, plan, make in (
            (module, layer_plan, _fused_layer),
            (model.get_submodule(layer.attention), attention_plan, _fused_attention),
            (module.get_submodule(layer_plan.mlp), mlp_plan, _fused_mlp),
        ):
            target.__dict__[_PLAN] = plan
            target.__class__ = make(type(target))  # type: ignore[arg-type]  # classes are hashable
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is nn.Linear:
        head.__dict__[_PLAN] = None
        head.__class__ = _Head


def unfuse_decoder(model: nn.Module) -> None:
    """Undo :func:`fuse_decoder`: restore the classes of the layers, and each layer's weight bit for bit.

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
    """Whether :func:`fuse_decoder` has fused a layer of the model."""
    return any(_PLAN in module.__dict__ for module in model.modules())


class _Head(nn.Linear):
    """A float head for the last token of a prompt.

    transformers passes ``hidden[:, -1:]``, with the strides of the whole prompt. For such strides torch 2.13 copies a
    frozen weight and multiplies by bmm: 2.6 s for the head of LLaMA-2-7B in bfloat16 on one core, instead of 0.02 s.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() > 1 and input.shape[-2] == 1:
            input = input.clone(memory_format=torch.contiguous_format)
        return super().forward(input)


# Each class is made once for a class of transformers. It is a subclass of it: isinstance checks still hold.


@functools.cache
def _fused_layer(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or _is_any_autocast_enabled():
            return base.forward(self, hidden_states, *args, **kwargs)
        plan: LayerPlan = self.__dict__[_PLAN]
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
    namespace = namespace_of(base)
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
        plan: AttentionPlan = self.__dict__[_PLAN]
        modules = self._modules
        norm, residual = fused
        merged = apply_merged((modules[plan.q], modules[plan.k], modules[plan.v]), hidden_states, norm)
        lead = hidden_states.shape[:-1]
        o = modules[plan.o]
        if plan.decodes and lead[1] == 1 and attention_mask is None and merged.device.type == "cpu":
            output = _decode(self, plan, merged, position_embeddings, kwargs.get(keyword))
            if output is not None:
                return apply_linear(o, output, o._parameters["bias"], residual=residual), None
        heads = merged.view(*lead, -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split([size // self.head_dim for size in plan.sizes], 1)
        if plan.q_norm is not None:
            query = modules[plan.q_norm](query)
        if plan.k_norm is not None:
            key = modules[plan.k_norm](key)
        cos, sin = position_embeddings
        # Looked up in each call, as rotate_queries_and_keys replaces it.
        query, key = namespace["apply_rotary_pos_emb"](query, key, cos, sin)
        cache = kwargs.pop(keyword, None)
        if cache is not None and keyword == "cache":
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        elif cache is not None:
            rope = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            key, value = cache.update(key, value, self.layer_idx, rope)
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


def _decode(attention: Any, plan: AttentionPlan, qkv: Tensor, tables: tuple[Tensor, Any], cache: Any) -> Tensor | None:
    """The attention of one token by :func:`rcp_kernels.ops.decode_attention`, or None if it does not apply.

    The cache's keys and values become views of larger storage with room for later tokens. If other code replaces these
    views (beam search, cropping), the next token allocates new storage.
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
    if plan.q_norm is not None and plan.k_norm is not None:
        heads = qkv.view(*qkv.shape[:2], -1, attention.head_dim)
        query, key, value = heads.split([size // attention.head_dim for size in plan.sizes], 2)
        query, key = attention._modules[plan.q_norm](query), attention._modules[plan.k_norm](key)
        qkv = torch.cat([query, key, value], 2).view(qkv.shape)
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
        plan: MlpPlan = self.__dict__[_PLAN]
        modules = self._modules
        norm, residual = fused
        both = apply_merged((modules[plan.gate], modules[plan.up]), x, norm)
        down = modules[plan.down]
        return apply_linear(down, both, down._parameters["bias"], None, plan.activation, residual)

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__module__": base.__module__})
