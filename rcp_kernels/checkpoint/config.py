"""What ``quantization_config`` in a quantized model's config.json says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats import FORMAT_VERSION, check_bits
from ..methods.rotate.rotate_model import Rotated

__all__ = ["CONFIG", "QUANT_METHOD", "QuantizationConfig", "read_quantization_config"]

QUANT_METHOD = "rcp"
CONFIG = "config.json"


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
        if "format_version" not in fields:
            raise ValueError(
                f"{where}: it must have a format_version, as every saved model has, got none; to quantize a float "
                f"model while it loads, pass an RcpConfig"
            )
        version = fields["format_version"]
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


def read_quantization_config(directory: str | Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """The fields of config.json less ``quantization_config``, and that.

    Raises:
        ValueError: no such file, damaged, or as :meth:`QuantizationConfig.from_dict`.
    """
    path = Path(directory) / CONFIG
    try:
        fields = json.loads(path.read_text())
        quantization = fields.pop("quantization_config")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"load_quantized: {path} must be the config of a quantized model, got {type(error).__name__}: {error}; "
            f"pass a directory that rcp-kernels quantize wrote"
        ) from None
    return fields, QuantizationConfig.from_dict(quantization)
