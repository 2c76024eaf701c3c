"""LAQuant: layer-wise training with a loss behind the next layer. docs/laquant.md explains it."""

from .memory import device_bytes
from .quantize_model import LaquantConfig, LaquantResult, laquant_quantize_model

__all__ = [
    "LaquantConfig",
    "LaquantResult",
    "device_bytes",
    "laquant_quantize_model",
]
