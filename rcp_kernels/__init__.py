"""Low-bit linear layers for language models: one packed format, one linear operator, one module."""

from . import ops
from .formats import PackedWeight
from .nn import QuantLinear, quantize_model
from .ops import lut_linear, quantize_activation
from .quantize import quantize_weight

__version__ = "0.1.0"

__all__ = [
    "PackedWeight",
    "QuantLinear",
    "__version__",
    "lut_linear",
    "ops",
    "quantize_activation",
    "quantize_model",
    "quantize_weight",
]
