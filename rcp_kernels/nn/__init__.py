"""Modules with packed weights, rotations of their inputs, and the quantized key-value cache."""

from typing import TYPE_CHECKING, Any

from .online_rotation import OnlineRotation, rotate_inputs
from .quant_linear import QuantLinear
from .quantize_model import LayerReport, QuantizationReport, quantize_model
from .report import FloatPart, StorageReport, storage_report
from .rotated_linear import RotatedLinear

if TYPE_CHECKING:
    from .fused_decoder import fuse_decoder as fuse_decoder
    from .fused_decoder import is_fused as is_fused
    from .fused_decoder import unfuse_decoder as unfuse_decoder
    from .kv_cache import QuantizedKVCache as QuantizedKVCache

__all__ = [
    "FloatPart",
    "LayerReport",
    "OnlineRotation",
    "QuantLinear",
    "QuantizationReport",
    "RotatedLinear",
    "StorageReport",
    "quantize_model",
    "rotate_inputs",
    "storage_report",
]


def __getattr__(name: str) -> Any:
    """Import the names that need transformers, which is optional and takes a second to import."""
    if name in ("fuse_decoder", "is_fused", "unfuse_decoder"):
        from . import fused_decoder

        return getattr(fused_decoder, name)
    if name == "QuantizedKVCache":
        from .kv_cache import QuantizedKVCache

        return QuantizedKVCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
