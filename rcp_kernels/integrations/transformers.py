"""Quantized models through ``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained`` (transformers 5).

Importing this module registers the method ``"rcp"`` with transformers. docs/integrations/transformers.md shows its use.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig, file_sha256, model_format_version
from ..formats import check_bits
from ..methods.rotate import ROTATIONS, apply_structure, rotate_model
from ..nn import QuantLinear, quantize_model

extras.require("transformers", "safetensors")

import transformers  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from transformers.modeling_utils import remove_tied_weights_from_state_dict  # noqa: E402
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

if int(transformers.__version__.partition(".")[0]) < 5:
    raise extras.MissingExtra(
        f"rcp_kernels.integrations.transformers: transformers must be 5 or later, got {transformers.__version__}; "
        f"run: pip install --upgrade transformers"
    )

__all__ = ["RcpConfig", "RcpHfQuantizer"]

_WHERE = "from_pretrained"
# In the header of the files that save_pretrained writes, which may be several: config.json is written before them.
_DIGEST = "rcp_sha256"


@register_quantization_config(QUANT_METHOD)
class RcpConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model: read from config.json, or given to quantize a float model while it loads.

    Attributes:
        stored: the QuantizationConfig that config.json has, or gets.
        rotation, levels, seed: of a float model that is quantized while it loads.
    """

    def __init__(
        self,
        bits: int = 2,
        group_size: int = 128,
        act_bits: int = 16,
        act_clip: float = 1.0,
        kv_bits: int = 16,
        kv_clip: float = 1.0,
        modules_to_not_convert: Iterable[str] = ("lm_head",),
        *,
        method: str = "rtn",
        levels: str = "kmeans",
        rotation: str = "none",
        seed: int = 0,
    ) -> None:
        """Ask ``from_pretrained`` to quantize a float model.

        Args:
            bits, group_size, act_bits, act_clip: as :func:`rcp_kernels.quantize_model`.
            kv_bits, kv_clip: of the key/value cache that the model is meant to run with; 4 or 16. Written into the
                config, not acted upon: pass a :class:`rcp_kernels.nn.QuantizedKVCache` to ``generate``.
            modules_to_not_convert: last components or full names of modules to leave in floating point.
            method: ``"rtn"``: each weight takes the nearest of its group's levels. The other methods need text.
            levels: how a group's levels are chosen: ``"kmeans"`` or ``"uniform"``.
            rotation: of the model before it is quantized, one of :data:`rcp_kernels.methods.rotate.ROTATIONS`, in
                groups of group_size; with R3 only where kv_bits is 4.
            seed: of the rotation's random signs.

        Raises:
            ValueError: an argument outside its set, or a method that needs text, with the command that runs it.
            TypeError: modules_to_not_convert is one name.
        """
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                f"RcpConfig: modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}; pass "
                f"[{modules_to_not_convert!r}]"
            )
        check_bits(bits)
        if method != "rtn":
            raise ValueError(
                f'RcpConfig: method must be "rtn", the one that needs no text, got {method!r}; run `rcp-kernels '
                f"quantize MODEL --method gptq|rcp|laquant --out DIR` and load DIR"
            )
        if kv_bits not in (4, 16):
            raise ValueError(f"RcpConfig: kv_bits must be 4 or 16, got {kv_bits!r}; 16 leaves the cache as it is")
        if levels not in ("kmeans", "uniform"):
            raise ValueError(f'RcpConfig: levels must be "kmeans" or "uniform", got {levels!r}; check the spelling')
        if rotation not in ROTATIONS:
            raise ValueError(f"RcpConfig: rotation must be one of {ROTATIONS}, got {rotation!r}; check the spelling")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.stored = QuantizationConfig(
            bits, group_size, act_bits, act_clip, kv_bits, kv_clip, None, tuple(modules_to_not_convert)
        )
        try:  # by the rules of what will be written, and before a model is loaded
            QuantizationConfig.from_dict(self.stored.to_dict())
        except ValueError as error:
            rule = str(error).removeprefix("quantization_config: ").partition("; ")[0]
            raise ValueError(f"RcpConfig: {rule}; pass another") from None
        self.levels = levels
        self.rotation = rotation
        self.seed = seed

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: as :meth:`rcp_kernels.checkpoint.QuantizationConfig.from_dict`.
        """
        stored = QuantizationConfig.from_dict(config_dict)
        config = cls(stored.bits)
        config.stored = stored
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json has: :meth:`rcp_kernels.checkpoint.QuantizationConfig.to_dict`."""
        return self.stored.to_dict()


@register_quantizer(QUANT_METHOD)
class RcpHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with an :class:`RcpConfig`.

    transformers sets the tensors of a checkpoint one by one as attributes of modules, and fills what is missing with
    random numbers. So it is only given the floating point part of a model; the packed layers are absent until that is
    done, and are then loaded from the same files as ``load_state_dict`` does it, each checked and packed once.
    """

    quantization_config: RcpConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if len(devices) > 1:
            _refuse_several(devices)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        saved = model.config.architectures
        if saved and type(model).__name__ not in saved:
            raise ValueError(
                f"{_WHERE}: the model must be of the class that config.json names, {saved[0]}, got "
                f"{type(model).__name__}; load it with that class, or AutoModelForCausalLM"
            )
        stored = self.quantization_config.stored
        self._checkpoint = _Checkpoint(kwargs.get("checkpoint_files"), stored.sha256)
        if stored.rotation is not None:
            apply_structure(model, stored.rotation)
        self._layers: dict[str, QuantLinear] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name not in stored.modules_to_not_convert:
                self._layers[name] = QuantLinear(
                    module.in_features,
                    module.out_features,
                    stored.bits,
                    stored.group_size,
                    stored.act_bits,
                    module.bias is not None,
                    stored.act_clip,
                    getattr(module, "input_rotation", None),
                    device="meta",
                )
                _put(model, name, nn.Identity())
        expected = set(model.state_dict())
        found = {name for name in self._checkpoint.names if name.rpartition(".")[0] not in self._layers}
        missing = sorted(expected - found - set(model.all_tied_weights_keys))
        unexpected = sorted(found - expected)
        if missing or unexpected:
            raise ValueError(
                f"{_WHERE}: the files must have the tensors of {type(model).__name__}, got {missing[:3]} missing and "
                f"{unexpected[:3]} unknown; copy config.json and the weights again"
            )
        # transformers warns of every tensor that it was not asked to load.
        packed = f"^({'|'.join(map(re.escape, self._layers))})\\."
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), packed}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        devices = set(map(str, getattr(model, "hf_device_map", {}).values()))
        if len(devices) > 1:
            _refuse_several(devices)
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in self._layers.items():
                tensors = self._checkpoint.layer(name, model.device)
                if "bias" in tensors:
                    tensors["bias"] = tensors["bias"].to(model.config.dtype)
                try:
                    layer.load_state_dict(tensors, assign=True)
                except RuntimeError as error:
                    raise ValueError(
                        f"{_WHERE}: {name} must fit config.json, got {error}; copy config.json and the weights again"
                    ) from None
                _put(model, name, layer.eval())
            del self._checkpoint, self._layers
        else:
            stored = config.stored
            rotation = None
            if config.rotation != "none":
                rotation = rotate_model(
                    model,
                    config.rotation,
                    group_size=stored.group_size,
                    r3=stored.kv_bits != 16,
                    seed=config.seed,
                )
            report = quantize_model(
                model,
                stored.bits,
                stored.group_size,
                stored.act_bits,
                config.levels,
                stored.modules_to_not_convert,
                stored.act_clip,
            )
            config.stored = dataclasses.replace(stored, rotation=rotation, modules_to_not_convert=tuple(report.kept))
        # sha256 is of the file that was read, and model.config goes into the next one.
        config.stored = dataclasses.replace(config.stored, sha256=None, format_version=model_format_version(model))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = remove_tied_weights_from_state_dict(model.state_dict(), model)
        return state, {_DIGEST: _digest(state, state.__getitem__)}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Checkpoint:
    """The safetensors files of a model, found to be what was written."""

    def __init__(self, files: Iterable[str] | None, sha256: str | None) -> None:
        paths = [Path(file) for file in files or ()]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            raise ValueError(
                f"{_WHERE}: the weights must be safetensors files, got {[path.name for path in paths] or 'none'}; pass "
                f"a directory that rcp-kernels quantize or save_pretrained wrote"
            )
        if sha256 is not None and (len(paths) > 1 or file_sha256(paths[0]) != sha256):
            raise ValueError(
                f"{_WHERE}: the sha256 of {paths[0]} must be the one in config.json, got another: the file was "
                f"truncated or altered since; copy it again"
            )
        self._file_of: dict[str, Any] = {}  # by tensor
        digests = set()
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{_WHERE}: {path} must be a safetensors file, got {error}; copy it again") from None
            digests.add((file.metadata() or {}).get(_DIGEST))
            self._file_of.update(dict.fromkeys(file.keys(), file))
        if digests != {None} and digests != {_digest(self._file_of, self._tensor)}:
            raise ValueError(
                f"{_WHERE}: the sha256 of the tensors in {paths[0]} must be the one in its header, got another: a file "
                f"was altered or replaced since; copy the directory again"
            )
        self.names = set(self._file_of)

    def _tensor(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def layer(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors right below a module, without its name."""
        keys = [key for key in self._file_of if key.rpartition(".")[0] == name]
        return {key.rpartition(".")[2]: self._tensor(key).to(device) for key in keys}


def _digest(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, in the order of the names, however they are split into files."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = tensor_of(name).detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _refuse_several(devices: Iterable[str]) -> None:
    raise ValueError(
        f"{_WHERE}: device_map must name one device, got {sorted(devices)}; packed layers take no part in offloading: "
        f'use device_map={{"": device}}'
    )
