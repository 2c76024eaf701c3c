"""Quantized models through ``AutoModelForCausalLM.from_pretrained`` and ``save_pretrained`` (transformers 5).

Importing this module registers the method ``"rcp"`` with transformers. ``import rcp_kernels`` imports it when
transformers is imported (``on_import``). docs/integrations/transformers.md shows its use.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..checkpoint import QUANT_METHOD, QuantizationConfig
from ..checkpoint.save import Inspected, has_packed_layers, inspect_model, online_rotations, tensors_to_save
from ..checkpoint.tensor_files import TensorFiles, remedy
from ..methods.rotate.rotate_model import ROTATIONS, apply_structure, rotate_model
from ..models import hf
from ..nn import QuantLinear, quantize_model
from ..ops.checks import check_one_of

extras.require("transformers", "safetensors")

import transformers  # noqa: E402
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

if int(transformers.__version__.partition(".")[0]) < 5:
    raise extras.MissingExtra(
        f"rcp_kernels.integrations.transformers: transformers must be 5 or later, got {transformers.__version__}; "
        f"run: pip install --upgrade transformers"
    )

__all__ = ["RcpConfig", "RcpHfQuantizer"]


@register_quantization_config(QUANT_METHOD)
class RcpConfig(QuantizationConfigMixin):
    """``quantization_config`` of a model: from config.json, or an argument that quantizes a float model while it loads.

    Attributes:
        stored: the QuantizationConfig in config.json.
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
            kv_bits, kv_clip: of the key/value cache to run the model with; 4 or 16. The config only records them: pass
                a :class:`rcp_kernels.nn.QuantizedKVCache` to ``generate``.
            modules_to_not_convert: last components or full names of modules to keep in floating point. None means
                ``["lm_head"]``.
            method: ``"rtn"``: each weight takes the nearest level of its group. The other methods need text.
            levels: how to choose a group's levels: ``"kmeans"`` or ``"uniform"``.
            rotation: of the model before the quantization, one of :data:`rcp_kernels.methods.rotate.ROTATIONS`, in
                groups of group_size. It includes R3 only if kv_bits is 4.
            seed: of the rotation's random signs.

        Raises:
            ValueError: an argument outside its set, or a method that needs text; the message has the command to run.
            TypeError: modules_to_not_convert is one name.
        """
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                f"RcpConfig: modules_to_not_convert must be a list of names, got {modules_to_not_convert!r}; pass "
                f"[{modules_to_not_convert!r}]"
            )
        kept = ("lm_head",) if modules_to_not_convert is None else tuple(modules_to_not_convert)
        if method != "rtn":
            raise ValueError(
                f'RcpConfig: method must be "rtn", which needs no text, got {method!r}; run `rcp-kernels '
                f"quantize MODEL --method gptq|rcp|laquant --out DIR` and load DIR"
            )
        check_one_of("RcpConfig", "levels", levels, ("kmeans", "uniform"), "check the spelling")
        check_one_of("RcpConfig", "rotation", rotation, ROTATIONS, "check the spelling")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.stored = QuantizationConfig(bits, group_size, act_bits, act_clip, kv_bits, kv_clip, None, kept)
        self.stored.check("RcpConfig")
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
        """The dict that transformers 5.0 prints."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The dict in config.json: :meth:`rcp_kernels.checkpoint.QuantizationConfig.to_dict`."""
        return self.stored.to_dict()


@register_quantizer(QUANT_METHOD)
class RcpHfQuantizer(HfQuantizer):
    """The interface that transformers calls while it loads and saves a model with an :class:`RcpConfig`.

    transformers sets the tensors of a checkpoint one by one as attributes of modules, and fills missing tensors with
    random numbers. It therefore sees the floating point part of a model only. The packed layers are loaded from the
    same files afterwards by ``load_state_dict``, which checks and packs each layer once.

    Attributes:
        inspected: of the model to save, if somebody has inspected it already.
    """

    quantization_config: RcpConfig
    inspected: Inspected | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype == torch.float64:
            raise ValueError(
                f"from_pretrained: dtype must be float32, float16 or bfloat16, got {dtype}; packed layers "
                f"take no float64"
            )
        return dtype

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        _check_one_device(device_map if isinstance(device_map, dict) else {})

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        saved = model.config.architectures
        if saved and type(model).__name__ not in saved:
            raise ValueError(
                f"from_pretrained: the model must be of the class that config.json names, {saved[0]}, got "
                f"{type(model).__name__}; load it with that class, or AutoModelForCausalLM"
            )
        stored = self.quantization_config.stored
        if stored.rotation is not None:
            apply_structure(model, stored.rotation)
        self._files = TensorFiles(kwargs.get("checkpoint_files"), model)
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
        self._files.check_shapes(model)
        hf.watch_loading(model, self._layers, lambda missing, unknown: self._check_names(model, missing, unknown))

    def _check_names(self, model: Any, missing: set[str], unknown: set[str]) -> None:
        missing = {name for name in missing if name not in model.all_tied_weights_keys}
        if missing or unknown:
            raise ValueError(
                f"from_pretrained: the files must have the tensors of {type(model).__name__}, got "
                f"{sorted(missing)[:3]} missing and {sorted(unknown)[:3]} unknown; {remedy(model)}"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_one_device(getattr(model, "hf_device_map", {}))
        config = self.quantization_config
        if self.pre_quantized:
            for name, layer in self._layers.items():
                tensors = self._files.layer(name, model.device)
                if "bias" in tensors:
                    tensors["bias"] = tensors["bias"].to(model.config.dtype)
                try:
                    layer.load_state_dict(tensors, assign=True)
                except RuntimeError as error:
                    raise ValueError(
                        f"from_pretrained: {name} must fit config.json, got {error}; {remedy(model)}"
                    ) from None
                model.set_submodule(name, layer.eval())
            del self._files, self._layers
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
        # Saving checks whether the model can be saved.
        config.stored = dataclasses.replace(stored, rotation=rotation, modules_to_not_convert=tuple(report.kept))
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace the packed layers by float layers of the same function, with any input rotation folded in."""
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
        if not has_packed_layers(model):
            raise ValueError("save_pretrained: the model must have packed layers, got none; dequantize() it first")
        inspected = self.inspected or inspect_model(model, _known(model) or self.quantization_config.stored)
        self.quantization_config.stored = inspected.config
        model.config.quantization_config = self.quantization_config
        return tensors_to_save(model, inspected.biases), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _Waiting(nn.Module):
    """The placeholder of a packed layer while transformers loads and initializes the rest of the model.

    weight and bias are no parameters: nothing is loaded into them. Some models read them while they initialize missing
    tensors. ``_is_hf_initialized`` makes transformers' initializers skip them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            parameter = getattr(linear, name)
            tensor = None if parameter is None else torch.empty_like(parameter, device="meta").detach()
            if tensor is not None:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(self, name, tensor)


def _check_one_device(device_map: Mapping[str, Any]) -> None:
    devices = set(map(str, device_map.values()))
    if len(devices) > 1:
        raise ValueError(
            f"from_pretrained: device_map must name one device, got {sorted(devices)}; packed layers cannot be "
            f'offloaded: use device_map={{"": device}}'
        )


@contextmanager
def _saving(model: nn.Module) -> Iterator[None]:
    """Make ``save_pretrained`` write a model with packed layers as a quantized model.

    Raises:
        ValueError: another quantizer made the model, or as :func:`rcp_kernels.checkpoint.save.inspect_model`.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not has_packed_layers(model):
        online = online_rotations(model)
        if online:
            attribute, path = next(iter(online.items()))
            warnings.warn(
                f"save_pretrained: this float model has a rotation that runs in it ({attribute} in {path}), which "
                f"config.json does not record: after loading it call "
                f"rcp_kernels.methods.rotate.apply_structure(model, record)",
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
    # A model from a GGUF file keeps the quantizer that read it. Its weights are dequantized.
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if quantizer is not None and method != "gguf":
        raise ValueError(
            f"save_pretrained: a model must be quantized by one method, got QuantLinear layers beside "
            f"{type(quantizer).__name__}; start from the float model"
        )
    before = getattr(model.config, "quantization_config", None)
    inspected = inspect_model(model, _known(model))
    ours = RcpHfQuantizer(RcpConfig.from_dict(inspected.config.to_dict()), pre_quantized=True)
    ours.inspected = inspected
    model.hf_quantizer = ours  # type: ignore[assignment]
    try:
        yield
    finally:
        _restore(model, "hf_quantizer", quantizer)
        _restore(model.config, "quantization_config", before)


def _known(model: nn.Module) -> QuantizationConfig | None:
    """The quantization in the model's config, if its method is ours."""
    found: Any = getattr(model.config, "quantization_config", None)
    fields: Any = found if found is None or isinstance(found, Mapping) else found.to_dict()
    if fields is None or fields.get("quant_method") != QUANT_METHOD:
        return None
    return QuantizationConfig.from_dict(fields)


def _restore(owner: Any, name: str, value: Any) -> None:
    """Set an attribute to its old value, or delete it if the value is None."""
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _wrap_save_pretrained() -> None:
    """Wrap ``save_pretrained`` of transformers' models in :func:`_saving`.

    transformers has no hook for a model that it did not quantize. It would write the packed tensors beside a
    config.json without a quantization_config, and ``from_pretrained`` would fill the layers with random numbers.
    """
    from transformers.modeling_utils import PreTrainedModel

    original = PreTrainedModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _saving(self):
            return original(self, *args, **kwargs)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


_wrap_save_pretrained()
