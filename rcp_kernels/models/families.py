"""The supported families of decoder-only language models.

Names are those of ``transformers``. A model of another library works if it uses the same names. To add a family, add an
entry to `FAMILIES`; docs/rotate.md has the requirements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """The module names of a family. Names inside a decoder layer are relative to the layer.

    Attributes:
        embed, layers, final_norm, head: the token embedding, the list of decoder layers, the norm before the output
            head, and the output head.
        attention: the attention module, whose forward calls ``apply_rotary_pos_emb``.
        q, k, v, o, gate, up, down: the linear layers.
        attention_norm, mlp_norm: the norms before q, k, v and before gate, up.
        attention_output_norm, mlp_output_norm: norms between o or down and the residual stream, or None.
        q_norm, k_norm: norms of each head before RoPE, or None.
        gain_offset: a norm multiplies by ``gain_offset + weight``. 0, or 1 for families whose weights are around zero.
        attention_arguments: arguments of transformers' attention function beyond dropout and scaling: pairs of an
            argument's name and the attribute of the attention module that is passed.
    """

    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention_output_norm: str | None = None
    mlp_output_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    gain_offset: float = 0.0
    attention_arguments: tuple[tuple[str, str], ...] = ()


_WINDOW = (("sliding_window", "sliding_window"),)
_GEMMA2 = Family(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    gain_offset=1.0,
    attention_arguments=(*_WINDOW, ("softcap", "attn_logit_softcapping")),
)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(attention_arguments=(("sliding_window", "config.sliding_window"),)),
    "qwen2": Family(attention_arguments=_WINDOW),
    "qwen3": Family(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", attention_arguments=_WINDOW),
    "gemma": Family(gain_offset=1.0),
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", attention_arguments=_WINDOW),
}
"""Families by ``config.model_type``."""
