"""``quantization_config`` in the config.json of a quantized model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats import FORMAT_VERSION, check_bits
from ..methods.rotate.rotate_model import Rotated
from ..ops.checks import check_clip, check_int, check_one_of
from ..ops.lut_linear import ACT_BITS

__all__ = ["CONFIG", "KV_BITS", "QUANT_METHOD", "QuantizationConfig", "read_quantization_config"]

QUANT_METHOD = "rcp"
CONFIG = "config.json"
KV_BITS = (4, 16)
"""Bits of a key or value. 16 means that the cache is not quantized."""


@dataclass(frozen=True)
class QuantizationConfig:
    """The fields of ``quantization_config`` in config.json, for every tool that reads these models.

    Attributes:
        bits, group_size: of the packed layers.
        act_bits, act_clip: of their inputs. 16 bits are not quantized.
        kv_bits, kv_clip: of the key/value cache to run the model with. 16 bits are not quantized.
        rotation: the record of :func:`rcp_kernels.methods.rotate.rotate_model`, or None.
        modules_to_not_convert: full names of the linear layers in floating point.
        sha256: of model.safetensors, hexadecimal, or None.
        quant_method: always "rcp".
        format_version: the newest version of docs/format.md in the packed layers. Saving sets it.
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
                f"{where}: it must have a format_version, as in every saved model, got none; to quantize a float "
                f"model while it loads, pass an RcpConfig"
            )
        version = fields["format_version"]
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version must be 1 to {FORMAT_VERSION}, got {version!r}; a newer rcp-kernels "
                f"wrote a later version: upgrade"
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
        digest = values.get("sha256")
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
        config = cls(**values)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise ValueError unless the numbers are in their sets; ``where`` begins the message."""
        check_bits(self.bits)
        check_int(where, "group_size", self.group_size)
        check_one_of(where, "act_bits", self.act_bits, ACT_BITS)
        check_one_of(where, "kv_bits", self.kv_bits, KV_BITS)
        check_clip(where, self.act_clip, "act_clip")
        check_clip(where, self.kv_clip, "kv_clip")


def read_quantization_config(directory: str | Path) -> tuple[dict[str, Any], QuantizationConfig]:
    """The fields of config.json without ``quantization_config``, and the QuantizationConfig.

    Raises:
        ValueError: the file is missing or damaged, or as :meth:`QuantizationConfig.from_dict`.
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
