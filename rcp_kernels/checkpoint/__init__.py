"""A quantized language model on disk: a ``transformers`` directory with packed weights.

``config.json`` has a ``quantization_config`` (:class:`QuantizationConfig`). The safetensors files have the model's
``state_dict``, with the tensors of docs/format.md for each :class:`rcp_kernels.QuantLinear`.
"""

from .config import QUANT_METHOD, QuantizationConfig, read_quantization_config
from .files import check_output, file_sha256
from .load import load_quantized, verify
from .model_card import model_card, write_model_card
from .save import cast_floats, check_fits, save_quantized

__all__ = [
    "QUANT_METHOD",
    "QuantizationConfig",
    "cast_floats",
    "check_fits",
    "check_output",
    "file_sha256",
    "load_quantized",
    "model_card",
    "read_quantization_config",
    "save_quantized",
    "verify",
    "write_model_card",
]
