"""Models and text by the names that the command line takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig, load_quantized
from ..methods import corpus

__all__ = ["encode", "group_size_of", "held_out_text", "is_quantized", "load_any", "load_float", "training_text"]

_CHARACTERS_PER_TOKEN = 8  # of English about four; twice as many leave no doubt


def load_float(name: str) -> tuple[nn.Module, Any]:
    """A float32 language model and its tokenizer.

    Args:
        name: "demo", a .gguf file, a transformers directory, or a hub id.

    Raises:
        MissingExtra: a package is missing.
        ValueError: the model is quantized, by whatever method, or weights are missing from its files.
        OSError: no such model.
    """
    from .. import demo

    if name == "demo":
        return demo.load_model(demo.find_model_file())
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"model: {path} must be a .gguf file, got no such file; check the path")
        return demo.load_model(path)
    # A hub id is NAME or OWNER/NAME; transformers would look for a mistyped path there.
    if not path.is_dir() and (path.is_absolute() or name[:1] in (".", "~") or name.count("/") > 1):
        raise FileNotFoundError(f"model: {name} must be a model's directory, got no such directory; check the path")
    extras.require("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if path.is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quantization = getattr(AutoConfig.from_pretrained(name), "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(
            f"model: {name} must be a float model, got a quantized one (quant_method {method!r}); pass the one it was "
            f"made of"
        )
    tokenizer = AutoTokenizer.from_pretrained(name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"model: the files of {name} must have every weight, got {len(missing)} missing, {missing[:3]}; copy the "
            f"model again"
        )
    return model.eval(), tokenizer


def is_quantized(name: str) -> bool:
    """Whether this is a directory that ``rcp-kernels quantize`` wrote."""
    config = Path(name) / "config.json"
    try:
        fields = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    quantization = fields.get("quantization_config") if isinstance(fields, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def load_any(name: str) -> tuple[nn.Module, Any, QuantizationConfig | None]:
    """A quantized or float model, its tokenizer, and its quantization or None."""
    if not is_quantized(name):
        return (*load_float(name), None)
    extras.require("transformers")
    from transformers import AutoTokenizer

    model, config = load_quantized(Path(name))
    return model, AutoTokenizer.from_pretrained(name), config


def group_size_of(model: nn.Module, asked: int | None) -> int:
    """The group size asked for, or else the largest of 128, 64 and 32 that divides every linear layer's input."""
    if asked is not None:
        return asked
    sizes = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    return next((size for size in (128, 64, 32) if not any(features % size for features in sizes)), 128)


def encode(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens], without special tokens."""
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    return ids[0]


def training_text(name: str | None, tokens: int) -> tuple[str, dict[str, Any]]:
    """Text to calibrate or train on, and what a report should say of it.

    Args:
        name: a UTF-8 file, "dataset:NAME", or None for docstrings of what is installed.
        tokens: that will be used of it at most; a dataset is read no further.
    """
    if name is None:
        text = corpus.docstring_corpus()
        facts = {"documents": text.documents, "dropped_paragraphs": text.dropped, "sha256": text.sha256}
        return text.text, {"text": f"docstrings of {', '.join(corpus.PACKAGES)}", **facts}
    if name.startswith("dataset:"):
        text_ = corpus.dataset_text(name.partition(":")[2], "train", tokens * _CHARACTERS_PER_TOKEN)
    else:
        text_ = corpus.file_text(Path(name))
    return text_, {"text": name, "characters": len(text_)}


def held_out_text(text: Path | None, dataset: str | None, tokens: int) -> tuple[str, str]:
    """Text to measure perplexity on, and its name: a file, a dataset's test split, or pydoc's topics without either."""
    if text is not None:
        return corpus.file_text(text), str(text)
    if dataset is not None:
        return corpus.dataset_text(dataset, "test", tokens * _CHARACTERS_PER_TOKEN), dataset
    from ..demo import topics_text

    return topics_text(), "pydoc_data.topics"
