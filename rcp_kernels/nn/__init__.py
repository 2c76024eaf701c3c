"""Modules on packed weights, and the rotation of what goes into them."""

from .online_rotation import OnlineRotation, rotate_inputs
from .quant_linear import QuantLinear
from .quantize_model import LayerReport, QuantizationReport, quantize_model

__all__ = ["LayerReport", "OnlineRotation", "QuantLinear", "QuantizationReport", "quantize_model", "rotate_inputs"]
