"""Quantized models through ``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained`` (transformers 5).

Importing this module registers the method ``"rcp"`` with transformers; ``import rcp_kernels`` sees to that as soon as
transformers is there (``on_import``). docs/integrations/transformers.md shows its use.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig
from ..formats import check_bits
from ..methods.rotate.rotate_model import ROTATIONS, apply_structure, rotate_model
from ..models import hf
from ..nn import QuantLinear, quantize_model

extras.require("transformers", "safetensors")

import transformers  # noqa: E402
from safetensors import SafetensorError, safe_open  # noqa: E402
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

if int(transformers.__version__.partition(".")[0]) < 5:
    raise extras.MissingExtra(
        f"rcp_kernels.integrations.transformers: transformers must be 5 or later, got {transformers.__version__}; "
        f"run: pip install --upgrade transformers"
    )

__all__ = ["RcpConfig", "RcpHfQuantizer"]

_WHERE = "from_pretrained"


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
        modules_to_not_convert: Iterable[str] | None = None,
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
            modules_to_not_convert: last components or full names of modules to leave in floating point; None for
                ``["lm_head"]``.
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
        kept = ("lm_head",) if modules_to_not_convert is None else tuple(modules_to_not_convert)
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
        self.stored = QuantizationConfig(bits, group_size, act_bits, act_clip, kv_bits, kv_clip, None, kept)
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

    def to_diff_dict(self) -> dict[str, Any]:
        """What transformers 5.0 prints."""
        return self.to_dict()

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

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float64:
            raise ValueError(
                f"{_WHERE}: dtype must be float32, float16 or bfloat16, got {dtype}; packed layers take no float64"
            )
        return dtype

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
        if stored.rotation is not None:
            apply_structure(model, stored.rotation)
        self._checkpoint = _Checkpoint(kwargs.get("checkpoint_files"), model)
        head = model.get_output_embeddings()
        self._layers: dict[str, QuantLinear] = {}
        for name, module in list(model.named_modules()):
            if not isinstance(module, nn.Linear) or name in stored.modules_to_not_convert:
                continue
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
            model.set_submodule(name, _Waiting(module))
            if module is head:
                hf.untie_head(model, name)
        self._checkpoint.check_shapes(model)
        hf.watch_loading(model, self._layers, lambda missing, unknown: self._check_names(model, missing, unknown))

    def _check_names(self, model: Any, missing: set[str], unknown: set[str]) -> None:
        missing = {name for name in missing if name not in model.all_tied_weights_keys}
        if missing or unknown:
            raise ValueError(
                f"{_WHERE}: the files must have the tensors of {type(model).__name__}, got {sorted(missing)[:3]} "
                f"missing and {sorted(unknown)[:3]} unknown; {_remedy(model)}"
            )

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
                    raise ValueError(f"{_WHERE}: {name} must fit config.json, got {error}; {_remedy(model)}") from None
                model.set_submodule(name, layer.eval())
            del self._checkpoint, self._layers
            return model
        stored = config.stored
        rotation = None
        if config.rotation != "none":
            rotation = rotate_model(
                model, config.rotation, group_size=stored.group_size, r3=stored.kv_bits != 16, seed=config.seed
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
        head = model.get_output_embeddings()
        if isinstance(head, QuantLinear):
            hf.untie_head(model, next(name for name, module in model.named_modules() if module is head))
        # Whether the model could be saved is asked when it is.
        config.stored = dataclasses.replace(stored, rotation=rotation, modules_to_not_convert=tuple(report.kept))
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the packed layers by float ones that compute the same, a rotation of their input folded in."""
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, QuantLinear):
                continue
            weight = layer.dequantize()
            if layer.input_rotation is not None:
                weight = layer.input_rotation.inverse(weight)  # row by row: w . (R x) = (R^T w) . x
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not checkpoint.has_packed_layers(model):
            raise ValueError("save_pretrained: the model must have packed layers, got none; dequantize() it first")
        known = _known(model) or self.quantization_config.stored
        state, self.quantization_config.stored = checkpoint.checked_state(model, known)
        model.config.quantization_config = self.quantization_config
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Waiting(nn.Module):
    """Stands where a packed layer will be while transformers loads and initializes the rest of the model.

    weight and bias are no parameters, so that nothing is loaded into them. Some models read them while they initialize
    what the files lack; the mark tells transformers' initializers to leave them alone.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            parameter = getattr(linear, name)
            stand_in = None if parameter is None else torch.empty_like(parameter, device="meta").detach()
            if stand_in is not None:
                stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, stand_in)


class _Checkpoint:
    """The safetensors files of a model.

    Attributes:
        names: of the tensors in the files, by the names that the model has for them.
    """

    def __init__(self, files: Iterable[str] | None, model: nn.Module) -> None:
        paths = [Path(file) for file in files or ()]
        if not paths or any(path.suffix != ".safetensors" for path in paths):
            raise ValueError(
                f"{_WHERE}: the weights must be safetensors files, got {[path.name for path in paths] or 'none'}; pass "
                f"a directory that rcp-kernels quantize or save_pretrained wrote"
            )
        self._file_of: dict[str, Any] = {}  # by tensor
        for path in paths:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{_WHERE}: {path} must be a safetensors file, got {error}; copy it again") from None
            self._file_of.update(dict.fromkeys(file.keys(), file))
        self.names = hf.file_names(model, self._file_of)

    def check_shapes(self, model: nn.Module) -> None:
        """Refuse float tensors of other shapes than the model's, which transformers 5.0 fills with random numbers.

        Raises:
            ValueError: names the tensor and both shapes.
        """
        for key, tensor in model.state_dict().items():
            if key in self.names:  # not what transformers merges or splits
                stored = self.names[key]
                found = tuple(self._file_of[stored].get_slice(stored).get_shape())
                if found != tuple(tensor.shape):
                    raise ValueError(
                        f"{_WHERE}: {key} must have the shape that config.json gives it, {tuple(tensor.shape)}, got "
                        f"{found}: a mismatch; {_remedy(model)}"
                    )

    def layer(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a packed layer, without its name."""
        found = {
            key.removeprefix(f"{name}."): stored for key, stored in self.names.items() if key.startswith(f"{name}.")
        }
        return {key: self._file_of[stored].get_tensor(stored).to(device) for key, stored in found.items()}


def _remedy(model: nn.Module) -> str:
    """What to do about files that do not fit: the layers of some families differ between releases of transformers."""
    written: Any = getattr(model.config, "transformers_version", None)
    remedy = "copy config.json and the weights again"
    if written not in (None, transformers.__version__):
        remedy += f", or load them with transformers {written}, which wrote them (this is {transformers.__version__})"
    return remedy


def _refuse_several(devices: Iterable[str]) -> None:
    raise ValueError(
        f"{_WHERE}: device_map must name one device, got {sorted(devices)}; packed layers take no part in offloading: "
        f'use device_map={{"": device}}'
    )


@contextmanager
def _saving(model: nn.Module) -> Iterator[None]:
    """Have ``save_pretrained`` write a packed model as one, however its layers came to be packed.

    Raises:
        ValueError: another quantizer made the model.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not checkpoint.has_packed_layers(model):
        online = checkpoint.online_rotations(model)
        if online:
            attribute, path = next(iter(online.items()))
            warnings.warn(
                f"save_pretrained: this float model rotates while it runs ({attribute} in {path}), which config.json "
                f"does not say: after loading it call rcp_kernels.methods.rotate.apply_structure(model, record)",
                stacklevel=4,
            )
        if _known(model) is not None:
            raise ValueError(
                "save_pretrained: a model whose config has a quantization_config of rcp-kernels must have packed "
                "layers, got none; load the directory with from_pretrained, or delete config.quantization_config"
            )
        yield
        return
    if isinstance(quantizer, RcpHfQuantizer):
        yield
        return
    # transformers keeps what read a GGUF file in the model, whose weights it has dequantized.
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is not None and method != "gguf":
        raise ValueError(
            f"save_pretrained: a model must be quantized by one method, got QuantLinear layers beside "
            f"{type(quantizer).__name__}; start from the float model"
        )
    said = getattr(model.config, "quantization_config", None)
    config = RcpConfig.from_dict(checkpoint.stored_config(model, _known(model)).to_dict())
    model.hf_quantizer = RcpHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        _restore(model, "hf_quantizer", quantizer)
        _restore(model.config, "quantization_config", said)


def _known(model: nn.Module) -> QuantizationConfig | None:
    """What the model's config says of its quantization, if it is ours."""
    said: Any = getattr(model.config, "quantization_config", None)
    fields: Any = said if said is None or isinstance(said, Mapping) else said.to_dict()
    if fields is None or fields.get("quant_method") != QUANT_METHOD:
        return None
    return QuantizationConfig.from_dict(fields)


def _restore(owner: Any, name: str, value: Any) -> None:
    """Give an attribute the value that it had; None stands for none."""
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _wrap_save_pretrained() -> None:
    """Let ``save_pretrained`` of transformers' models go through :func:`_saving`.

    transformers asks nobody before it writes a model that it did not quantize itself. It would write the packed tensors
    beside a config.json without a word of them, and ``from_pretrained`` would then fill the layers with random numbers.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _saving(self):
            return original(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


_wrap_save_pretrained()
