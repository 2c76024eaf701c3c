"""``rcp-kernels quantize``: a float model in, a directory with packed weights, its recipe and its report out."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, extras, hardware
from ..checkpoint import QuantizationConfig, check_output, save_quantized
from ..methods.corpus import split_windows
from ..methods.gptq import check_vocabulary, gptq_quantize_model
from ..methods.rcp import RcpConfig, train
from ..methods.rotate import rotate_model
from ..methods.student import export_student
from ..methods.training_state import write_curve
from ..nn import quantize_model
from .recipe import Recipe, recipe_text
from .sources import encode, group_size_of, load_float, training_text

__all__ = ["Progress", "quantize", "quantize_layers", "windows_of"]

Progress = Callable[[str, int, int, str], None]
"""Called with the phase, what is done, what there is, and a text."""

_VALIDATION_WINDOWS = 16


def quantize(recipe: Recipe, out: Path, *, resume: bool = False, progress: Progress = lambda *_: None) -> Path:
    """Run a recipe and write the model.

    Args:
        recipe: what to do.
        out: the directory to make, or to replace if it holds a model. A training's state is kept in ``OUT.training``
            beside it until the model is written.
        resume: go on with that state.
        progress: see `Progress`.

    Returns:
        ``out``, resolved.

    Raises:
        MissingExtra, ValueError, OSError, Diverged: as the steps raise them; ``out`` is then as it was before.
    """
    out = out.resolve()
    if Path(recipe.model).exists() and Path(recipe.model).resolve().is_relative_to(out):
        raise ValueError(
            f"quantize: OUT must not be or hold the model that is read, got {out}; choose another directory"
        )
    check_output(out)
    work = out.with_name(out.name + ".training")
    if recipe.method != "rcp" and resume:
        raise ValueError(f"quantize: --resume is for method rcp, got {recipe.method}; leave it out")
    if (work / "state.pt").exists() and not resume:
        raise ValueError(
            f"quantize: {work} must not hold a training that was not finished, got one; pass --resume to go on with "
            f"it, or delete the directory"
        )
    started = time.perf_counter(), time.process_time()
    model, tokenizer = load_float(recipe.model)
    recipe = dataclasses.replace(recipe, group_size=group_size_of(model, recipe.group_size))
    rotated = None
    if recipe.rotation != "none":
        assert recipe.group_size is not None
        rotated = rotate_model(
            model, recipe.rotation, group_size=recipe.group_size, r3=recipe.kv_bits != 16, seed=recipe.seed
        )
    facts: dict[str, Any] = {}
    ids = None
    if recipe.method != "rtn":
        ids, facts = windows_of(recipe, tokenizer)
        check_vocabulary(model, ids, "quantize")
    if recipe.method == "rcp":
        work.mkdir(parents=True, exist_ok=True)
    facts.update(quantize_layers(model, recipe, ids, work, progress))
    if int(os.environ.get("RANK", "0")):
        return out  # of several processes under torchrun, the first one writes
    facts["seconds"] = time.perf_counter() - started[0]
    facts["cpu_seconds"] = time.process_time() - started[1]
    facts["rcp_kernels"] = __version__
    facts["conditions"] = hardware.conditions()
    files = {"recipe.yaml": recipe_text(recipe), "report.json": json.dumps(facts, indent=2) + "\n"}
    if recipe.method == "rcp":
        write_curve(work / "log.jsonl", work / "curve.csv")
        files["curve.csv"] = (work / "curve.csv").read_text()
        files["log.jsonl"] = (work / "log.jsonl").read_text()
    config = QuantizationConfig(
        bits=recipe.w_bits,
        group_size=recipe.group_size or 0,
        act_bits=recipe.a_bits,
        kv_bits=recipe.kv_bits,
        rotation=rotated,
    )
    if recipe.method == "rcp":
        training = recipe.training_config(config.group_size)
        config = dataclasses.replace(config, act_clip=training.act_clip, kv_clip=training.kv_clip)
    save_quantized(model, out, config, tokenizer=tokenizer, files=files)
    shutil.rmtree(work, ignore_errors=True)
    return out


def windows_of(recipe: Recipe, tokenizer: Any) -> tuple[Tensor, dict[str, Any]]:
    """int64 [windows, tokens] to calibrate or train on, shuffled, and what a report should say of the text.

    Raises:
        ValueError: the text is too short.
    """
    needed = recipe.samples * recipe.window
    if recipe.method == "rcp":
        config = recipe.training_config(128)
        needed = (config.steps * config.batch + _VALIDATION_WINDOWS) * recipe.window
    text, facts = training_text(recipe.text, needed)
    ids = encode(tokenizer, text)
    facts["tokens"] = ids.numel()
    windows, _ = split_windows(ids, recipe.window, seed=recipe.seed)
    if recipe.method != "rcp":
        if len(windows) < recipe.samples:
            raise ValueError(
                f"quantize: the text must give {recipe.samples} windows of {recipe.window} tokens, got {len(windows)}; "
                f"pass more text, --samples or --sequence"
            )
        windows = windows[: recipe.samples]
    return windows, facts


def quantize_layers(
    model: nn.Module, recipe: Recipe, ids: Tensor | None, work: Path | None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Quantize a float model, rotated or not, in place.

    Args:
        model: float32.
        recipe: with group_size.
        ids: int64 [windows, tokens] of the calibration or training text; None with rtn.
        work: folder of the training's state; None for none.
        progress: see `Progress`.

    Returns:
        What a report should say.
    """
    assert recipe.group_size is not None
    if recipe.method == "rtn":
        quantize_model(
            model,
            recipe.w_bits,
            recipe.group_size,
            recipe.a_bits,
            recipe.levels,
            progress=lambda done, total, name: progress("layers", done, total, name),
        )
        return {}
    assert ids is not None
    if recipe.method == "gptq":
        layers = gptq_quantize_model(
            model,
            ids,
            bits=recipe.w_bits,
            group_size=recipe.group_size,
            act_bits=recipe.a_bits,
            kv_bits=recipe.kv_bits,
            levels=recipe.levels,
            progress=lambda done, total, name: progress("layers", done, total, name),
        )
        return {"layers": [dataclasses.asdict(error) for error in layers.errors]}
    if recipe.method == "laquant":
        from ..methods.laquant import LaquantConfig, laquant_quantize_model

        config = LaquantConfig(
            bits=recipe.w_bits,
            group_size=recipe.group_size,
            seed=recipe.seed,
            **{"dtype": "bfloat16", **recipe.training},
        )
        result = laquant_quantize_model(
            model, ids, config, progress=lambda done, total, loss: progress("layers", done, total, f"loss {loss:.4g}")
        )
        return {"layers": result.losses}
    return _train(model, recipe.training_config(recipe.group_size), ids, work, progress)


def _train(model: nn.Module, config: RcpConfig, ids: Tensor, work: Path | None, progress: Progress) -> dict[str, Any]:
    if len(ids) <= _VALIDATION_WINDOWS:
        raise ValueError(
            f"quantize: the text must give more than {_VALIDATION_WINDOWS} windows of {ids.shape[1]} tokens, the "
            f"number held out for validation, got {len(ids)}; pass more text or a shorter --sequence"
        )
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        extras.require("accelerate")
        from accelerate import Accelerator  # type: ignore[import-untyped]

        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        model.to(accelerator.device)
    result = train(
        model,
        ids[_VALIDATION_WINDOWS:],
        ids[:_VALIDATION_WINDOWS],
        config,
        directory=work,
        accelerator=accelerator,
        progress=progress,
    )
    model.to("cpu")
    export_student(model)
    return {"training": dataclasses.asdict(result)}
