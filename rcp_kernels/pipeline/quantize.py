"""``rcp-kernels quantize``: a float model in, a directory with packed weights, its recipe and its report out."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, extras, hardware
from ..checkpoint import QuantizationConfig, cast_floats, check_fits, check_output, save_quantized
from ..data.by_name import training_text
from ..data.corpus import split_windows
from ..methods.gptq.quantize_model import gptq_quantize_model
from ..methods.laquant.layer_losses import losses_csv, losses_png
from ..methods.laquant.quantize_model import LaquantConfig, laquant_quantize_model
from ..methods.layers import check_vocabulary
from ..methods.rcp.train import RcpConfig, load_trained, train
from ..methods.rcp.training_state import write_curve
from ..methods.rotate.rotate_model import Rotated, rotate_model
from ..methods.student import export_student
from ..models import describe
from ..models.load import encode, group_size_of, load_float, source_bytes, source_dtype
from ..nn import quantize_model, storage_report
from .recipe import OWN, Recipe, recipe_text
from .summary import Summary

__all__ = ["Progress", "quantize", "quantize_layers", "windows_of"]

Progress = Callable[[str, int, int, str], None]
"""Called with the phase, what is done, what there is, and a text."""

_VALIDATION_WINDOWS = 16
# What a training that was not finished leaves in OUT.training.
_STATES = {"rcp": "state.pt", "laquant": "run.json"}
# All that is ever written there; a file that was being written when the process was killed begins with a dot.
_STATE_FILES = re.compile(r"\.?(state\.pt|best\.pt|log\.jsonl|curve\.csv|run\.json|layer_\d+\.safetensors)(\.\w+)?")


def quantize(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    shard: bool = False,
    progress: Progress = lambda *_: None,
) -> Summary | None:
    """Run a recipe and write the model.

    Args:
        recipe: what to do.
        out: the directory to make, or to replace if it holds a model. A training's state is kept in ``OUT.training``
            beside it until the model is written.
        resume: go on with that state.
        shard: of rcp under torchrun: see :func:`rcp_kernels.methods.rcp.train`.
        progress: see `Progress`.

    Returns:
        What was written; None in all processes but the first one under torchrun.

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
    trained = recipe.method in _STATES
    if resume and not trained:
        raise ValueError(f"quantize: --resume is for method rcp or laquant, got {recipe.method}; leave it out")
    if shard and (recipe.method != "rcp" or int(os.environ.get("WORLD_SIZE", "1")) < 2):
        raise ValueError(
            f"quantize: --shard is for method rcp in several processes, got {recipe.method} in "
            f"{os.environ.get('WORLD_SIZE', '1')}; start it with torchrun, or leave it out"
        )
    if trained:
        _check_work(work)
    for method, name in _STATES.items():
        if (work / name).exists() and not (resume and method == recipe.method):
            option = "--resume" if method == recipe.method else f"--method {method} --resume"
            raise ValueError(
                f"quantize: {work} must not hold a training that was not finished, got one of {method}; pass {option} "
                f"to go on with it, or delete the directory"
            )
    started = time.perf_counter(), time.process_time()
    model, tokenizer = load_float(recipe.model)
    dtype = source_dtype(recipe.model) if recipe.dtype is None else getattr(torch, recipe.dtype)
    bytes_before = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    describe(model)  # an unknown architecture is refused before work is done for it
    _check_finite(model)
    recipe = dataclasses.replace(recipe, group_size=group_size_of(model, recipe.group_size))
    facts: dict[str, Any] = {}
    ids = None
    if recipe.method != "rtn":  # before the rotation: the float model may have to write the text
        ids, facts = windows_of(recipe, tokenizer, model, progress)
        check_vocabulary(model, ids, "quantize")
    rotated = _rotate(model, recipe)
    linears = tuple(f"{name}." for layer in describe(model).layers for name in layer.linears)
    # What is stored in dtype is known now; a training's hours come after this.
    check_fits({n: p for n, p in model.named_parameters() if not n.startswith(linears)}, dtype)
    if trained:
        work.mkdir(parents=True, exist_ok=True)
    try:
        facts.update(quantize_layers(model, recipe, ids, work, progress, shard))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"quantize: {work} must be on a disk with space for the training's state, got {error}; free some, and pass "
            f"--resume to go on from the last checkpoint"
        ) from error
    if int(os.environ.get("RANK", "0")):
        return None  # of several processes under torchrun, the first one writes
    if shard:
        # A part of it is here: the whole is made anew, of the best weights on the disk.
        model, _ = load_float(recipe.model)
        _rotate(model, recipe)
        assert recipe.group_size is not None
        load_trained(model, recipe.training_config(recipe.group_size), work)
        export_student(model)
    cast_floats(model, dtype)
    summary = Summary(
        out,
        storage_report(model),
        str(dtype).removeprefix("torch."),
        bytes_before,
        source_bytes(recipe.model),
        0,
        _head_bytes(model) if rotated is not None and rotated.untied else 0,
        time.perf_counter() - started[0],
        time.process_time() - started[1],
    )
    facts.update(summary.fields())
    facts["rcp_kernels"] = __version__
    facts["transformers"] = importlib.metadata.version("transformers")
    facts["conditions"] = hardware.conditions()
    files: dict[str, str | bytes] = {
        "recipe.yaml": recipe_text(_resolved(recipe, facts)),
        "report.json": json.dumps(facts, indent=2) + "\n",
    }
    if recipe.method == "rcp":
        write_curve(work / "log.jsonl", work / "curve.csv")
        files["curve.csv"] = (work / "curve.csv").read_text()
        files["log.jsonl"] = (work / "log.jsonl").read_text()
    if recipe.method == "laquant":
        files["curve.csv"] = losses_csv(facts["layers"])
        if importlib.util.find_spec("matplotlib") is not None:
            files["curve.png"] = losses_png({f"lookahead {facts['lookahead']}": facts["layers"]})
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
    if trained:
        for path in work.iterdir():
            if _STATE_FILES.fullmatch(path.name):
                path.unlink()
        with contextlib.suppress(OSError):  # somebody has put something there
            work.rmdir()
    return dataclasses.replace(summary, bytes_after=sum(path.stat().st_size for path in out.glob("*.safetensors")))


def _head_bytes(model: nn.Module) -> int:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sum(parameter.nbytes for parameter in head.parameters())


def _rotate(model: nn.Module, recipe: Recipe) -> Rotated | None:
    if recipe.rotation == "none":
        return None
    assert recipe.group_size is not None
    return rotate_model(
        model,
        recipe.rotation,
        group_size=recipe.group_size,
        r3=recipe.kv_bits != 16,
        seed=recipe.seed,
        untie=recipe.untie_head,
    )


def _check_work(work: Path) -> None:
    """Refuse a directory for the training's state, which is deleted at the end, that holds anything else."""
    if work.exists() and not work.is_dir():
        raise ValueError(f"quantize: {work} must be free for the training's state, got a file; move it away")
    strange = [path.name for path in work.iterdir() if not _STATE_FILES.fullmatch(path.name)] if work.exists() else []
    if strange:
        raise ValueError(
            f"quantize: {work} must hold a training's state and nothing else, got {sorted(strange)[0]!r} "
            f"({len(strange)} such); move it away or choose another OUT"
        )


def _resolved(recipe: Recipe, facts: dict[str, Any]) -> Recipe:
    """The recipe with what presets and defaults gave, which another version may give otherwise."""
    assert recipe.group_size is not None
    if recipe.method not in _STATES:
        return recipe
    if recipe.method == "rcp":
        training = recipe.training_config(recipe.group_size).to_dict()
        text = "mixed" if recipe.text is None and facts["text"] == "mixed" else recipe.text
        recipe = dataclasses.replace(recipe, text=text, sequence=recipe.window)
    else:
        training = dataclasses.asdict(_laquant_config(recipe))
    return dataclasses.replace(recipe, training={k: v for k, v in training.items() if k not in OWN})


def _laquant_config(recipe: Recipe) -> LaquantConfig:
    assert recipe.group_size is not None
    return LaquantConfig(
        bits=recipe.w_bits,
        group_size=recipe.group_size,
        seed=recipe.seed,
        **{"dtype": "bfloat16", **recipe.training},
    )


def _check_finite(model: nn.Module) -> None:
    """Refuse weights that would only show in the quantized model: not every method looks at all of them."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"quantize: {name} must be finite, got NaN or Inf; check the checkpoint for overflow")


def windows_of(
    recipe: Recipe, tokenizer: Any, model: nn.Module | None = None, progress: Progress = lambda *_: None
) -> tuple[Tensor, dict[str, Any]]:
    """int64 [windows, tokens] to calibrate or train on, shuffled, and what a report should say of the text.

    Args:
        recipe: its text is, where it does not say, "mixed" for rcp if there is a model and one process, else
            docstrings.
        tokenizer: of the model.
        model: the float one, which writes a part of "mixed" and all of "generated" and "reasoning".
        progress: see `Progress`.

    Raises:
        ValueError: the text is too short.
    """
    needed = recipe.samples * recipe.window
    if recipe.method == "rcp":
        config = recipe.training_config(128)
        needed = (config.steps * config.batch + _VALIDATION_WINDOWS) * recipe.window
    name = recipe.text
    if name is None and recipe.method == "rcp" and model is not None and os.environ.get("WORLD_SIZE", "1") == "1":
        name = "mixed"
    text, facts = training_text(name, needed, model=model, tokenizer=tokenizer, seed=recipe.seed, progress=progress)
    ids = encode(tokenizer, text)
    facts["tokens"] = ids.numel()
    windows = split_windows(ids, recipe.window, seed=recipe.seed)
    if recipe.method != "rcp":
        if len(windows) < recipe.samples:
            raise ValueError(
                f"quantize: the text must give {recipe.samples} windows of {recipe.window} tokens, got {len(windows)}; "
                f"pass more text, --samples or --sequence"
            )
        windows = windows[: recipe.samples]
    return windows, facts


def quantize_layers(
    model: nn.Module,
    recipe: Recipe,
    ids: Tensor | None,
    work: Path | None,
    progress: Progress = lambda *_: None,
    shard: bool = False,
) -> dict[str, Any]:
    """Quantize a float model, rotated or not, in place.

    Args:
        model: float32.
        recipe: with group_size.
        ids: int64 [windows, tokens] of the calibration or training text; None with rtn.
        work: folder of the training's state; None for none.
        progress: see `Progress`.
        shard: see :func:`quantize`; the model is then of no use afterwards.

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
        config = _laquant_config(recipe)
        count = len(describe(model).layers)
        result = laquant_quantize_model(
            model,
            ids,
            config,
            directory=work,
            progress=lambda layer, step, loss: progress("layers", layer, count, f"step {step}, loss {loss:.4g}"),
        )
        return {"layers": result.losses, "lookahead": config.lookahead}
    return _train(model, recipe.training_config(recipe.group_size), ids, work, progress, shard)


def _train(
    model: nn.Module, config: RcpConfig, ids: Tensor, work: Path | None, progress: Progress, shard: bool
) -> dict[str, Any]:
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
        shard=shard,
        progress=progress,
    )
    if accelerator is not None:
        # The first process goes on alone, and deletes files that the others must have read. A process that ends with
        # its group's threads running is aborted ("terminate called without an active exception"), now and then.
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    if not shard:
        model.to("cpu")
        export_student(model)
    passes = config.steps * config.batch / (len(ids) - _VALIDATION_WINDOWS)
    return {"training": dataclasses.asdict(result), "passes_over_the_text": round(passes, 3)}
