"""The operators in plain torch, for tests and for users who check a result (docs/numerics.md).

They are slow. Integers are exact, and the outer sum is float64.
"""

from .clip_search import clip_search_reference as clip_search
from .decode_attention import decode_attention_reference as decode_attention
from .gptq_round import gptq_round_reference as gptq_round
from .kmeans_levels import kmeans_levels_reference as kmeans_levels
from .kv_cache import kv_cache_append_reference as kv_cache_append
from .kv_cache import kv_cache_attention_reference as kv_cache_attention
from .kv_cache import kv_cache_dequantize_reference as kv_cache_dequantize
from .lut_linear import lut_linear_group_sums_reference as lut_linear_group_sums
from .lut_linear import lut_linear_reference as lut_linear
from .lut_linear_fused import prologue_reference as prologue
from .nearest_codes import nearest_codes_reference as nearest_codes
from .quantize_activation import quantize_activation_reference as quantize_activation
from .token_prologue import gated_activation_reference as gated_activation
from .token_prologue import rms_norm_reference as rms_norm
from .walsh_transform import walsh_quantize_reference as walsh_quantize
from .walsh_transform import walsh_transform_reference as walsh_transform

__all__ = [
    "clip_search",
    "decode_attention",
    "gated_activation",
    "gptq_round",
    "kmeans_levels",
    "kv_cache_append",
    "kv_cache_attention",
    "kv_cache_dequantize",
    "lut_linear",
    "lut_linear_group_sums",
    "nearest_codes",
    "prologue",
    "quantize_activation",
    "rms_norm",
    "walsh_quantize",
    "walsh_transform",
]
