"""A recipe: everything that decides what ``rcp-kernels quantize`` makes, as a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import extras
from ..methods.rcp.block_reconstruction import BlockConfig
from ..methods.rcp.config import PRESETS, RcpConfig
from ..methods.rotate.rotate_model import ROTATIONS

__all__ = ["METHODS", "OWN", "Recipe", "read_recipe", "recipe_text"]

METHODS = ("rtn", "gptq", "rcp", "laquant")
DTYPES = ("float32", "bfloat16", "float16")
VERSION = 1
OWN = {"bits", "group_size", "act_bits", "kv_bits", "seed"}
"""Fields of a training that the recipe has itself."""
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "int | None": (int, type(None)),
    "bool | None": (bool, type(None)),
    "str | None": (str, type(None)),
    "dict[str, Any]": (dict,),
}


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how; the same recipe on the same machine gives the same bits.

    Attributes:
        model: a transformers directory, a hub id, a .gguf file, or "demo".
        method: one of `METHODS`.
        rotation: one of :data:`rcp_kernels.methods.rotate.ROTATIONS`.
        w_bits, a_bits, kv_bits: of weights (2, 3, 4), activations (4, 8, 16) and the key/value cache (4, 16).
        group_size: 32, 64 or 128; None for the largest that divides the model's sizes.
        levels: of rtn ("uniform", "kmeans") and gptq (also "clip"); rcp starts from "kmeans" unless training says.
        preset: of rcp: "quick" or "full".
        text: what to calibrate and train on: a UTF-8 file, "dataset:NAME", "mixed" (docstrings, comments, and what the
            model writes), "generated" (what the model writes), "reasoning" (its answers step by step), or None for
            mixed with rcp and docstrings (:func:`rcp_kernels.data.corpus.docstring_corpus`) with other methods.
        sequence: tokens of a window; None for 512, or the preset's with rcp.
        samples: windows to calibrate gptq and laquant on.
        seed: of the windows' order, random rotations and the training.
        dtype: of what is not packed: "float32", "bfloat16" or "float16"; None for the source's, bfloat16 for a .gguf.
        untie_head: give an output head that is tied to the embedding a weight of its own where a rotation needs that
            to run without online rotations around the final norm (vLLM).
        training: fields of RcpConfig that differ from the preset's, of phase one under "blocks"; or of LaquantConfig.
        version: of this form.
    """

    model: str
    method: str = "gptq"
    rotation: str = "gsr"
    w_bits: int = 2
    a_bits: int = 16
    kv_bits: int = 16
    group_size: int | None = None
    levels: str = "kmeans"
    preset: str = "quick"
    text: str | None = None
    sequence: int | None = None
    samples: int = 32
    seed: int = 0
    dtype: str | None = None
    untie_head: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_types("recipe", type(self), dataclasses.asdict(self))
        allowed: dict[str, tuple[Any, ...]] = {
            "method": METHODS,
            "rotation": ROTATIONS,
            "w_bits": (2, 3, 4),
            "a_bits": (4, 8, 16),
            "kv_bits": (4, 16),
            "group_size": (None, 32, 64, 128),
            "levels": ("uniform", "clip", "kmeans"),
            "preset": tuple(PRESETS),
            "dtype": (None, *DTYPES),
            "version": (VERSION,),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"recipe: {name} must be one of {values}, got {getattr(self, name)!r}; choose one")
        for name in ("samples", "sequence"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"recipe: {name} must be an int of at least 1, got {value!r}; choose another")
        if self.method == "laquant" and (self.a_bits != 16 or self.rotation != "none"):
            raise ValueError(
                f"recipe: laquant is for weights only and takes no rotation, got a_bits={self.a_bits} and rotation="
                f"{self.rotation!r}; pass --a-bits 16 --rotation none"
            )
        if self.method == "rtn" and self.levels == "clip":
            raise ValueError('recipe: levels of rtn must be "uniform" or "kmeans", got "clip"; use gptq for "clip"')
        if self.method == "rcp":
            self.training_config(self.group_size or 128)
        elif self.method == "laquant":
            from ..methods.laquant.quantize_model import LaquantConfig

            _check_fields("recipe: training", LaquantConfig, self.training)
        elif self.training:
            raise ValueError(
                f"recipe: training must be empty with method {self.method}, which trains nothing, got "
                f"{sorted(self.training)}; leave it out"
            )

    @property
    def window(self) -> int:
        """Tokens of a window."""
        if self.sequence is not None:
            return self.sequence
        return int(PRESETS[self.preset]["sequence"]) if self.method == "rcp" else 512

    def training_config(self, group_size: int) -> RcpConfig:
        """The training that preset and overrides describe.

        Raises:
            ValueError: a field that is unknown, the recipe's own, of another type, or a clip out of (0, 1].
        """
        _check_fields("recipe: training", RcpConfig, self.training)
        for name in ("act_clip", "kv_clip"):
            if not 0.0 < self.training.get(name, 1.0) <= 1.0:
                raise ValueError(
                    f"recipe: training.{name} must be in (0, 1], got {self.training[name]!r}; 1.0 keeps the largest"
                )
        fields = {name: value for name, value in PRESETS[self.preset].items() if name != "sequence"}
        fields.update(self.training)
        blocks = fields.pop("blocks", {})
        if blocks is not None:
            if not isinstance(blocks, Mapping):
                raise ValueError(f"recipe: training.blocks must be a table or null, got {blocks!r}; leave it out")
            _check_fields("recipe: training.blocks", BlockConfig, blocks)
            blocks = BlockConfig(**blocks)
        fields["blocks"] = blocks
        config = RcpConfig.from_dict(fields)
        return dataclasses.replace(
            config, bits=self.w_bits, group_size=group_size, act_bits=self.a_bits, kv_bits=self.kv_bits, seed=self.seed
        )


def _check_fields(where: str, form: type, fields: Mapping[str, Any]) -> None:
    """Refuse overrides that a dataclass does not have, or that the recipe itself says."""
    known = {entry.name for entry in dataclasses.fields(form)} - OWN
    own = sorted(set(fields) & OWN)
    if own:
        raise ValueError(f"{where}: {own[0]} must be said by the recipe's own field, got one here; move it")
    unknown = sorted(map(str, set(fields) - known))
    if unknown:
        raise ValueError(f"{where}: fields must be among {sorted(known)}, got {unknown}; check the spelling")
    _check_types(where, form, fields)


def _check_types(where: str, form: type, fields: Mapping[str, Any]) -> None:
    for entry in dataclasses.fields(form):
        types = _TYPES.get(str(entry.type))  # none for what is checked by value
        if types is not None and entry.name in fields and type(fields[entry.name]) not in types:
            raise ValueError(
                f"{where}: {entry.name} must be of type {entry.type}, got {fields[entry.name]!r}; write it without "
                f"quotes, or leave it out"
            )


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML."""
    extras.require("transformers")  # it brings PyYAML
    import yaml  # type: ignore[import-untyped]

    return str(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file.

    Raises:
        ValueError: not YAML, or not of this form.
        OSError: it cannot be read.
    """
    extras.require("transformers")
    import yaml

    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {path} must be YAML, got {error}; write one with rcp-kernels quantize") from None
    known = {entry.name for entry in dataclasses.fields(Recipe)}
    if not isinstance(fields, dict) or set(fields) - known:
        found = sorted(map(str, set(fields) - known)) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"recipe: fields of {path} must be among {sorted(known)}, got {found}; check the spelling")
    return fields
