"""Models by name, quantized or float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig, load_quantized
from ..hardware import choose_device
from ..models.load import load_float, source_dtype

__all__ = ["is_quantized", "load_any"]


def is_quantized(name: str) -> bool:
    """Whether ``name`` is a directory that ``rcp-kernels quantize`` wrote."""
    try:
        fields = json.loads((Path(name) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    quantization = fields.get("quantization_config") if isinstance(fields, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_any(
    name: str, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Any, QuantizationConfig | None]:
    """A model, its tokenizer, and its quantization (None for a float model).

    Args:
        name: a directory that ``rcp-kernels quantize`` wrote, or a float model as
            :func:`rcp_kernels.models.load.load_float` takes it.
        device: of the model, as :func:`rcp_kernels.hardware.choose_device` takes it.
        dtype: of everything that is not packed. None: float32 on the CPU, and the dtype that the model is stored in on
            another device. On the CPU a perplexity then shows the quantization and not the rounding of bfloat16. On a
            GPU float32 would double the memory of a float model, and the model is served in its own dtype.

    Raises:
        MissingExtra, ValueError, OSError: as choose_device, :func:`rcp_kernels.models.load.load_float` and
            :func:`rcp_kernels.checkpoint.load_quantized`.
    """
    device = choose_device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if not is_quantized(name):
        return (*load_float(name, device, source_dtype(name) if dtype is None else dtype), None)
    extras.require("transformers")
    from transformers import AutoTokenizer

    model, config = load_quantized(name, device, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(name), config
