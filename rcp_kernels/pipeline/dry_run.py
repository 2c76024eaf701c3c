"""What a recipe will need: device memory, host memory, disk and time. Only the model's config is read."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import extras
from ..data.by_name import check_text
from ..hardware import choose_device
from ..methods.gptq import device_bytes as gptq_device_bytes
from ..methods.laquant import device_bytes as laquant_device_bytes
from ..methods.rcp.train import check_processes
from ..methods.rotate.rotate_model import device_bytes as rotation_device_bytes
from ..models import Architecture, describe
from ..models.load import float_config, source_dtype
from ..nn.quantize_model import device_bytes as rtn_device_bytes
from ..ops.quantize_weight import quantize_weight
from .rcp_memory import phase_one_bytes, phase_two_bytes
from .recipe import Recipe, ResolvedRecipe

__all__ = ["DryRun", "Part", "dry_run"]

# FLOP a second by device and dtype of the products: about a third of an A100's peaks (312e12 and 19.5e12 without
# TF32), and what torch reached on two Zen 5 cores (docs/rcp.md).
_RATES = {
    ("cuda", "bfloat16"): 1e14,
    ("cuda", "float32"): 6e12,
    ("cpu", "bfloat16"): 9e11,
    ("cpu", "float32"): 2e11,
}
# Bytes a second of a disk.
_DISK_RATE = 1e9
# laquant_quantize_model's default for the two streams of hidden states in memory.
_STREAM_BYTES = 4 << 30


@dataclass(frozen=True)
class Part:
    """Bytes of one part of a run, at the moment of the largest memory.

    Attributes:
        name: of the part.
        device, host, disk: bytes in each place.
    """

    name: str
    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True)
class DryRun:
    """What a recipe will need. ``str()`` gives a table.

    Attributes:
        recipe: resolved for the model.
        device: type of the device, for example "cuda". On "cpu" device memory is part of host memory.
        processes: that share the training.
        parts: of one process.
        flops: floating point operations of matrix products, of one process.
        rate: the operations a second that ``seconds`` assumes.
        moved: bytes that are read from and written to the disk.
    """

    recipe: ResolvedRecipe
    device: str
    processes: int
    parts: tuple[Part, ...]
    flops: float
    rate: float
    moved: int

    @property
    def device_bytes(self) -> int:
        """Peak of the tensors on the device, in one process."""
        return sum(part.device for part in self.parts)

    @property
    def host_bytes(self) -> int:
        """Peak of the tensors in host memory, in one process."""
        return sum(part.host for part in self.parts)

    @property
    def disk_bytes(self) -> int:
        """The output directory and OUT.training."""
        return sum(part.disk for part in self.parts)

    @property
    def seconds(self) -> float:
        """``flops / rate``, and the time of the disk at 1 GB/s. A model: nothing was measured."""
        return self.flops / self.rate + self.moved / _DISK_RATE

    def __str__(self) -> str:
        rows = [["part", f"{self.device} GB", "host GB", "disk GB"]]
        for part in (*self.parts, Part("sum", self.device_bytes, self.host_bytes, self.disk_bytes)):
            rows.append([part.name, *(f"{x / 1e9:.2f}" if x else "" for x in (part.device, part.host, part.disk))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(-1, "-" * len(lines[0]))
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return "\n".join(
            [
                f"{self.recipe.model}: {self.recipe}",
                *lines,
                f"GB are 1e9 bytes{each}. Not counted: CUDA's context (about 0.5 GB), scratch memory of libraries, the "
                f"allocator's unused blocks, and the model that writes a text.",
                f"time: about {_duration(self.seconds)} after the text and the initial levels. This is a model and not "
                f"measured: {self.flops:.2g} FLOP at {self.rate:.0e} FLOP/s, and {self.moved / 1e9:.1f} GB of "
                f"files at 1 GB/s",
            ]
        )


def _device_anywhere(device: str | torch.device) -> torch.device:
    """A device that need not be there, of a kind that computes."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type == "meta":
        raise ValueError(
            f"dry run: the device must be one that torch computes on, such as cpu, cuda or cuda:1, got "
            f"{str(device)!r}; check the spelling"
        )
    return found


def _world_size() -> int:
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal():
        raise ValueError(
            f"dry run: WORLD_SIZE must be a number of processes, got {value!r}; set it to one, or unset it"
        )
    return int(value)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# More than 60 lines: 18 are the docstring.
def dry_run(
    recipe: Recipe, *, device: str | torch.device | None = None, processes: int | None = None, shard: bool = False
) -> DryRun:
    """What ``quantize(recipe, ...)`` will need.

    The training's own functions count the memory of rcp on the meta device. The memory of gptq and laquant comes from
    the functions that divide a device between a layer and the hidden states.

    Args:
        recipe: its model needs only a config: a directory with nothing but config.json will do.
        device: to compute on. It need not be there. None: as :func:`rcp_kernels.hardware.choose_device`.
        processes: of an rcp training under torchrun. None: ``$WORLD_SIZE``, or 1.
        shard: as for :func:`rcp_kernels.pipeline.quantize`.

    Raises:
        MissingExtra, ValueError, OSError: as quantize for a recipe or a model that it refuses. Also for a family that
            is not in :data:`rcp_kernels.models.FAMILIES`, although rtn quantizes it.
    """
    where = choose_device() if device is None else _device_anywhere(device)
    kind = where.type
    processes = _world_size() if processes is None else processes
    if processes < 1:
        raise ValueError(f"dry run: the number of processes must be at least 1, got {processes}; pass another")
    if recipe.method != "rcp" and (shard or processes > 1):
        raise ValueError(f"dry run: several processes are for method rcp, got {recipe.method}; leave them out")
    if shard and processes < 2:
        raise ValueError(
            "dry run: --shard needs several processes, got 1; set WORLD_SIZE to their number, or leave --shard out"
        )
    # A dataset may be for another machine, whose packages are not those of this one.
    if recipe.method != "rtn" and not (recipe.text or "").startswith("dataset:"):
        check_text(recipe.text)
    build = functools.partial(_skeleton, float_config(recipe.model))
    model = build()
    resolved = recipe.resolve(model, where)
    if recipe.method == "rcp":
        check_processes(resolved.rcp, processes, shard)
    architecture = describe(model)
    linears = sum(rows * columns for rows, columns in architecture.shapes.values()) * len(architecture.layers)
    everything = sum(parameter.numel() for parameter in model.parameters())
    dtype = source_dtype(recipe.model) if recipe.dtype is None else getattr(torch, recipe.dtype)
    packed = _packed_bytes(resolved, architecture) * len(architecture.layers)
    out = packed + (everything - linears) * dtype.itemsize
    head, embedding = (model.get_parameter(f"{name}.weight") for name in (architecture.head, architecture.embed))
    if resolved.untie_head and head is embedding:
        out += head.numel() * dtype.itemsize
    run = _Run(resolved, architecture, build, kind, processes, shard, everything, packed)
    parts = _PARTS[recipe.method](run)
    if resolved.rotation != "none":
        rotation = rotation_device_bytes(architecture, embedding.shape[0], resolved.rotation)
        if rotation > sum(part.device for part in parts):
            # The rotation comes first, and its peak is then the run's.
            parts = [Part("rotation", device=rotation), *(dataclasses.replace(part, device=0) for part in parts)]
    parts.append(Part("output directory", disk=out))
    if kind == "cpu":
        parts = [Part(part.name, 0, part.host + part.device, part.disk) for part in parts]
    flops, exact = _flops(resolved, architecture, linears, processes)
    rate = _RATES[kind if kind == "cpu" else "cuda", "float32" if exact else "bfloat16"]
    moved = everything * dtype.itemsize + out
    return DryRun(resolved, kind, processes, tuple(parts), flops, rate, moved)


@dataclass(frozen=True)
class _Run:
    recipe: ResolvedRecipe
    architecture: Architecture
    build: Callable[..., nn.Module]
    kind: str
    processes: int
    shard: bool
    everything: int
    packed: int


def _skeleton(config: Any, layers: int | None = None) -> nn.Module:
    """A float32 model on the meta device, with all decoder layers or the first few."""
    extras.require("transformers")
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _packed_bytes(recipe: ResolvedRecipe, architecture: Architecture) -> int:
    """Bytes of the packed weights of a decoder layer, from packed weights of a few rows."""
    levels = {"laquant": "uniform", "rcp": "kmeans" if recipe.w_bits == 2 else "uniform"}
    rows = 8
    total = 0
    for out_features, in_features in architecture.shapes.values():
        values = torch.randn((rows, in_features), generator=torch.Generator().manual_seed(0))
        chosen = levels.get(recipe.method, recipe.levels)
        total += quantize_weight(values, recipe.w_bits, recipe.group_size, chosen).nbytes * out_features // rows
    return total


def _flops(recipe: ResolvedRecipe, architecture: Architecture, linears: int, processes: int) -> tuple[float, bool]:
    """Operations of the products with weights and Hessians, and whether these are in float32.

    A forward pass has 2 operations for each weight and token, a backward pass 4.
    """
    tokens = recipe.samples * recipe.window
    if recipe.method == "rtn":
        return 0.0, True
    if recipe.method == "laquant":
        # A step: forward and backward of the layer, and of the next one to its input. Six passes without a gradient,
        # two of them through both layers: both streams, the inputs' squares, the loss before and after.
        layer = recipe.laquant
        return float(linears * tokens * (layer.epochs * (6 + 4 * layer.lookahead) + 14)), layer.dtype == "float32"
    if recipe.method == "gptq":
        sizes = architecture.shapes.values()
        grams = tokens * sum(architecture.shapes[name][1] ** 2 for name in ("q", "o", "gate", "down"))
        factors = 3 * sum(architecture.shapes[name][1] ** 3 for name in ("q", "o", "gate", "down"))
        feedback = 4 * sum(rows * columns**2 for rows, columns in sizes)
        # Three passes of the text: the parts before each step, most of which is kept, and the quantized layer.
        return float(6 * linears * tokens + len(architecture.layers) * (grams + factors + feedback)), True
    config = recipe.rcp
    updates = config.steps * config.batch * recipe.window / processes
    total = updates * linears * (2 + 6 + (2 if config.activation_checkpointing else 0))
    if config.blocks is not None:
        total += config.blocks.sequences * recipe.window * linears * (2 + 2 + 6 * config.blocks.epochs)
    return total, not config.bf16


def _rtn(run: _Run) -> list[Part]:
    largest = max(rows * columns for rows, columns in run.architecture.shapes.values())
    return [
        Part("float model", host=4 * run.everything),
        Part("one weight", device=rtn_device_bytes(largest, run.recipe.levels)),
        Part("packed weights", host=run.packed),
    ]


def _gptq(run: _Run) -> list[Part]:
    hidden = 4 * run.recipe.samples * run.recipe.window * run.architecture.hidden_size
    return [
        Part("float model", host=4 * run.everything),
        Part(
            "one layer and Hessian", device=gptq_device_bytes(run.architecture, run.recipe.samples, run.recipe.window)
        ),
        Part("hidden states", host=hidden),
        Part("packed weights", host=run.packed),
    ]


def _laquant(run: _Run) -> list[Part]:
    streams = 2 * 4 * run.recipe.samples * run.recipe.window * run.architecture.hidden_size
    in_memory = streams <= _STREAM_BYTES
    return [
        Part("float model", host=4 * run.everything),
        Part(
            "layers in training", device=laquant_device_bytes(run.architecture, run.recipe.laquant, run.recipe.window)
        ),
        # Embedded text is in memory first, twice for a moment.
        Part("hidden states, twice", host=streams, disk=0 if in_memory else streams),
        Part("packed weights", host=run.packed),
        Part("OUT.training", disk=run.packed),
    ]


def _rcp(run: _Run) -> list[Part]:
    config, layers = run.recipe.rcp, len(run.architecture.layers)
    fused = run.kind in ("cpu", "cuda")  # torch has a fused attention for these
    found = phase_two_bytes(run.build, layers, config, run.recipe.window, fused, run.processes, run.shard)
    name = "phase two"
    streams = 0
    if config.blocks is not None:
        streams = 2 * 4 * config.blocks.sequences * run.recipe.window * run.architecture.hidden_size
        first = phase_one_bytes(run.build(1), config, config.blocks, run.recipe.window, fused)
        if first.total() > found.total():
            found, name = first, "phase one"
    if run.kind == "cpu" and not run.shard:  # each worker has a micro-batch of its own
        parts_of_worker = ("activations", "logits")
        workers = min(config.workers, max(1, config.batch // (config.micro_batch * run.processes)))
        found.update({part: (workers - 1) * found[part] for part in parts_of_worker if name == "phase two"})
    parts = [Part(f"{name}: {part}", device=size) for part, size in sorted(found.items()) if size > 0]
    if run.kind != "cpu":  # there the float model and its copy are the weights and the teacher of the phases
        parts += [Part("float model", host=4 * run.everything), Part("teacher, a copy of it", host=4 * run.everything)]
    parts.append(Part("hidden states of phase one", host=streams))
    trained = sum(4 * rows * columns for rows, columns in run.architecture.shapes.values()) * layers
    groups = (4 if config.bits == 2 else 2) * trained // config.group_size
    state = trained + groups
    # While a checkpoint is written, the old one is still there. It has the student and AdamW's two states.
    states = 2.0 * (1 + (2 if config.optimizer == "adamw" else 0.51)) + 2.0
    parts.append(Part("OUT.training", disk=int(states * state)))
    return parts


_PARTS = {"rtn": _rtn, "gptq": _gptq, "laquant": _laquant, "rcp": _rcp}
