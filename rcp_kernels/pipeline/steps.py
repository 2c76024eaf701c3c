"""The steps of ``rcp-kernels quantize``: the text to calibrate or train on, the rotation, and the method."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import extras
from ..data.by_name import Progress, training_text
from ..data.corpus import split_windows
from ..methods.gptq.quantize_model import gptq_quantize_model
from ..methods.laquant.quantize_model import laquant_quantize_model
from ..methods.rcp import RcpConfig, train
from ..methods.rotate.rotate_model import Rotated, rotate_model
from ..methods.student import export_student
from ..models import describe
from ..models.load import encode
from ..nn import quantize_model
from ..ops.walsh_matrices import factor_size
from .recipe import Recipe, ResolvedRecipe

__all__ = ["quantize_layers", "rotate", "windows_of"]

_VALIDATION_WINDOWS = 16


def windows_of(
    recipe: Recipe,
    tokenizer: Any,
    model: nn.Module | None = None,
    progress: Progress = lambda *_: None,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Calibration or training windows, int64 [windows, tokens], shuffled; and the report's fields about the text.

    Args:
        recipe: its ``text`` names the text.
        tokenizer: of the model.
        model: the float model. It writes a part of "mixed" and all of "generated" and "reasoning".
        progress: see :data:`rcp_kernels.data.by_name.Progress`.
        device: that a copy of the model writes on. None: the device that the model is on.

    Raises:
        ValueError: the text is too short.
    """
    needed = recipe.samples
    training = recipe.training_config(128)
    if isinstance(training, RcpConfig):
        needed = training.steps * training.batch + _VALIDATION_WINDOWS
    progress("reading the text", 0, 1, recipe.text or "docstrings")
    text, facts = training_text(
        recipe.text,
        needed * recipe.window,
        model=model,
        tokenizer=tokenizer,
        seed=recipe.seed,
        device=device,
        progress=progress,
    )
    ids = encode(tokenizer, text)
    facts["tokens"] = ids.numel()
    progress("reading the text", 1, 1, f"{ids.numel()} tokens")
    windows = split_windows(ids, recipe.window, seed=recipe.seed)
    if recipe.method == "rcp":
        return windows, facts
    if len(windows) < recipe.samples:
        raise ValueError(
            f"quantize: the text must give {recipe.samples} windows of {recipe.window} tokens, got {len(windows)}; "
            f"pass more text, --samples or --sequence"
        )
    return windows[: recipe.samples], facts


def rotate(model: nn.Module, recipe: ResolvedRecipe, device: torch.device | None = None) -> Rotated | None:
    """Rotate a float model in place as a recipe says; None without a rotation.

    ``device`` computes; the model stays where it is.

    R4 mixes blocks of group_size where intermediate_size has no Hadamard matrix.
    """
    if recipe.rotation == "none":
        return None
    blocks = None
    try:
        factor_size(describe(model).intermediate_size)
    except ValueError:
        blocks = recipe.group_size
    return rotate_model(
        model,
        recipe.rotation,
        group_size=recipe.group_size,
        r3=recipe.kv_bits != 16,
        r4_group_size=blocks,
        seed=recipe.seed,
        untie=recipe.untie_head,
        device=device,
    )


def quantize_layers(
    model: nn.Module,
    recipe: ResolvedRecipe,
    ids: Tensor | None,
    work: Path | None = None,
    progress: Progress = lambda *_: None,
    shard: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Quantize the linear layers of a float model, rotated or not, in place.

    Args:
        model: float32.
        recipe: resolved for this model.
        ids: int64 [windows, tokens] of the calibration or training text; None with rtn.
        work: folder for the training's state; None keeps no state.
        progress: see :data:`rcp_kernels.data.by_name.Progress`.
        shard: see :func:`quantize`. The model holds only a shard of the weights afterwards.
        device: to compute on, one decoder layer after the other. The model stays where it is. None: its own device.

    Returns:
        Fields of report.json about the layers or the training.
    """

    def layer_done(done: int, total: int, name: str) -> None:
        progress("layers", done, total, name)

    if recipe.method == "rcp":
        assert ids is not None
        return _train(model, recipe.rcp, ids, work, progress, shard, device)
    bits, group_size = recipe.w_bits, recipe.group_size
    if recipe.method == "rtn":
        quantize_model(model, bits, group_size, recipe.a_bits, recipe.levels, device=device, progress=layer_done)
        return {}
    assert ids is not None
    if recipe.method == "gptq":
        layers = gptq_quantize_model(
            model,
            ids,
            bits=bits,
            group_size=group_size,
            act_bits=recipe.a_bits,
            kv_bits=recipe.kv_bits,
            levels=recipe.levels,
            device=device,
            progress=layer_done,
        )
        return {"layers": [dataclasses.asdict(error) for error in layers.errors]}
    count = len(describe(model).layers)
    result = laquant_quantize_model(
        model,
        ids,
        recipe.laquant,
        directory=work,
        device=device,
        progress=lambda layer, step, loss: layer_done(layer, count, f"step {step}, loss {loss:.4g}"),
    )
    return {"layers": result.losses, "lookahead": recipe.laquant.lookahead}


def _train(
    model: nn.Module,
    config: RcpConfig,
    ids: Tensor,
    work: Path | None,
    progress: Progress,
    shard: bool,
    device: torch.device | None,
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

        accelerator = Accelerator(cpu=device is not None and device.type == "cpu")
        device = accelerator.device
    result = train(
        model,
        ids[_VALIDATION_WINDOWS:],
        ids[:_VALIDATION_WINDOWS],
        config,
        directory=work,
        accelerator=accelerator,
        shard=shard,
        device=device,
        progress=progress,
    )
    if accelerator is not None:
        # The first process goes on alone and deletes files, so the others must have read them. A process that ends
        # while the threads of its group run may abort with "terminate called without an active exception".
        accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    if not shard:
        export_student(model)
    passes = config.steps * config.batch / (len(ids) - _VALIDATION_WINDOWS)
    return {"training": dataclasses.asdict(result), "passes_over_the_text": round(passes, 3)}
