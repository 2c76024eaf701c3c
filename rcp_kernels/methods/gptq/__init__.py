"""GPTQ (Frantar et al. 2023, arXiv 2210.17323), for a weight and for a whole model. docs/gptq.md explains it."""

from .memory import device_bytes
from .quantize_model import LayerError, QuantizedLayers, gptq_quantize_model, gptq_quantize_weight

__all__ = [
    "LayerError",
    "QuantizedLayers",
    "device_bytes",
    "gptq_quantize_model",
    "gptq_quantize_weight",
]
