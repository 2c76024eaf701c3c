"""Low-bit linear layers for language models: one packed format, one linear operator, one module."""

from . import ops
from . import triton as _triton_kernels  # noqa: F401  (registers its CUDA kernels with torch)
from .formats import PackedWeight
from .integrations import on_import
from .nn import OnlineRotation, QuantLinear, quantize_model, rotate_inputs
from .ops import lut_linear, quantize_activation, walsh_quantize, walsh_transform
from .ops.quantize_weight import quantize_weight
from .ops.walsh_matrices import gsr_matrix, hadamard_matrix, sequency_permutation, walsh_matrix

__version__ = "0.1.0"

__all__ = [
    "OnlineRotation",
    "PackedWeight",
    "QuantLinear",
    "__version__",
    "gsr_matrix",
    "hadamard_matrix",
    "lut_linear",
    "ops",
    "quantize_activation",
    "quantize_model",
    "quantize_weight",
    "rotate_inputs",
    "sequency_permutation",
    "walsh_matrix",
    "walsh_quantize",
    "walsh_transform",
]

on_import.install()
