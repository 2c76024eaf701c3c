"""Models by name, quantized or float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig, load_quantized
from ..models.load import load_float

__all__ = ["is_quantized", "load_any"]


def is_quantized(name: str) -> bool:
    """Whether ``name`` is a directory that ``rcp-kernels quantize`` wrote."""
    try:
        fields = json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    quantization = fields.get("quantization_config") if isinstance(fields, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_any(name: str) -> tuple[nn.Module, Any, QuantizationConfig | None]:
    """A model in float32, its tokenizer, and its quantization (None for a float model).

    A quantized model is loaded in float32 too: its perplexity then shows the quantization, not bfloat16's rounding.

    Raises:
        MissingExtra, ValueError, OSError: as :func:`rcp_kernels.models.load.load_float` and
            :func:`rcp_kernels.checkpoint.load_quantized`.
    """
    if not is_quantized(name):
        return (*load_float(name), None)
    extras.require("transformers")
    from transformers import AutoTokenizer

    model, config = load_quantized(name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(name), config
