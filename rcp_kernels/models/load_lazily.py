"""Float models whose decoder weights stay in their files until a method reads them, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .. import extras
from . import hf
from .architecture import describe
from .families import FAMILIES
from .lazy import set_source
from .load import check_loading, damaged_config, load_float, read_config, weight_files

__all__ = ["can_load_lazily", "load_lazily"]


def can_load_lazily(name: str) -> bool:
    """Whether ``name`` is a directory of safetensors files of a family in :data:`rcp_kernels.models.FAMILIES`."""
    return bool(weight_files(Path(name))) and read_config(name).model_type in FAMILIES


def load_lazily(name: str) -> tuple[nn.Module, Any]:
    """:func:`rcp_kernels.models.load.load_float` without the weights of the decoder's linear layers.

    These lie on the meta device, in float32, and are read from the files when :func:`rcp_kernels.models.lazy.values_of`
    asks for them. The rest of the model is in memory. Methods that walk the model layer by layer give the same bits as
    with the whole model in memory.

    Args:
        name: a directory for which :func:`can_load_lazily`.

    Raises:
        MissingExtra, ValueError, OSError: as :func:`rcp_kernels.models.load.load_float`. Reading a weight raises
            ValueError if it has NaN or Inf.
    """
    extras.require("transformers", "safetensors")
    from safetensors import SafetensorError, safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = read_config(name)
    if getattr(config, "quantization_config", None) is not None:
        return load_float(name)  # refuses it
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    files: dict[str, Any] = {}  # by tensor
    for path in weight_files(Path(name)):
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(
                f"model: the weights of {name} must be whole safetensors files, got {error}; copy the model again"
            ) from None
        files.update(dict.fromkeys(file.keys(), file))
    try:
        with _linears_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except TypeError as error:  # transformers 5.0 does not check the fields of a config
        raise damaged_config(name, error) from None
    model.tie_weights()
    stored = hf.file_names(model, files)
    parameters = dict(model.named_parameters())  # one name for each tied one
    mismatched = [
        each
        for each, parameter in parameters.items()
        if each in stored and tuple(files[stored[each]].get_slice(stored[each]).get_shape()) != tuple(parameter.shape)
    ]
    report = {
        "missing_keys": parameters.keys() - stored.keys(),
        "unexpected_keys": stored.keys() - model.state_dict().keys(),
        "mismatched_keys": mismatched,
    }
    check_loading(name, model, report)
    later = {f"{linear}.weight" for layer in describe(model).layers for linear in layer.linears}
    for each, parameter in parameters.items():
        source = _Reader(each, files[stored[each]], stored[each])
        if each in later:
            set_source(parameter, source)
        else:
            _set(model, each, parameter, source(torch.device("cpu")))
    model.tie_weights()
    return model.eval(), tokenizer


class _Reader:
    """Reads a parameter, in float32, from a safetensors file."""

    def __init__(self, name: str, file: Any, stored: str) -> None:
        self.name = name
        self._file = file
        self._stored = stored

    def __call__(self, device: torch.device) -> Tensor:
        values: Tensor = self._file.get_tensor(self._stored).to(device).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"quantize: {self.name} must be finite, got NaN or Inf; check the checkpoint for overflow")
        return values


def _set(model: nn.Module, name: str, parameter: nn.Parameter, values: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, nn.Parameter(values, parameter.requires_grad))


@contextlib.contextmanager
def _linears_on_meta() -> Iterator[None]:
    """Linear layers that are made inside the ``with`` block have their parameters on the meta device."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if not isinstance(module, nn.Linear) or parameter is None:
            return None  # changes nothing
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]  # torch forgets the result
    try:
        yield
    finally:
        handle.remove()
