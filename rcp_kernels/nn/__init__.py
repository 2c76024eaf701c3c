"""Modules on packed weights."""

from .quant_linear import QuantLinear
from .quantize_model import LayerReport, QuantizationReport, quantize_model

__all__ = ["LayerReport", "QuantLinear", "QuantizationReport", "quantize_model"]
