"""Write a quantized model, after a check that the directory will describe the model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import extras
from ..methods.rotate.rotate_model import apply_structure, rotation_of
from ..models import hf
from ..nn import QuantLinear
from .config import CONFIG, QuantizationConfig
from .files import check_output, file_sha256, flush, take_name
from .model_card import write_model_card

__all__ = [
    "WEIGHTS",
    "Inspected",
    "cast_floats",
    "check_fits",
    "has_packed_layers",
    "inspect_model",
    "online_rotations",
    "save_quantized",
    "tensors_to_save",
]

WEIGHTS = "model.safetensors"
_ALIKE = ("bits", "group_size", "act_bits", "act_clip")


def save_quantized(
    model: nn.Module,
    directory: str | Path,
    config: QuantizationConfig,
    *,
    tokenizer: Any = None,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a model atomically: after an error or a crash the directory has its old content, or all of the new one.

    transformers' ``save_pretrained`` writes the model into a new directory beside the target. A model card and the
    other files are added, and everything is flushed to the disk. Then the new directory is renamed to the target. A
    process that is killed between the two renames of a replacement leaves the old model in ``.NAME.old.*/model`` beside
    the target.

    Args:
        model: a causal language model of ``transformers`` with packed layers.
        directory: is made, or replaced if it holds a model.
        config: of the layers. sha256, format_version and modules_to_not_convert are filled in here.
        tokenizer: whose files to write too, or None.
        files: more files by name (a recipe, a report, a plot).

    Raises:
        MissingExtra: transformers or safetensors is missing.
        ValueError: as :func:`check_output` and :func:`inspect_model`; or config does not describe the layers.
        OSError: writing failed (a full disk, for example); the old content is unchanged.
    """
    extras.require("transformers", "safetensors")
    from safetensors import SafetensorError

    directory = Path(directory).resolve()
    check_output(directory)
    _check_config(model, config)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    before = getattr(model.config, "quantization_config", None)
    try:
        model.config.quantization_config = config.to_dict()  # type: ignore[union-attr]
        try:
            _fill(temporary, model, tokenizer, files or {})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"save_quantized: {directory} must be on a disk with space for the model, got {error}; free some, or "
                f"choose another; the old content is unchanged"
            ) from error
        take_name(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if before is None:
            del model.config.quantization_config  # type: ignore[union-attr]
        else:
            model.config.quantization_config = before  # type: ignore[union-attr]


def _fill(folder: Path, model: nn.Module, tokenizer: Any, files: Mapping[str, str | bytes]) -> None:
    """Write all files of a model and flush them to the disk. README.md is last, as it describes the others."""
    with hf.without_bars():
        model.save_pretrained(folder)  # type: ignore[operator]
    fields = json.loads((folder / CONFIG).read_text())
    if (folder / WEIGHTS).is_file():  # transformers splits models of more than 50 GB
        fields["quantization_config"]["sha256"] = file_sha256(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_model_card(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)
            flush(path)
    folder.chmod(0o755)
    flush(folder)


@torch.no_grad()
def check_fits(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse finite values that another dtype cannot represent.

    Args:
        parameters: by name.
        dtype: float32, float16 or bfloat16.

    Raises:
        ValueError: a value would overflow. The message names the parameter and its largest magnitude.
    """
    largest = torch.finfo(dtype).max
    for name, parameter in parameters.items():
        found = float(parameter.abs().max()) if parameter.numel() else 0.0
        if found > largest:
            raise ValueError(
                f"check_fits: values of {name} must be at most {largest:.6g} to be stored as {dtype}, got {found:.6g}; "
                f"choose another dtype (bfloat16 has float32's range)"
            )


@torch.no_grad()
def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """:func:`rcp_kernels.models.hf.cast`, after a check that the dtype holds every value.

    Raises:
        ValueError: as :func:`check_fits`; the model does not change then.
    """
    check_fits(dict(model.named_parameters()), dtype)
    hf.cast(model, dtype)


def has_packed_layers(model: nn.Module) -> bool:
    """Whether a module of the model is a :class:`QuantLinear`."""
    return any(isinstance(module, QuantLinear) for module in model.modules())


def online_rotations(model: nn.Module) -> dict[str, str]:
    """The rotations that run in a model: by attribute, the full name of one module that has it."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        for attribute in ("input_rotation", "qk_rotation", "output_rotation", "basis_rotation"):
            if getattr(module, attribute, None) is not None:
                found[attribute] = path
    return found


class Inspected(NamedTuple):
    """The result of :func:`inspect_model`.

    Attributes:
        config: for config.json.
        biases: by the name of a linear layer, whether the class of the model gives it a bias.
    """

    config: QuantizationConfig
    biases: dict[str, bool]


def inspect_model(model: nn.Module, stored: QuantizationConfig | None) -> Inspected:
    """Read the quantization off a model's layers, and check that the saved model could be loaded again.

    Args:
        model: of transformers, with packed layers.
        stored: gives kv_bits and kv_clip, which the layers do not have. None for a 16-bit cache.

    Raises:
        ValueError: there are no packed layers, or they differ in a setting that the config has once; or a loaded model
            would differ from this one: a rotation without a record, a layer, bias or tensor that the class of the model
            does not make, or tables of RoPE that were cast with the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # the files have a shared layer under each name
    layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
    if not layers:
        raise ValueError("save: the model must have packed layers, got none; quantize it first")
    first_name, first = next(iter(layers.items()))
    for name, layer in layers.items():
        for field in _ALIKE:
            if getattr(layer, field) != getattr(first, field):
                raise ValueError(
                    f"save: {field} must be the same in all packed layers, got {getattr(first, field)!r} in "
                    f"{first_name} and {getattr(layer, field)!r} in {name}; config.json has one value for the model"
                )
    rotation = rotation_of(model)
    online = online_rotations(model)
    if online and rotation is None:
        attribute, path = next(iter(online.items()))
        raise ValueError(
            f"save: a rotation that runs in the model must have a record, got {attribute} in {path} without one; "
            f"rotate with rcp_kernels.methods.rotate.rotate_model, or save the float model"
        )
    skeleton = hf.skeleton(model, next(model.parameters()).dtype)
    if rotation is not None:
        apply_structure(skeleton, rotation)
    _check_layers(model, skeleton, layers)
    _check_tensors(model, skeleton, layers)
    config = QuantizationConfig(
        bits=first.bits,
        group_size=first.group_size,
        act_bits=first.act_bits,
        act_clip=first.act_clip,
        kv_bits=16 if stored is None else stored.kv_bits,
        kv_clip=1.0 if stored is None else stored.kv_clip,
        rotation=rotation,
        modules_to_not_convert=tuple(name for name, module in modules.items() if isinstance(module, nn.Linear)),
        format_version=max(layer.format_version for layer in layers.values()),
    )
    biases = {name: m.bias is not None for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    return Inspected(config, biases)


def tensors_to_save(model: nn.Module, biases: Mapping[str, bool]) -> dict[str, Tensor]:
    """The tensors to write, with the biases of the model's class.

    A bias that a layer lacks but the class has is written as zeros. A bias of zeros that the class does not have is
    left out. Neither changes the outputs of the layer.

    Args:
        model: of transformers.
        biases: of :func:`inspect_model`.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if module is head and isinstance(head, QuantLinear):
            hf.untie_head(model, name)
    state = hf.tensor_state(model)
    for name, wanted in biases.items():
        layer = model.get_submodule(name)
        if isinstance(layer, QuantLinear):
            key = f"{name}.bias"
            if wanted and key not in state:
                dtype: Any = model.dtype
                state[key] = torch.zeros(layer.out_features, dtype=dtype)
            if not wanted:
                state.pop(key, None)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _check_config(model: nn.Module, config: QuantizationConfig) -> None:
    """Refuse a config that does not describe the layers."""
    for path, module in model.named_modules():
        if not isinstance(module, QuantLinear):
            continue
        for name in _ALIKE:
            found, given = getattr(module, name), getattr(config, name)
            if found != given:
                raise ValueError(
                    f"save_quantized: {name} of config must be that of every packed layer, got {given!r} and {found!r} "
                    f"in {path}; pass a QuantizationConfig of the layers, which must be alike"
                )
    given, own = config.rotation, rotation_of(model)
    if given != own and not (own is None and given is not None and not given.changes_anything):
        raise ValueError(
            f"save_quantized: rotation of config must be the model's, got {given} and {own or 'none'}; pass the "
            f"result of rotate_model"
        )


def _check_layers(model: nn.Module, skeleton: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Refuse packed layers that do not fit the linear layers that the model's class makes from its config."""
    class_name = type(model).__name__
    made = dict(skeleton.named_modules())
    for name, layer in layers.items():
        linear = made.get(name)
        if not isinstance(linear, nn.Linear):
            found = "nothing" if linear is None else f"a {type(linear).__name__}"
            raise ValueError(
                f"save: the packed layer {name} must replace a linear layer of {class_name}, got {found} of that name; "
                f"save the state_dict of a custom model with torch.save"
            )
        sizes = [(x.in_features, x.out_features) for x in (layer, linear)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"save: {name} must have the sizes (in, out) of config.json, {sizes[1]}, got {sizes[0]}; change the "
                f"config with the layer"
            )
        has_bias = getattr(linear, "bias", None) is not None  # mypy does not know that it may be None
        if not has_bias and layer.bias is not None and bool(layer.bias.count_nonzero()):
            raise ValueError(
                f"save: {name} must have no bias, as {class_name} with this config has none there, got one that is not "
                f"zero; a loaded model would lose it: set the bias in the config (for example attention_bias)"
            )


def _check_tensors(model: nn.Module, skeleton: nn.Module, layers: Mapping[str, QuantLinear]) -> None:
    """Refuse float tensors with other names, shapes or dtypes than those that a loaded model would have."""
    class_name = type(model).__name__
    packed = tuple(f"{name}." for name in layers)
    own, expected = (
        {key: tensor for key, tensor in x.state_dict().items() if not key.startswith(packed)} for x in (model, skeleton)
    )
    missing, unknown = sorted(expected.keys() - own.keys()), sorted(own.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"save: the model must have the tensors that {class_name} makes from its config, got {missing[:3]} missing "
            f"and {unknown[:3]} unknown to it; merge or remove additions (for example an adapter) before saving"
        )
    for key, tensor in own.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"save: {key} must have the shape of config.json, {tuple(expected[key].shape)}, got "
                f"{tuple(tensor.shape)}; change the config with the tensor"
            )
    dtype = next(model.parameters()).dtype
    kept = hf.float32_modules(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype and not any(part in name.split(".") for part in kept):
            raise ValueError(
                f"save: all parameters must have one dtype, which config.json has once, got {dtype} and "
                f"{parameter.dtype} in {name}; cast them with rcp_kernels.checkpoint.cast_floats(model, {dtype})"
            )
    tables = dict(skeleton.named_buffers())
    for name, buffer in model.named_buffers():
        if name in tables and not name.startswith(packed) and buffer.dtype != tables[name].dtype:
            raise ValueError(
                f"save: {name} must be {tables[name].dtype}, as in a loaded model, got {buffer.dtype}; load the float "
                f"model with from_pretrained(..., dtype=...) instead of casting it, and quantize it again"
            )
