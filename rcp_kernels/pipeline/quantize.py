"""``rcp-kernels quantize``: from a float model to a directory with packed weights, its recipe and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, hardware
from ..checkpoint import QuantizationConfig, cast_floats, check_fits, check_output, save_quantized
from ..data.by_name import TEXTS, Progress, check_text
from ..hardware import choose_device
from ..methods.laquant.layer_losses import losses_csv, losses_png
from ..methods.layers import check_vocabulary
from ..methods.rcp import load_trained
from ..methods.rcp.training_state import write_curve
from ..methods.rotate.rotate_model import Rotated
from ..methods.student import export_student
from ..models import describe
from ..models.lazy import values_of
from ..models.load import load_float, source_bytes, source_dtype
from ..models.load_lazily import can_load_lazily, load_lazily
from ..nn import storage_report
from .recipe import Recipe, ResolvedRecipe, recipe_text
from .steps import quantize_layers, rotate, windows_of
from .summary import Summary

__all__ = ["quantize"]

# The file in OUT.training that shows a training which has not ended.
_STATES = {"rcp": "state.pt", "laquant": "run.json"}
# Every file that a training writes. The name of a file begins with a dot while it is written.
_STATE_FILES = re.compile(r"\.?(state\.pt|best\.pt|log\.jsonl|curve\.csv|run\.json|layer_\d+\.safetensors)(\.\w+)?")


# More than 60 lines: 32 are the docstring.
def quantize(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    shard: bool = False,
    device: str | torch.device | None = None,
    progress: Progress = lambda *_: None,
) -> Summary | None:
    """Quantize a model as a recipe says, and write it.

    Args:
        recipe: the model and the method.
        out: the directory to make. A quantized model that is already there is replaced. A training keeps its state in
            ``OUT.training`` beside it until the model is written.
        resume: continue the training whose state is there.
        shard: with rcp under torchrun: see :func:`rcp_kernels.methods.rcp.train`.
        device: to compute on, as :func:`rcp_kernels.hardware.choose_device` takes it. It is no part of the recipe: the
            result is that of the recipe up to float sums. Under torchrun each process takes the GPU of its rank.
        progress: see :data:`rcp_kernels.data.by_name.Progress`.

    Returns:
        A description of the written model. Under torchrun every process but the first returns None.

    Raises:
        MissingExtra, ValueError, OSError, Diverged: as the steps raise them. ``out`` is then as it was before.
        RuntimeError: activations are quantized on a CUDA device, and the CUDA kernels are missing.
    """
    out = Path(out).resolve()
    work = out.with_name(out.name + ".training")
    device = _device_of_process(choose_device(device))
    if recipe.bits[1] != 16:  # activations are quantized by our kernels, after minutes of other work
        hardware.require_kernels(device, "quantize")
    _check_arguments(recipe, out, work, resume, shard)
    started = time.perf_counter(), time.process_time()
    model, tokenizer = _load(recipe, progress)
    dtype = source_dtype(recipe.model) if recipe.dtype is None else getattr(torch, recipe.dtype)
    bytes_before = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    recipe = recipe.resolve(model, device)
    progress("recipe", 0, 0, f"{recipe}, on {device}")
    facts: dict[str, Any] = {}
    ids = None
    if recipe.method != "rtn":  # before the rotation: the float model may have to write the text
        ids, facts = windows_of(recipe, tokenizer, model, progress, device)
        check_vocabulary(model, ids, "quantize")
    rotated = rotate(model, recipe, device)
    _check_dtype(model, dtype, recipe.method)
    if recipe.method in _STATES:
        work.mkdir(parents=True, exist_ok=True)
    with _full_disk_named(work):
        facts.update(quantize_layers(model, recipe, ids, work, progress, shard, device))
    if int(os.environ.get("RANK", "0")):
        return None  # the first process writes
    if shard:
        model = _whole(recipe, work)
    cast_floats(model, dtype)
    summary = Summary(
        out=out,
        storage=storage_report(model),
        dtype=str(dtype).removeprefix("torch."),
        bytes_before=bytes_before,
        bytes_source=source_bytes(recipe.model),
        bytes_after=0,
        bytes_untied=_head_bytes(model) if rotated is not None and rotated.untied else 0,
        seconds=time.perf_counter() - started[0],
        cpu_seconds=time.process_time() - started[1],
    )
    facts.update(
        summary.fields(),
        device=str(device),
        rcp_kernels=__version__,
        transformers=importlib.metadata.version("transformers"),
        conditions=hardware.conditions(device),
    )
    config = _stored_config(recipe, rotated)
    save_quantized(model, out, config, tokenizer=tokenizer, files=_reports(recipe, facts, work))
    if recipe.method in _STATES:
        _remove_state(work)
    return dataclasses.replace(summary, bytes_after=sum(path.stat().st_size for path in out.glob("*.safetensors")))


def _device_of_process(device: torch.device) -> torch.device:
    """The device of this process: under torchrun the GPU of its rank on this machine."""
    if device.type == "cpu" or os.environ.get("WORLD_SIZE", "1") == "1":
        return device
    if device != torch.device(device.type):
        raise ValueError(
            f"quantize: under torchrun each process takes the GPU of its rank, and the device must have no index, got "
            f"{device}; pass {device.type}"
        )
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))


def _load(recipe: Recipe, progress: Progress) -> tuple[nn.Module, Any]:
    progress("reading the model", 0, 1, recipe.model)
    # A model that is trained as a whole, or writes its text, has to be in memory.
    lazily = recipe.method != "rcp" and recipe.text not in TEXTS and can_load_lazily(recipe.model)
    model, tokenizer = load_lazily(recipe.model) if lazily else load_float(recipe.model)
    progress("reading the model", 1, 1, recipe.model)
    for name, parameter in model.named_parameters():
        # No method reads all weights, so NaN and Inf could first show in the quantized model.
        if not bool(torch.isfinite(values_of(parameter)).all()):
            raise ValueError(f"quantize: {name} must be finite, got NaN or Inf; check the checkpoint for overflow")
    return model, tokenizer


def _whole(recipe: ResolvedRecipe, work: Path) -> nn.Module:
    """The trained model after FSDP, where this process holds only a shard: the float model and the best checkpoint."""
    model, _ = load_float(recipe.model)
    rotate(model, recipe)
    load_trained(model, recipe.rcp, work)
    export_student(model)
    return model


def _check_arguments(recipe: Recipe, out: Path, work: Path, resume: bool, shard: bool) -> None:
    """Refuse before the model is loaded whatever can be refused then."""
    if Path(recipe.model).exists() and Path(recipe.model).resolve().is_relative_to(out):
        raise ValueError(
            f"quantize: OUT must not be or hold the model that is read, got {out}; choose another directory"
        )
    check_output(out)
    if recipe.method != "rtn":
        check_text(recipe.text)
    if resume and recipe.method not in _STATES:
        raise ValueError(f"quantize: --resume is for method rcp or laquant, got {recipe.method}; leave it out")
    processes = os.environ.get("WORLD_SIZE", "1")
    if shard and (recipe.method != "rcp" or int(processes) < 2):
        raise ValueError(
            f"quantize: --shard is for method rcp in several processes, got {recipe.method} in {processes}; start it "
            f"with torchrun, or leave it out"
        )
    if recipe.method in _STATES:
        if work.exists() and not work.is_dir():
            raise ValueError(f"quantize: {work} must be free for the training's state, got a file; move it away")
        # The directory is deleted at the end.
        strange = sorted(p.name for p in work.glob("*") if not _STATE_FILES.fullmatch(p.name))
        if strange:
            raise ValueError(
                f"quantize: {work} must hold a training's state and nothing else, got {strange[0]!r} ({len(strange)} "
                f"such); move it away or choose another OUT"
            )
    for method, name in _STATES.items():
        if (work / name).exists() and not (resume and method == recipe.method):
            option = "--resume" if method == recipe.method else f"--method {method} --resume"
            raise ValueError(
                f"quantize: {work} must not hold a training that was not finished, got one of {method}; pass {option} "
                f"to go on with it, or delete the directory"
            )
    if resume and not (work / _STATES[recipe.method]).exists():
        raise ValueError(
            f"quantize: --resume needs the state of a training, got no {work / _STATES[recipe.method]}; leave --resume "
            f"out to start one"
        )


def _check_dtype(model: nn.Module, dtype: torch.dtype, method: str) -> None:
    """Refuse, before hours of training, parameters outside the linear layers that dtype cannot hold."""
    if method == "rtn":  # works for families that have no description
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    else:
        linears = [name for layer in describe(model).layers for name in layer.linears]
    packed = tuple(f"{name}." for name in linears)
    check_fits({name: p for name, p in model.named_parameters() if not name.startswith(packed)}, dtype)


def _head_bytes(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(parameter.nbytes for parameter in head.parameters())


@contextlib.contextmanager
def _full_disk_named(work: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"quantize: {work} must be on a disk with space for the training's state, got {error}; free some, and pass "
            f"--resume to go on from the last checkpoint"
        ) from error


def _stored_config(recipe: ResolvedRecipe, rotated: Rotated | None) -> QuantizationConfig:
    clips: dict[str, Any] = {}
    if recipe.method == "rcp":
        clips = {"act_clip": recipe.rcp.act_clip, "kv_clip": recipe.rcp.kv_clip}
    return QuantizationConfig(
        bits=recipe.w_bits,
        group_size=recipe.group_size,
        act_bits=recipe.a_bits,
        kv_bits=recipe.kv_bits,
        rotation=rotated,
        **clips,
    )


def _remove_state(work: Path) -> None:
    for path in work.iterdir():
        if _STATE_FILES.fullmatch(path.name):
            path.unlink()
    with contextlib.suppress(OSError):  # somebody has put another file there
        work.rmdir()


def _reports(recipe: ResolvedRecipe, facts: dict[str, Any], work: Path) -> dict[str, str | bytes]:
    """The files beside the model, by name: the recipe, the report, and the curve of a training."""
    files: dict[str, str | bytes] = {
        "recipe.yaml": recipe_text(recipe),
        "report.json": json.dumps(facts, indent=2) + "\n",
    }
    if recipe.method == "rcp":
        write_curve(work / "log.jsonl", work / "curve.csv")
        files.update({name: (work / name).read_text() for name in ("curve.csv", "log.jsonl")})
    if recipe.method == "laquant":
        files["curve.csv"] = losses_csv(facts["layers"])
        if importlib.util.find_spec("matplotlib") is not None:
            files["curve.png"] = losses_png({f"lookahead {facts['lookahead']}": facts["layers"]})
    return files
