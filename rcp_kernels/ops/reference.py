"""The operators in plain torch, for tests and for users who want to check a result (docs/numerics.md).

Integers are exact and the outer sum is float64; slow, and clear.
"""

from .lut_linear import lut_linear_group_sums_reference as lut_linear_group_sums
from .lut_linear import lut_linear_reference as lut_linear
from .quantize_activation import quantize_activation_reference as quantize_activation
from .walsh_transform import walsh_quantize_reference as walsh_quantize
from .walsh_transform import walsh_transform_reference as walsh_transform

__all__ = ["lut_linear", "lut_linear_group_sums", "quantize_activation", "walsh_quantize", "walsh_transform"]
