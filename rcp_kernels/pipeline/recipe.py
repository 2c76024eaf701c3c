"""A recipe: everything that decides the result of ``rcp-kernels quantize``, as a dataclass and as a YAML file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import extras
from ..hardware import fast_bfloat16
from ..methods.laquant.quantize_model import LaquantConfig
from ..methods.rcp.block_reconstruction import BlockConfig
from ..methods.rcp.config import PRESETS, RcpConfig
from ..methods.rotate.rotate_model import ROTATIONS
from ..models.load import group_size_of

__all__ = ["CHOICES", "OWN", "Recipe", "ResolvedRecipe", "read_recipe", "recipe_text"]

VERSION = 1
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("rtn", "gptq", "rcp", "laquant"),
    "rotation": ROTATIONS,
    "w_bits": (2, 3, 4),
    "a_bits": (4, 8, 16),
    "kv_bits": (4, 16),
    "group_size": (32, 64, 128),
    "levels": ("uniform", "clip", "kmeans"),
    "preset": tuple(PRESETS),
    "dtype": ("float32", "bfloat16", "float16"),
    "version": (VERSION,),
}
"""The values that a field of a recipe may have. A field that may also be None has None as its default."""

OWN = {"bits", "group_size", "act_bits", "kv_bits", "seed"}
"""Fields of RcpConfig and LaquantConfig that a recipe states itself, outside ``training``."""

# Bits of weights, activations, and keys and values. GPTQ at 4 bits without a rotation has 1.01 times the perplexity of
# the float SmolLM2-135M, and 1.06 times that of Gemma 3 270M. GPTQ at 3 bits has 1.24 times that of SmolLM2 with GSR,
# but GSR ruins Gemma at 3 bits (2873, float 21), where the model without a rotation has 1.6 times the perplexity.
_BITS = {"rtn": (4, 16, 16), "gptq": (4, 16, 16), "rcp": (2, 4, 4), "laquant": (3, 16, 16)}
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
    """A model and how to quantize it. The same recipe on the same machine and device gives the same bits.

    Attributes:
        model: a transformers directory, a hub id, a .gguf file, or "demo".
        method: "rtn", "gptq", "rcp" or "laquant".
        rotation: one of :data:`rcp_kernels.methods.rotate.ROTATIONS`. None: "gsr" for rcp and for 4-bit activations,
            else "none".
        w_bits: bits of a weight, 2 to 4. None: 4 for rtn and gptq, 3 for laquant, 2 for rcp.
        a_bits: bits of an activation: 4, 8 or 16. None: 4 for rcp, else 16.
        kv_bits: bits of the key/value cache: 4 or 16. None: 4 for rcp, else 16.
        group_size: weights that share one table of levels: 32, 64 or 128. None: the largest that divides the model's
            sizes.
        levels: "uniform", "clip" or "kmeans" for rtn and gptq. rcp starts from "kmeans" unless
            ``training`` has another ``init``.
        preset: the budget of rcp: "quick" or "full".
        text: the calibration or training text. A UTF-8 file; "dataset:NAME"; "generated", written by the model;
            "mixed": docstrings, comments and generated text; "reasoning": the model's answers step by step. None:
            docstrings of installed packages, or "mixed" for rcp in one process.
        sequence: tokens of a window. None: the preset's for rcp, else 512.
        samples: calibration windows of gptq and laquant.
        seed: of the order of the windows, random rotations and the training.
        dtype: "float32", "bfloat16" or "float16" for everything that is not packed. None: the source's dtype; bfloat16
            for a .gguf file.
        untie_head: give an output head that is tied to the embedding its own weight where a rotation needs it. vLLM
            cannot run the online rotations around the final norm that replace it.
        training: fields of RcpConfig that differ from the preset's (those of BlockConfig under "blocks"), or fields of
            LaquantConfig.
        version: of this form.

    Raises:
        ValueError: a field of another type, out of its set, or of no use with the method.
    """

    model: str
    method: str = "gptq"
    rotation: str | None = None
    w_bits: int | None = None
    a_bits: int | None = None
    kv_bits: int | None = None
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
        _check_types("recipe", Recipe, dataclasses.asdict(self))
        optional = {entry.name for entry in dataclasses.fields(Recipe) if entry.default is None}
        for name, values in CHOICES.items():
            value = getattr(self, name)
            if value not in values and not (value is None and name in optional):
                raise ValueError(f"recipe: {name} must be one of {values}, got {value!r}; choose one")
        for name in ("samples", "sequence"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"recipe: {name} must be an int of at least 1, got {value!r}; choose another")
        if self.method == "laquant" and (self.a_bits not in (None, 16) or self.rotation not in (None, "none")):
            raise ValueError(
                f"recipe: laquant is for weights only and takes no rotation, got a_bits={self.a_bits} and rotation="
                f"{self.rotation!r}; pass --a-bits 16 --rotation none"
            )
        if self.method not in ("rcp", "laquant") and self.training:
            raise ValueError(
                f"recipe: training must be empty with method {self.method}, which trains nothing, got "
                f"{sorted(self.training)}; leave it out"
            )
        self.training_config(self.group_size or 128)

    @property
    def bits(self) -> tuple[int, int, int]:
        """Bits of weights, activations, and keys and values."""
        given = (self.w_bits, self.a_bits, self.kv_bits)
        w_bits, a_bits, kv_bits = (value or default for value, default in zip(given, _BITS[self.method], strict=True))
        return w_bits, a_bits, kv_bits

    @property
    def window(self) -> int:
        """Tokens of a window."""
        if self.sequence is not None:
            return self.sequence
        return int(PRESETS[self.preset]["sequence"]) if self.method == "rcp" else 512

    def training_config(self, group_size: int, bf16: bool = True) -> RcpConfig | LaquantConfig | None:
        """The training that preset, overrides and the recipe's own fields describe; None for rtn and gptq.

        Args:
            group_size: of the weights.
            bf16: compute in bfloat16, where ``training`` does not say.

        Raises:
            ValueError: ``training`` has a field that is unknown, that the recipe states itself, or of another type; or
                a clip out of (0, 1].
        """
        w_bits, a_bits, kv_bits = self.bits
        own: dict[str, Any] = {"bits": w_bits, "group_size": group_size, "seed": self.seed}
        if self.method == "laquant":
            _check_fields("recipe: training", LaquantConfig, self.training)
            return LaquantConfig(**{"dtype": "bfloat16" if bf16 else "float32", **self.training, **own})
        if self.method != "rcp":
            return None
        _check_fields("recipe: training", RcpConfig, self.training)
        fields = {"bf16": bf16, **PRESETS[self.preset], **self.training}
        del fields["sequence"]
        blocks = fields.pop("blocks", {})
        if blocks is not None:
            if not isinstance(blocks, Mapping):
                raise ValueError(f"recipe: training.blocks must be a table or null, got {blocks!r}; leave it out")
            _check_fields("recipe: training.blocks", BlockConfig, blocks)
            blocks = BlockConfig(**blocks)
        return RcpConfig(**fields, **own, blocks=blocks, act_bits=a_bits, kv_bits=kv_bits)

    def resolve(self, model: nn.Module, device: torch.device | None = None) -> ResolvedRecipe:
        """This recipe with a value in every field that decides the result for a model.

        A training computes in float32 on a device without fast bfloat16, unless the recipe says otherwise. device is
        that of the training; None stands for the CPU.

        Another version may choose other defaults; a resolved recipe makes the same model there.
        """
        group_size = group_size_of(model, self.group_size)
        w_bits, a_bits, kv_bits = self.bits
        training = self.training_config(group_size, fast_bfloat16(device))
        text = self.text
        if text is None and self.method == "rcp" and os.environ.get("WORLD_SIZE", "1") == "1":
            text = "mixed"
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        values.update(
            rotation=self.rotation or ("gsr" if self.method == "rcp" or a_bits == 4 else "none"),
            w_bits=w_bits,
            a_bits=a_bits,
            kv_bits=kv_bits,
            group_size=group_size,
            text=text,
            sequence=self.window,
        )
        if training is not None:
            values["training"] = {k: v for k, v in dataclasses.asdict(training).items() if k not in OWN}
        return ResolvedRecipe(**values)


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """A recipe in which rotation, bits, group_size, sequence and training are chosen; ``str()`` says which.

    :meth:`Recipe.resolve` makes it.
    """

    rotation: str = "none"
    w_bits: int = 4
    a_bits: int = 16
    kv_bits: int = 16
    group_size: int = 128

    @property
    def rcp(self) -> RcpConfig:
        """The training of method rcp."""
        config = self.training_config(self.group_size)
        assert isinstance(config, RcpConfig)
        return config

    @property
    def laquant(self) -> LaquantConfig:
        """The training of method laquant."""
        config = self.training_config(self.group_size)
        assert isinstance(config, LaquantConfig)
        return config

    def __str__(self) -> str:
        levels = f", {self.levels} levels" if self.method in ("rtn", "gptq") else ""
        fields = self.training
        float32 = fields.get("bf16") is False or fields.get("dtype") == "float32"
        rotation = "no rotation" if self.rotation == "none" else f"rotation {self.rotation}"
        return (
            f"method {self.method}, {self.w_bits}-bit weights in groups of {self.group_size}{levels}, "
            f"{self.a_bits}-bit activations, {self.kv_bits}-bit keys and values, {rotation}"
            f"{', training in float32' if float32 else ''}"
        )


def _check_fields(where: str, form: type, fields: Mapping[str, Any]) -> None:
    """Refuse fields that a dataclass does not have, or that the recipe states itself."""
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
        types = _TYPES.get(str(entry.type))  # None for a field that is checked by value
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
    """The fields of a recipe file; a file need not have all fields.

    Raises:
        ValueError: the file is not YAML, or has fields that a recipe does not have.
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
