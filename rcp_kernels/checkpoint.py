"""A quantized language model on disk: an ordinary ``transformers`` directory with packed weights in it.

``config.json`` has a ``quantization_config`` (:class:`QuantizationConfig`), ``model.safetensors`` the model's own
``state_dict``: for a :class:`QuantLinear` the tensors of docs/format.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import extras
from .formats import FORMAT_VERSION, check_bits, kind_version
from .methods.rotate import Rotated, apply_structure
from .model_card import write_model_card
from .models import describe
from .nn import OnlineRotation, QuantLinear

__all__ = [
    "QuantizationConfig",
    "check_output",
    "file_sha256",
    "load_quantized",
    "read_quantization_config",
    "save_quantized",
]

QUANT_METHOD = "rcp"
_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
# What a quantized model's directory holds: a replacement deletes the old directory, so that any other file forbids it.
_FILES = re.compile(
    r"(config|generation_config|report|processor_config|preprocessor_config"
    r"|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|normalizer|chat_template)\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|README\.md|recipe\.yaml|curve\.(csv|png)|log\.jsonl|merges\.txt|vocab\.txt|chat_template\.jinja"
    r"|(tokenizer|spiece|sentencepiece|sentencepiece\.bpe)\.model"
)


@dataclass(frozen=True)
class QuantizationConfig:
    """What ``quantization_config`` in config.json says; every tool that reads these models reads this.

    Attributes:
        bits, group_size: of the packed layers.
        act_bits, act_clip: of their inputs; 16 bits for none quantized.
        kv_bits, kv_clip: of the key/value cache that the model is meant to run with; 16 bits for none quantized.
        rotation: what :func:`rcp_kernels.methods.rotate.rotate_model` did, or None.
        modules_to_not_convert: full names of the linear layers that stay in floating point.
        sha256: of model.safetensors, hexadecimal; None where whoever wrote the file did not say.
        quant_method: always "rcp".
        format_version: docs/format.md's, of the packed layers that need the newest; filled in by whoever saves a model.
    """

    bits: int
    group_size: int
    act_bits: int = 16
    act_clip: float = 1.0
    kv_bits: int = 16
    kv_clip: float = 1.0
    rotation: Rotated | None = None
    modules_to_not_convert: tuple[str, ...] = field(default=("lm_head",))
    sha256: str | None = None
    quant_method: str = QUANT_METHOD
    format_version: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        fields = dataclasses.asdict(self)
        fields["rotation"] = None if self.rotation is None else self.rotation.to_dict()
        fields["modules_to_not_convert"] = list(self.modules_to_not_convert)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizationConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: another method, a later version, or a field that is missing, unknown or out of its set.
        """
        where = "quantization_config"
        if not isinstance(fields, Mapping):
            raise ValueError(f"{where}: it must be a table of fields, got {fields!r}; the file is damaged")
        if fields.get("quant_method") != QUANT_METHOD:
            raise ValueError(
                f"{where}: quant_method must be {QUANT_METHOD!r}, got {fields.get('quant_method')!r}; load the model "
                f"with the library that quantized it"
            )
        version = fields.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version must be 1 to {FORMAT_VERSION}, got {version!r}; a later one was written by a "
                f"newer rcp-kernels: upgrade it"
            )
        known = {entry.name for entry in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        missing = sorted({"bits", "group_size"} - set(fields))
        if unknown or missing:
            raise ValueError(
                f"{where}: fields must be among {sorted(known)} with bits and group_size, got unknown {unknown} and "
                f"missing {missing}; the file is damaged"
            )
        values = dict(fields)
        check_bits(values["bits"])
        for name, allowed in (("act_bits", (4, 8, 16)), ("kv_bits", (4, 16))):
            value = values.get(name, 16)
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{where}: {name} must be one of {allowed}, got {value!r}; the file is damaged")
        for name in ("act_clip", "kv_clip"):
            value = values.get(name, 1.0)
            if type(value) not in (int, float) or not 0.0 < value <= 1.0:
                raise ValueError(f"{where}: {name} must be a number in (0, 1], got {value!r}; the file is damaged")
        group_size, digest = values["group_size"], values.get("sha256")
        if type(group_size) is not int or group_size < 1:
            raise ValueError(
                f"{where}: group_size must be an int of at least 1, got {group_size!r}; the file is damaged"
            )
        if digest is not None and not isinstance(digest, str):
            raise ValueError(f"{where}: sha256 must be a string or null, got {digest!r}; the file is damaged")
        if values.get("rotation") is not None:
            if not isinstance(values["rotation"], Mapping):
                raise ValueError(
                    f"{where}: rotation must be a table of fields or null, got {values['rotation']!r}; the file is "
                    f"damaged"
                )
            values["rotation"] = Rotated.from_dict(values["rotation"])
        kept = values.get("modules_to_not_convert")
        kept = [] if kept is None else kept
        if not isinstance(kept, list | tuple) or not all(isinstance(name, str) for name in kept):
            raise ValueError(
                f"{where}: modules_to_not_convert must be a list of names, got {kept!r}; the file is damaged"
            )
        values["modules_to_not_convert"] = tuple(kept)
        return cls(**values)


def check_output(directory: Path) -> None:
    """Refuse a directory that :func:`save_quantized` could not replace, before hours of work and not after.

    Raises:
        ValueError: it exists and is neither empty nor a quantized model without other files, or it is, or holds, the
            working directory.
        OSError: it cannot be made.
    """
    directory = directory.resolve()
    if Path.cwd().is_relative_to(directory):
        raise ValueError(
            f"save_quantized: {directory} must not be the working directory or hold it, as it is replaced whole, got "
            f"{Path.cwd()}; choose a directory inside it"
        )
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"save_quantized: {directory} must be a directory, got a file; choose another name")
    if directory.is_dir() and any(directory.iterdir()):
        try:
            read_quantization_config(directory)
        except ValueError as error:
            raise ValueError(
                f"save_quantized: {directory} must be empty or hold a quantized model to be replaced, got other files: "
                f"{str(error).partition('; ')[0]}; choose another directory"
            ) from None
        stray = sorted(path.name for path in directory.iterdir() if path.is_dir() or not _FILES.fullmatch(path.name))
        if stray:
            raise ValueError(
                f"save_quantized: {directory} must hold nothing but a quantized model to be replaced, got {stray[0]!r} "
                f"({len(stray)} such); move it away or choose another directory"
            )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise OSError(
            f"save_quantized: {directory.parent} must be a directory that can be written to, got {error}; choose "
            f"another"
        ) from error


def save_quantized(
    model: nn.Module,
    directory: Path,
    config: QuantizationConfig,
    *,
    tokenizer: Any = None,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write a model so that the directory is there whole or as it was before, whatever happens on the way.

    Everything goes into a new directory beside it, is flushed to the disk, and takes its name in the end. A process
    killed between the two renames of a replacement leaves the old model whole in ``.NAME.old.*/model`` beside it.

    Args:
        model: a causal language model of ``transformers`` with packed layers.
        directory: to make, or to replace if it holds a model.
        config: must say what the layers are; sha256, format_version and modules_to_not_convert are filled in here.
        tokenizer: its files are written too; None for none.
        files: more files by name (a recipe, a report, a plot).

    Raises:
        MissingExtra: transformers or safetensors is missing.
        ValueError: as :func:`check_output`; the model has no packed layer, or is not what config says; or RoPE's tables
            were cast with the model, which a loaded one would have in full precision.
        OSError: as writing does, a full disk say; what was there before is untouched.
    """
    extras.require("transformers", "safetensors")
    from safetensors import SafetensorError

    directory = directory.resolve()
    check_output(directory)
    _check_config(model, config)
    config = dataclasses.replace(config, format_version=model_format_version(model))
    fields = model.config.to_dict()  # type: ignore[operator, union-attr]
    if fields.get("dtype") is None:  # transformers would take it from the first tensor of the file
        fields["dtype"] = str(model.dtype).removeprefix("torch.")
    _check_buffers(model, fields)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        try:
            _fill(temporary, model, fields, config, tokenizer, files or {})
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"save_quantized: {directory} must be on a disk with space for the model, got {error}; free some, or "
                f"choose another: what was there before is untouched"
            ) from error
        _take_name(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fill(
    folder: Path,
    model: nn.Module,
    fields: dict[str, Any],
    config: QuantizationConfig,
    tokenizer: Any,
    files: Mapping[str, str | bytes],
) -> None:
    """Write all files of a model, README.md last as it is of the others, flushed to the disk."""
    from safetensors.torch import save_file

    weights = folder / _WEIGHTS
    save_file(_tensors(model), weights, metadata={"format": "pt"})
    kept = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    config = dataclasses.replace(config, modules_to_not_convert=kept, sha256=file_sha256(weights))
    fields.update(architectures=[type(model).__name__], quantization_config=config.to_dict())
    (folder / _CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_model_card(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)
            _flush(path)
    folder.chmod(0o755)
    _flush(folder)


def read_quantization_config(directory: Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """The fields of config.json less ``quantization_config``, and that.

    Raises:
        ValueError: no such file, damaged, or as :meth:`QuantizationConfig.from_dict`.
    """
    path = directory / _CONFIG
    try:
        fields = json.loads(path.read_text())
        quantization = fields.pop("quantization_config")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"load_quantized: {path} must be the config of a quantized model, got {type(error).__name__}: {error}; "
            f"pass a directory that rcp-kernels quantize wrote"
        ) from None
    return fields, QuantizationConfig.from_dict(quantization)


def load_quantized(directory: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, QuantizationConfig]:
    """Load what :func:`save_quantized` wrote; the model's logits are those of the saved one, bit for bit.

    Args:
        directory: of the model.
        device: to load it to.

    Returns:
        The model in eval mode, and its quantization. Keys and values are quantized by the cache that the caller passes
        (:class:`rcp_kernels.nn.QuantizedKVCache`), not by the model.

    Raises:
        MissingExtra: transformers or safetensors is missing.
        ValueError: a file is missing, damaged, altered since it was written, or from a later version.
    """
    extras.require("transformers", "safetensors")
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    fields, config = read_quantization_config(directory)
    path = directory / _WEIGHTS
    if not path.is_file():
        raise ValueError(f"load_quantized: {path} must be there, got no such file; quantize the model again")
    if config.sha256 is not None and file_sha256(path) != config.sha256:
        raise ValueError(
            f"load_quantized: the sha256 of {path} must be the one in {_CONFIG}, got another: the file was truncated "
            f"or altered since; copy it again"
        )
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"load_quantized: {path} must be a safetensors file, got {error}; copy it again") from None
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).to(device)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(
            f"load_quantized: {directory / _CONFIG} must describe a language model of transformers, got "
            f"{type(error).__name__}: {error}; copy it again"
        ) from None
    if config.rotation is not None:
        apply_structure(model, config.rotation)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in config.modules_to_not_convert:
            rotation: OnlineRotation | None = getattr(module, "input_rotation", None)
            parent, _, child = name.rpartition(".")
            packed = QuantLinear(
                module.in_features,
                module.out_features,
                config.bits,
                config.group_size,
                config.act_bits,
                module.bias is not None,
                config.act_clip,
                rotation,
                device="meta",
            )
            setattr(model.get_submodule(parent), child, packed)
    tied = _tied_head(model)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"load_quantized: {path} must fit {_CONFIG}, got {error}; copy both again") from None
    missing = [name for name in missing if name != tied]
    if missing or unexpected:
        raise ValueError(
            f"load_quantized: {path} must have the tensors of the model, got {missing[:3]} missing and "
            f"{unexpected[:3]} unknown; the files do not belong together"
        )
    if tied is not None:
        model.tie_weights()
    if (directory / "generation_config.json").exists():
        model.generation_config = type(model.generation_config).from_pretrained(directory)
    return model.eval(), config


def model_format_version(model: nn.Module) -> int:
    """docs/format.md's version that a reader of the model's state needs: the newest of its packed layers'."""
    return max((kind_version(layer.kind) for layer in model.modules() if isinstance(layer, QuantLinear)), default=1)


def _check_config(model: nn.Module, config: QuantizationConfig) -> None:
    """Refuse a config of which :func:`load_quantized` would make another model."""
    names = ("bits", "group_size", "act_bits", "act_clip")
    packed = 0
    rotated: dict[str, str] = {}
    for path, module in model.named_modules():
        for attribute in ("input_rotation", "qk_rotation", "output_rotation"):
            if getattr(module, attribute, None) is not None:
                rotated[attribute] = path
        if not isinstance(module, QuantLinear):
            continue
        packed += 1
        for name in names:
            found, said = getattr(module, name), getattr(config, name)
            if found != said:
                raise ValueError(
                    f"save_quantized: {name} of config must be that of every packed layer, got {said!r} and {found!r} "
                    f"in {path}; pass a QuantizationConfig of the layers, which must be alike"
                )
    if not packed:
        raise ValueError("save_quantized: the model must have packed layers, got none; quantize it first")
    rotation = config.rotation
    has = {
        "input_rotation": rotation is not None and rotation.r4,
        "qk_rotation": rotation is not None and rotation.r3,
        "output_rotation": rotation is not None and "output_rotation" in rotated,
    }
    for attribute, said in has.items():
        if said != (attribute in rotated):
            raise ValueError(
                f"save_quantized: rotation of config must be the model's, got {rotation} and "
                f"{f'{attribute} in {rotated[attribute]}' if attribute in rotated else f'no {attribute}'}; pass what "
                f"rotate_model returned"
            )


def _check_buffers(model: nn.Module, fields: Mapping[str, Any]) -> None:
    """Refuse a model whose tables that no checkpoint holds are not those that the loaded model will compute."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        fresh = dict(AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).named_buffers())
    for name, buffer in model.named_buffers():
        if name in fresh and buffer.dtype != fresh[name].dtype:
            raise ValueError(
                f"save_quantized: {name} must be {fresh[name].dtype}, as a loaded model computes it, got "
                f"{buffer.dtype}; load the float model with from_pretrained(..., dtype=...) instead of casting it, "
                f"and quantize it again"
            )


def _tied_head(model: nn.Module) -> str | None:
    """Full name of the head's weight if it is the embedding's."""
    architecture = describe(model)
    if not getattr(model.config, "tie_word_embeddings", False):
        return None
    return f"{architecture.head}.weight"


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, without the second name of a tied tensor."""
    tied = _tied_head(model)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != tied}


def file_sha256(path: Path) -> str:
    """The sha256 of a file, hexadecimal, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_name(temporary: Path, directory: Path) -> None:
    """Rename a directory onto another: a directory with content cannot be replaced in one step, so it steps aside."""
    if not directory.exists():
        os.rename(temporary, directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    old = aside / "model"
    try:
        os.rename(directory, old)
        os.rename(temporary, directory)
    except BaseException as error:
        if old.exists() and not directory.exists():
            try:
                os.rename(old, directory)
            except OSError:
                raise OSError(
                    f"save_quantized: {directory} must be replaced, got {error}; what was there is in {old}: move it "
                    f"back"
                ) from error
        if not old.exists():
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
