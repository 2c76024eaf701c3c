"""RCP: quantization-aware training of a low-bit student on its float teacher (Choi et al. 2025, arXiv 2502.15779).

Rotate the model first (:mod:`rcp_kernels.methods.rotate`). Clip and partition are learned here, with the weights.
The training loop is ``Training.run`` in loop.py. docs/rcp.md describes the method, the choices that are ours, and the
measured curves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...hardware import choose_device
from ...nn.model_digest import model_digest
from ..layers import check_vocabulary
from ..student import students
from .config import RcpConfig, TrainResult
from .loop import Training
from .student_state import copy_student, start_student
from .training_state import load_state

__all__ = ["load_trained", "train"]


def train(
    model: nn.Module,
    training: Tensor,
    validation: Tensor,
    config: RcpConfig,
    *,
    teacher: nn.Module | None = None,
    probes: Mapping[str, Tensor] | None = None,
    directory: Path | None = None,
    accelerator: Any = None,
    shard: bool = False,
    device: str | torch.device | None = None,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> TrainResult:
    """Turn a float model into a trained low-bit student, in place. ``export_student(model)`` then packs it.

    Phase one trains layer by layer (:func:`reconstruct_blocks`). Phase two trains all weights and quantizers end to end
    on the teacher's next-token distribution. A directory gets a checkpoint ``state.pt``, a log ``log.jsonl`` and the
    best weights so far, ``best.pt``. After a kill at any moment, a call with the same arguments continues from the
    checkpoint and ends with the same bits.

    Args:
        model: a float32 causal language model that :func:`rcp_kernels.models.describe` knows, rotated or not.
        training: int64 [windows, tokens], used in order, and again from the start when used up.
        validation: int64 [windows, tokens]. The weights with the lowest perplexity on these windows are kept.
        config: the settings.
        teacher: a float model in the same basis; None for a copy of ``model``.
        probes: more windows by name. Their perplexity is logged with every validation and affects nothing.
        directory: an existing folder for checkpoint and log; None for neither.
        accelerator: of ``accelerate``, for several processes. Each process calls this function with the same arguments
            and takes its share of every batch. None for one process.
        shard: in phase two, split the decoder layers of student and teacher and the optimizer's state over the
            processes (FSDP2). The model is then unusable afterwards; :func:`load_trained` makes one from the directory.
        device: to train on. Phase one holds one decoder layer at a time there, phase two the whole student and teacher.
            The model is back on its own device afterwards. None: the device that the model is on.
        progress: called with the phase, finished steps, total steps, and a message.

    Raises:
        MissingExtra: the optimizer's package is not installed.
        ValueError: too little text, a batch that the processes cannot share, a checkpoint of another run, or as
            make_student and reconstruct_blocks.
        Diverged: the loss became NaN or Inf. The message names the layer and the checkpoint.
    """
    _check(model, training, validation, config, directory, accelerator, shard)
    home = next(model.parameters()).device
    device = home if device is None else choose_device(device)
    run = Training(
        model, training, validation, config, teacher, probes or {}, directory, accelerator, shard, progress, device
    )
    result = run.run()
    if not shard:
        model.to(home)
    return result


def check_processes(config: RcpConfig, processes: int, shard: bool) -> None:
    """Refuse settings that do not go with a number of processes.

    Raises:
        ValueError: names the setting.
    """
    if config.batch % (config.micro_batch * processes):
        raise ValueError(
            f"train: batch must be a multiple of micro_batch times the processes, got {config.batch} and "
            f"{config.micro_batch} x {processes}; change one of them"
        )
    if shard and config.optimizer != "adamw":
        raise ValueError(
            f"train: optimizer must be 'adamw' with shard, got {config.optimizer!r}; FSDP2 splits its states over the "
            f"processes"
        )


def _check(
    model: nn.Module,
    training: Tensor,
    validation: Tensor,
    config: RcpConfig,
    directory: Path | None,
    accelerator: Any,
    shard: bool,
) -> None:
    check_processes(config, 1 if accelerator is None else accelerator.num_processes, shard)
    if shard and (accelerator is None or directory is None):
        raise ValueError(
            f"train: shard needs an accelerator and a directory, got {accelerator} and {directory}; pass "
            f"both, or shard=False"
        )
    for name, windows in (("training", training), ("validation", validation)):
        if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
            raise ValueError(
                f"train: {name} must be int64 [windows, tokens] with at least one window of 2 tokens, got shape "
                f"{tuple(windows.shape)}; pass more text or shorter windows"
            )
        check_vocabulary(model, windows, f"train: {name}")


def load_trained(model: nn.Module, config: RcpConfig, directory: Path) -> None:
    """Turn a float model into the best student of a training, in place.

    Args:
        model: the model that the training began with, rotated alike.
        config: of the training.
        directory: of the training.

    Raises:
        ValueError: the directory has no ``best.pt``, or the file is of another model.
    """
    path = directory / "best.pt"
    if not path.is_file():
        raise ValueError(f"load_trained: {path} must be there, got no such file; train first")
    state = load_state(path)
    if state.get("model") != model_digest(model):
        raise ValueError(
            f"load_trained: {path} must be of a training that began with this model, rotated alike, got one of "
            f"another; load and rotate the model as for the training"
        )
    start_student(model, config, "uniform")
    copy_student(students(model), state["student"])
