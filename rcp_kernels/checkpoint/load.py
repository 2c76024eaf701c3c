"""Read a quantized model's directory."""

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
    """Load a directory that :func:`save_quantized` or ``save_pretrained`` wrote, with ``from_pretrained``.

    If dtype is that of the directory, the logits are those of the saved model bit for bit.

    Args:
        directory: of the model.
        device: of the loaded model.
        dtype: of the tensors that are not packed. None for that of config.json.

    Returns:
        The model in eval mode, and its quantization. The model does not quantize keys and values: pass a
        :class:`rcp_kernels.nn.QuantizedKVCache` for that.

    Raises:
        MissingExtra: transformers or safetensors is missing.
        ValueError: a file is missing or damaged, does not fit the others, or is of a later version.
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
            f"load_quantized: the weights in {directory} must be complete safetensors files, got {error}; copy them "
            f"again"
        ) from None
    return model.eval(), config


def verify(directory: str | Path) -> None:
    """Compare the weights of a directory with the sha256 in its config.json.

    Loading does not do this, because it would read every byte a second time.

    Raises:
        ValueError: the digests differ, or config.json has none.
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
