"""The ablation table: every method with every rotation, and the parts of RCP one after the other. Resumable.

Each cell is one JSON file; a cell whose file is there is not measured again, so the table can be made in pieces, by
several runs after each other, and a run that was stopped loses one cell at most. docs/ablation.md has the result.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import extras, hardware
from .atomic import write_atomic
from .commands.evaluate import with_quantized_cache
from .commands.quantize import quantize_layers, windows_of
from .commands.recipe import Recipe
from .commands.sources import encode, group_size_of, held_out_text, load_float
from .methods.rotate import ROTATIONS, rotate_model
from .perplexity import perplexity

__all__ = ["CLAIMS", "Cell", "cells", "checks", "read", "run", "table", "write"]

FORMATS = {"W2A16": (2, 16, 16), "W2A4": (2, 4, 16), "W2A4KV4": (2, 4, 4)}
"""Bits of weights, activations, and keys and values."""

WINDOW = 512
CALIBRATION = 8
"""Windows of 512 tokens that GPTQ calibrates on."""

_TRAINING = {
    "steps": 0,
    "batch": 8,
    "micro_batch": 4,
    "weight_lr": 4e-4,
    "validate_every": 1000,
    "checkpoint_every": 1000,
    "blocks": {"sequences": 24, "epochs": 1, "batch": 4},
}
_PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("none", {"init": "uniform", "learn_clip": False, "learn_partition": False}),
    "+rotate": ("gsr", {"init": "uniform", "learn_clip": False, "learn_partition": False}),
    "+clip": ("gsr", {"init": "clip", "learn_clip": True, "learn_partition": False}),
    "+partition": ("gsr", {"init": "kmeans", "learn_clip": True, "learn_partition": True}),
}
"""RCP's parts in the order of the paper's ablation: the rotation, and what differs from RcpConfig."""


@dataclass(frozen=True)
class Cell:
    """One measurement: a format, a method, a rotation (of "rcp": a part), and the recipe; no recipe for the float."""

    format: str
    method: str
    variant: str
    recipe: Recipe | None

    @property
    def name(self) -> str:
        """Name of the file, less its suffix."""
        return "_".join((self.format, self.method, self.variant)).replace("+", "plus_")


def cells(model: str = "demo", steps: int = 10) -> Iterator[Cell]:
    """All cells, the cheap ones and the ones that others are compared with first.

    Args:
        model: what quantize takes as MODEL.
        steps: updates of a trained cell, of 8 windows of 256 tokens each.
    """
    yield Cell("FP", "float", "none", None)
    for name, (w_bits, a_bits, kv_bits) in FORMATS.items():
        for method in ("rtn", "gptq"):
            for rotation in ROTATIONS:
                recipe = Recipe(
                    model,
                    method,
                    rotation,
                    w_bits,
                    a_bits,
                    kv_bits,
                    levels="kmeans",
                    samples=CALIBRATION,
                )
                yield Cell(name, method, rotation, recipe)
    yield Cell("W3A16", "gptq", "gsr", Recipe(model, "gptq", "gsr", 3, 16, 16, levels="kmeans", samples=CALIBRATION))
    for part, (rotation, fields) in _PARTS.items():
        training = {**_TRAINING, **fields, "steps": steps}
        yield Cell("W2A4KV4", "rcp", part, Recipe(model, "rcp", rotation, 2, 4, 4, training=training))


def run(
    folder: Path,
    *,
    model: str = "demo",
    only: str | None = None,
    steps: int = 10,
    tokens: int = 4096,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure the cells that are not there yet.

    Args:
        folder: of the cells.
        model: what quantize takes as MODEL.
        only: measure cells whose name contains this.
        steps: see :func:`cells`.
        tokens: of pydoc's topics that the perplexity is measured on, in windows of 512.
        log: called with a line after each cell.

    Raises:
        ValueError: a cell that is there was measured on another number of tokens; or as quantizing raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells(model, steps):
        path = folder / f"{cell.name}.json"
        if only is not None and only not in cell.name:
            continue
        if path.exists():
            found = json.loads(path.read_text())["tokens"]
            if found != tokens // WINDOW * WINDOW:
                raise ValueError(
                    f"ablation: {path} must be measured on {tokens} tokens as this run is, got {found}; use another "
                    f"folder"
                )
            continue
        log(f"{cell.name}: ...")
        row = measure(cell, model, tokens)
        write_atomic(path, (json.dumps(row, indent=2) + "\n").encode())
        log(f"{cell.name}: perplexity {row['perplexity']:.2f}, {row['cpu_seconds']:.0f} CPU seconds")


def measure(cell: Cell, name: str, tokens: int) -> dict[str, Any]:
    """Quantize a model as a cell says, and measure it."""
    started = time.perf_counter(), time.process_time()
    model, tokenizer = load_float(name)
    facts: dict[str, Any] = {}
    kv_bits = 16
    if cell.recipe is not None:
        recipe = dataclasses.replace(cell.recipe, group_size=group_size_of(model, cell.recipe.group_size))
        assert recipe.group_size is not None
        kv_bits = recipe.kv_bits
        if recipe.rotation != "none":
            rotate_model(model, recipe.rotation, group_size=recipe.group_size, r3=kv_bits != 16, seed=recipe.seed)
        ids = None
        if recipe.method != "rtn":
            ids, facts = windows_of(recipe, tokenizer)
        result = quantize_layers(model, recipe, ids, None)
        facts = {"recipe": dataclasses.asdict(recipe), "text_trained_on": facts, "training": result.get("training")}
    text, source = held_out_text(None, None, tokens)
    ids = encode(tokenizer, text)[:tokens]
    value = perplexity(with_quantized_cache(model, kv_bits), ids, WINDOW)  # type: ignore[arg-type]
    return {
        "format": cell.format,
        "method": cell.method,
        "variant": cell.variant,
        "perplexity": value,
        "tokens": ids.numel() // WINDOW * WINDOW,
        "text": source,
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],
        "torch_threads": torch.get_num_threads(),
        "conditions": hardware.conditions(),
        **facts,
    }


def read(folder: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The cells that are there, by format, method and variant."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(row["format"], row["method"], row["variant"]): row for row in rows}


def table(folder: Path) -> str:
    """The cells as a Markdown table, and what became of the papers' claims."""
    found = read(folder)

    def text(*key: str) -> str:
        return f"{found[key]['perplexity']:.4g}" if key in found else "-"

    lines = [f"| | {' | '.join(ROTATIONS)} |", "| --- |" + " ---: |" * len(ROTATIONS)]
    lines.append(f"| FP | {text('FP', 'float', 'none')} |" + " |" * (len(ROTATIONS) - 1))
    for name in FORMATS:
        for method in ("rtn", "gptq"):
            values = (text(name, method, rotation) for rotation in ROTATIONS)
            lines.append(f"| {name} {method.upper()} | {' | '.join(values)} |")
    lines.append(f"| W3A16 GPTQ | | | | | {text('W3A16', 'gptq', 'gsr')} |")
    lines += ["", f"| | {' | '.join(_PARTS)} |", "| --- |" + " ---: |" * len(_PARTS)]
    lines.append(f"| W2A4KV4 RCP | {' | '.join(text('W2A4KV4', 'rcp', part) for part in _PARTS)} |")
    return "\n".join([*lines, "", *checks(found)])


CLAIMS = (
    ("gptq", ("gsr", "local_hadamard", "walsh", "hadamard"), "GSR <= LH <= GW <= GH under GPTQ (GSR, table 1)"),
    ("rcp", ("+partition", "+clip", "+rotate", "uniform"), "each part of RCP helps (RCP's ablation)"),
)
"""Method, variants from best to worst, and who says so."""


def checks(found: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """One line for each claim and format whose cells are all there: whether the order holds here."""
    lines = []
    for name in FORMATS:
        for method, order, claim in CLAIMS:
            keys = [(name, method, variant) for variant in order]
            if not all(key in found for key in keys):
                continue
            values = [found[key]["perplexity"] for key in keys]
            holds = all(a <= b for a, b in itertools.pairwise(values))
            shown = ", ".join(f"{variant} {value:.4g}" for variant, value in zip(order, values, strict=True))
            lines.append(f"{name}: {claim}: {'holds' if holds else 'does not hold'} ({shown})")
        same = [found.get((name, "rtn", rotation)) for rotation in ("gsr", "local_hadamard")]
        if same[0] and same[1]:
            ratio = same[0]["perplexity"] / same[1]["perplexity"]
            lines.append(f"{name}: GSR equals LH under RTN (the same columns in each group): ratio {ratio:.6f}")
    return lines


def write(folder: Path, results: Path) -> None:
    """Write ``ablation.csv`` and ``ablation.png`` of the cells that are there.

    Raises:
        MissingExtra: matplotlib is missing.
    """
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    found = read(folder)
    results.mkdir(parents=True, exist_ok=True)
    fields = ["format", "method", "variant", "perplexity", "tokens", "text", "cpu_seconds"]
    with (results / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "cpu_seconds": round(row["cpu_seconds"], 1)} for row in found.values())
    panels = [name for name in FORMATS if any(key[0] == name for key in found)]
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        labels, heights, colors = [], [], []
        for method, color in (("rtn", "0.6"), ("gptq", "tab:blue"), ("rcp", "tab:orange")):
            for variant in ROTATIONS if method != "rcp" else _PARTS:
                row = found.get((name, method, variant))
                if row is not None and math.isfinite(row["perplexity"]):
                    labels.append(f"{method} {variant}")
                    heights.append(row["perplexity"])
                    colors.append(color)
        axes.bar_label(axes.bar(labels, heights, color=colors), fmt="{:.3g}", fontsize=7)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.tick_params(axis="x", rotation=90)
        axes.spines[["top", "right"]].set_visible(False)
        if ("FP", "float", "none") in found:
            axes.axhline(found["FP", "float", "none"]["perplexity"], color="k", lw=0.8, ls="--")
    figure.supylabel("perplexity (log scale; dashed: float)")
    figure.savefig(results / "ablation.png", dpi=120)
