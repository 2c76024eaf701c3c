"""The ablation table: every method with every rotation, and the parts of RCP one after the other. Resumable.

Each cell is one JSON file. A cell whose file exists is not measured again, so a stopped run loses one cell at most.
docs/ablation.md has the result.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from rcp_kernels import extras, hardware
from rcp_kernels.data.by_name import held_out_text
from rcp_kernels.evaluation.perplexity import perplexity
from rcp_kernels.methods.files import write_atomic
from rcp_kernels.methods.rotate.rotate_model import ROTATIONS
from rcp_kernels.models.load import encode, load_float
from rcp_kernels.pipeline.evaluate import with_quantized_cache
from rcp_kernels.pipeline.recipe import Recipe
from rcp_kernels.pipeline.steps import quantize_layers, rotate, windows_of

__all__ = ["CLAIMS", "Cell", "Source", "cells", "checks", "measure", "read", "run", "table", "write"]

Rows = dict[tuple[str, str, str], list[dict[str, Any]]]
"""Measured cells by format, method and variant, one for each seed."""

FORMATS = {"W2A16": (2, 16, 16), "W2A4": (2, 4, 16), "W2A4KV4": (2, 4, 4)}
"""Bits of weights, activations, and keys and values."""

WINDOW = 512
CALIBRATION = 8
"""Windows of 512 tokens that GPTQ calibrates on."""

_TRAINING = {
    "steps": 0, "batch": 8, "micro_batch": 4, "warmup": 2, "weight_lr": 4e-4,
    "validate_every": 1000, "checkpoint_every": 1000, "blocks": {"sequences": 16, "epochs": 1, "batch": 4},
}  # fmt: skip
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
        name = "_".join((self.format, self.method, self.variant)).replace("+", "plus_")
        return f"{name}_seed{self.seed}" if self.seed else name

    @property
    def seed(self) -> int:
        """Of the calibration windows, of random signs and of the training."""
        return 0 if self.recipe is None else self.recipe.seed


def cells(model: str = "demo", steps: int = 6, seed: int = 0) -> Iterator[Cell]:
    """All cells, the cheap ones and the ones that others are compared with first.

    Args:
        model: what quantize takes as MODEL.
        steps: updates of a trained cell, of 8 windows of 256 tokens each.
        seed: of everything random; which windows of the text are calibrated on depends on it too.
    """
    yield Cell("FP", "float", "none", None)
    for name, (w_bits, a_bits, kv_bits) in FORMATS.items():
        for method in ("rtn", "gptq"):
            for rotation in ROTATIONS:
                fields: dict[str, Any] = {"levels": "kmeans", "samples": CALIBRATION, "seed": seed}
                recipe = Recipe(model, method, rotation, w_bits, a_bits, kv_bits, **fields)
                yield Cell(name, method, rotation, recipe)
    three_bits = Recipe(model, "gptq", "gsr", 3, 16, 16, levels="kmeans", samples=CALIBRATION, seed=seed)
    yield Cell("W3A16", "gptq", "gsr", three_bits)
    for part, (rotation, fields) in _PARTS.items():
        training = {**_TRAINING, **fields, "steps": steps}
        recipe = Recipe(model, "rcp", rotation, 2, 4, 4, sequence=256, training=training, seed=seed)
        yield Cell("W2A4KV4", "rcp", part, recipe)


class Source:
    """The float model and the texts, each read once for all cells."""

    def __init__(self, name: str, device: str | None = None) -> None:
        """Take the name of a model and of a device, as quantize does; nothing is read yet."""
        self.name, self.device = name, hardware.choose_device(device)
        self._windows: dict[tuple[str, int, int, int], tuple[Tensor, dict[str, Any]]] = {}

    @functools.cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        return load_float(self.name, self.device)

    def model(self) -> nn.Module:
        """A float model of one's own."""
        return copy.deepcopy(self._loaded[0])

    def windows(self, recipe: Recipe) -> tuple[Tensor, dict[str, Any]]:
        """What ``windows_of`` gives for docstrings."""
        key = (recipe.method, recipe.window, recipe.samples, recipe.seed)
        if key not in self._windows:
            self._windows[key] = windows_of(recipe, self._loaded[1])
        return self._windows[key]

    @functools.cached_property
    def held_out(self) -> tuple[Tensor, str]:
        """int64 [tokens] of a text that nothing was calibrated on, all of it, and its name."""
        text, name = held_out_text(None, None, 0)
        return encode(self._loaded[1], text), name


def run(
    folder: Path,
    *,
    model: str = "demo",
    only: str | None = None,
    steps: int = 6,
    tokens: int = 4096,
    seed: int = 0,
    device: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> None:
    """Measure the cells that are not there yet.

    Args:
        folder: of the cells.
        model: what quantize takes as MODEL.
        only: measure cells whose name contains this.
        steps: see :func:`cells`.
        tokens: of pydoc's topics that the perplexity is measured on, in windows of 512.
        seed: see :func:`cells`; other seeds' cells lie beside each other, and the table shows them all.
        device: see :func:`rcp_kernels.hardware.choose_device`.
        log: called with a line after each cell.

    Raises:
        ValueError: no cell of this name; a cell that is there was measured on another number of tokens, or by another
            recipe; or as quantizing raises.
    """
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [cell for cell in cells(model, steps, seed) if only is None or only in cell.name]
    if not chosen:
        raise ValueError(
            f"ablation: --only must be part of a cell's name, got {only!r}; the names are "
            f"{', '.join(cell.name for cell in cells(model, steps, seed))}"
        )
    read(folder)  # what is no cell is found before hours of measuring
    source = Source(model, device)
    for cell in chosen:
        path = folder / f"{cell.name}.json"
        if path.exists():
            _check_same(path, cell, tokens // WINDOW * WINDOW, model)
            continue
        log(f"{cell.name}: ...")
        row = measure(cell, source, tokens)
        write_atomic(path, (json.dumps(row, indent=2) + "\n").encode())
        log(f"{cell.name}: perplexity {row['perplexity']:.2f}, {row['cpu_seconds']:.0f} CPU seconds")


def _check_same(path: Path, cell: Cell, tokens: int, model: str) -> None:
    """Refuse a cell that was measured in another way than this run would."""
    row = _read_cell(path)
    if row.get("model") != model:
        raise ValueError(
            f"ablation: {path} must be of the model {model!r} as this run is, got {row.get('model')!r}; use another "
            f"folder"
        )
    if row["tokens"] != tokens:
        raise ValueError(
            f"ablation: {path} must be measured on {tokens} tokens as this run is, got {row['tokens']}; use another "
            f"folder"
        )
    recipe = row.get("recipe") or {}
    for name, value in {} if cell.recipe is None else dataclasses.asdict(cell.recipe).items():
        if name != "group_size" and name in recipe and recipe[name] != value:
            raise ValueError(
                f"ablation: {name} of {path} must be {value!r} as this run's, got {recipe[name]!r}; use another folder"
            )


def measure(cell: Cell, source: Source, tokens: int) -> dict[str, Any]:
    """Quantize a model as a cell says, and measure it; the seconds are without reading the model and the texts."""
    ids, text = source.held_out
    ids = ids[:tokens]
    calibration: Tensor | None = None
    trained_on: dict[str, Any] = {}
    if cell.recipe is not None and cell.recipe.method != "rtn":
        calibration, trained_on = source.windows(cell.recipe)
    model = source.model()
    started = time.perf_counter(), time.process_time()
    facts: dict[str, Any] = {}
    kv_bits = 16
    if cell.recipe is not None:
        recipe = cell.recipe.resolve(model, source.device)
        kv_bits = recipe.kv_bits
        rotate(model, recipe)
        result = quantize_layers(model, recipe, calibration)
        facts = {
            "recipe": dataclasses.asdict(dataclasses.replace(cell.recipe, group_size=recipe.group_size)),
            "text_trained_on": trained_on,
            "training": result.get("training"),
        }
    value = perplexity(with_quantized_cache(model, kv_bits), ids, WINDOW)  # type: ignore[arg-type]
    return {
        "format": cell.format,
        "method": cell.method,
        "variant": cell.variant,
        "seed": cell.seed,
        "model": source.name,
        "perplexity": value,
        "tokens": ids.numel() // WINDOW * WINDOW,
        "text": text,
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],
        "torch_threads": torch.get_num_threads(),
        "conditions": hardware.conditions(source.device),
        "transformers": importlib.metadata.version("transformers"),
        **facts,
    }


def _read_cell(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text())
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"format", "method", "variant", "perplexity", "tokens"} <= set(row):
        raise ValueError(f"ablation: {path} must be a cell that ablation wrote, got another file; use another folder")
    return row


def read(folder: Path) -> Rows:
    """The cells that are there, by format, method and variant; of several seeds the lowest first."""
    found: Rows = {}
    for path in sorted(folder.glob("*.json")):
        row = _read_cell(path)
        found.setdefault((row["format"], row["method"], row["variant"]), []).append(row)
    for rows in found.values():
        rows.sort(key=lambda row: row.get("seed", 0))
    return found


def table(folder: Path) -> str:
    """The cells as a Markdown table, several seeds side by side, and what became of the papers' claims."""
    found = read(folder)

    def text(name: str, method: str, variant: str) -> str:
        return " / ".join(f"{row['perplexity']:.4g}" for row in found.get((name, method, variant), [])) or "-"

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


def checks(found: Rows) -> list[str]:
    """One line for each claim and format whose cells are all there: whether the order holds, of means over seeds."""
    means = {key: _mean(rows) for key, rows in found.items()}
    lines = []
    for name in FORMATS:
        for method, order, claim in CLAIMS:
            keys = [(name, method, variant) for variant in order]
            if not all(key in means for key in keys):
                continue
            values = [means[key] for key in keys]
            holds = all(a <= b for a, b in itertools.pairwise(values))
            shown = ", ".join(f"{variant} {value:.4g}" for variant, value in zip(order, values, strict=True))
            lines.append(f"{name}: {claim}: {'holds' if holds else 'does not hold'} ({shown})")
        same = [means.get((name, "rtn", rotation)) for rotation in ("gsr", "local_hadamard")]
        if same[0] and same[1]:
            lines.append(
                f"{name}: GSR equals LH under RTN (the same columns in each group): ratio {same[0] / same[1]:.6f}"
            )
    return lines


def _mean(rows: list[dict[str, Any]]) -> float:
    """Of perplexities: the geometric one, as a perplexity is the exponential of what is averaged over text."""
    return math.exp(sum(math.log(row["perplexity"]) for row in rows) / len(rows))


def write(folder: Path, results: Path) -> None:
    """Write ``ablation.csv`` and ``ablation.png`` of the cells that are there.

    Raises:
        MissingExtra: matplotlib is missing.
    """
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    found = read(folder)
    results.mkdir(parents=True, exist_ok=True)
    fields = ["format", "method", "variant", "seed", "perplexity", "tokens", "text", "cpu_seconds"]
    with (results / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in itertools.chain.from_iterable(found.values()):
            writer.writerow({"seed": 0, **row, "cpu_seconds": round(row["cpu_seconds"], 1)})
    panels = [name for name in FORMATS if any(key[0] == name for key in found)]
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        labels: list[str] = []
        heights: list[float] = []
        colors: list[str] = []
        seeds: list[tuple[int, float]] = []
        for method, color in (("rtn", "0.6"), ("gptq", "tab:blue"), ("rcp", "tab:orange")):
            for variant in ROTATIONS if method != "rcp" else _PARTS:
                rows = found.get((name, method, variant), [])
                if rows and math.isfinite(_mean(rows)):
                    seeds += [(len(labels), row["perplexity"]) for row in rows if len(rows) > 1]
                    labels.append(f"{method} {variant}")
                    heights.append(_mean(rows))
                    colors.append(color)
        axes.bar_label(axes.bar(labels, heights, color=colors), fmt="{:.3g}", fontsize=7)
        axes.plot([place for place, _ in seeds], [value for _, value in seeds], "k.", ms=3)
        axes.set_title(name)
        axes.set_yscale("log")
        axes.tick_params(axis="x", rotation=90)
        axes.spines[["top", "right"]].set_visible(False)
        if ("FP", "float", "none") in found:
            axes.axhline(_mean(found["FP", "float", "none"]), color="k", lw=0.8, ls="--")
    figure.supylabel("perplexity")
    figure.suptitle("dashed: the float model; dots: seeds", fontsize=8)
    figure.savefig(results / "ablation.png", dpi=120)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the cells, one JSON file each.", file_okay=False)],
    model: Annotated[str, typer.Option(help="Model, named as for rcp-kernels quantize.")] = "demo",
    results: Annotated[Path | None, typer.Option(help="Folder for CSV and PNG.", file_okay=False)] = None,
    only: Annotated[str | None, typer.Option(help="Measure only cells whose name contains this.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates of a trained cell.")] = 6,
    tokens: Annotated[int, typer.Option(min=WINDOW, help="Held-out tokens, in windows of 512.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of calibration windows, random signs and training.")] = 0,
    device: Annotated[str | None, typer.Option(help="As for rcp-kernels quantize.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. The default is torch's.")] = None,
) -> None:
    """Measure every method with every rotation. Cells whose file exists are not measured again."""
    if threads is not None:
        torch.set_num_threads(threads)
    run(out, model=model, only=only, steps=steps, tokens=tokens, seed=seed, device=device, log=_log)
    print(table(out))
    if results is not None:
        write(out, results)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (extras.MissingExtra, ValueError, OSError, MemoryError, RuntimeError) as error:
        raise SystemExit(f"ablation: {error}") from None
