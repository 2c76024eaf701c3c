"""Reading a quantized model's directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .. import extras
from ..models import hf
from .config import CONFIG, QuantizationConfig, read_quantization_config
from .files import file_sha256
from .save import WEIGHTS

__all__ = ["load_quantized", "verify"]


def load_quantized(
    directory: str | Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Module, QuantizationConfig]:
    """Load a directory that :func:`save_quantized` or ``save_pretrained`` wrote: ``from_pretrained``, and its config.

    The logits are those of the saved model, bit for bit, if dtype is that of the directory.

    Args:
        directory: of the model.
        device: to load it to.
        dtype: of what is not packed; config.json's without it.

    Returns:
        The model in eval mode, and its quantization. Keys and values are quantized by the cache that the caller passes
        (:class:`rcp_kernels.nn.QuantizedKVCache`), not by the model.

    Raises:
        MissingExtra: transformers or safetensors is missing.
        ValueError: a file is missing or damaged, does not fit the others, or is from a later version.
    """
    extras.require("transformers", "safetensors")
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(directory)
    _, config = read_quantization_config(directory)
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"load_quantized: {directory / WEIGHTS} must be there, got no such file; quantize the model again"
        )
    try:
        AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"load_quantized: {directory / CONFIG} must describe a language model of transformers, got "
            f"{type(error).__name__}: {error}; copy it again"
        ) from None
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": torch.device(device)}}
    try:
        with hf.without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype="auto" if dtype is None else dtype, local_files_only=True, **placed
            )
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"load_quantized: the weights in {directory} must be whole safetensors files, got {error}; copy them again"
        ) from None
    return model.eval(), config


def verify(directory: str | Path) -> None:
    """Compare the weights of a directory with the sha256 that :func:`save_quantized` wrote into config.json.

    Loading does not do this: it would read every byte once more.

    Raises:
        ValueError: they differ, or there is no digest to compare with.
    """
    directory = Path(directory)
    _, config = read_quantization_config(directory)
    path = directory / WEIGHTS
    if config.sha256 is None:
        raise ValueError(
            f"verify: {directory / CONFIG} must have the sha256 of {WEIGHTS}, got none; only save_quantized and "
            f"rcp-kernels quantize write one"
        )
    if not path.is_file() or file_sha256(path) != config.sha256:
        raise ValueError(
            f"verify: the sha256 of {path} must be the one in {CONFIG}, got another: the file was truncated or altered "
            f"since; copy it again"
        )
