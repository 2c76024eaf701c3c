"""Phase one of training: each decoder layer by itself learns to reproduce the float model's hidden states.

This costs a fraction of end-to-end training. A layer's weights stay in cache, an update needs neither the other layers
nor the output head, and a few tokens serve several epochs. The method follows EfficientQAT's block-wise training (Chen
et al. 2024, arXiv 2407.11062). The loss is ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models import describe
from ...ops.checks import check_int
from ..layers import check_calibration_ids, first_layer_inputs, run_layer
from ..student import fake_quantized_kv, students
from .optimizer import make_optimizer, schedule, set_rates

__all__ = ["BlockConfig", "BlockState", "reconstruct_blocks", "train_layer"]


@dataclass(frozen=True)
class BlockConfig:
    """The training of each layer.

    Attributes:
        sequences: number of sequences of the calibration text.
        epochs: passes over these sequences.
        batch: sequences per update.
        weight_lr, quantizer_lr: peak learning rates of AdamW.
    """

    sequences: int = 96
    epochs: int = 2
    batch: int = 4
    weight_lr: float = 2e-4
    quantizer_lr: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("sequences", "epochs", "batch"):
            check_int("BlockConfig", name, getattr(self, name), 1, "raise it")


@dataclass
class BlockState:
    """Progress of phase one: the number of the next layer, and its inputs in the student and in the teacher."""

    next_layer: int
    student: Tensor
    teacher: Tensor


def reconstruct_blocks(
    student: nn.Module,
    teacher: nn.Module,
    ids: Tensor,
    config: BlockConfig,
    *,
    kv_bits: int = 4,
    kv_clip: float = 1.0,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    seed: int = 0,
    state: BlockState | None = None,
    after_layer: Callable[[BlockState, list[float]], None] | None = None,
    device: torch.device | None = None,
) -> None:
    """Train every decoder layer of a student in order, on the outputs of the layers trained before.

    The target is the teacher's hidden state after the layer, computed from the teacher's own inputs. A layer therefore
    also corrects errors of earlier layers. The loss is the mean over tokens of ``|h_s - h_t|^2 / |h_t|^2`` (ours): the
    following norm removes a token's magnitude, and a few tokens have magnitudes hundreds of times those of others.

    Args:
        student: of :func:`rcp_kernels.methods.student.make_student`, changed in place. The rest of the model equals the
            teacher's.
        teacher: the float model in the same basis (rotated alike), because the residual streams are compared.
        ids: int64 [at least config.sequences, tokens].
        config: the training of each layer.
        kv_bits, kv_clip: of keys and values; 16 bits leave them in float.
        autocast: makes the context of forward passes.
        seed: of the order of sequences.
        state: of an earlier, interrupted call; None starts at the first layer.
        after_layer: called after each layer with the state and the mean loss of each epoch.
        device: to compute on. It holds one decoder layer of the student or of the teacher at a time; the models and the
            hidden states of the text stay where the models are. None: the device that the models are on.

    Raises:
        ValueError: too few sequences, or a loss that is not finite; the message then names the layer.
    """
    architecture = describe(student)
    check_calibration_ids(ids, "reconstruct_blocks")
    if ids.shape[0] < config.sequences:
        raise ValueError(
            f"reconstruct_blocks: ids must have {config.sequences} sequences, got {ids.shape[0]}; pass more text or "
            f"lower BlockConfig.sequences"
        )
    student.eval()
    ids = ids[: config.sequences]
    device = next(student.parameters()).device if device is None else device
    hidden, keywords = first_layer_inputs(teacher, ids, device)
    if state is None:
        state = BlockState(0, hidden.to(torch.float32), hidden.to(torch.float32).clone())
    for index in range(state.next_layer, len(architecture.layers)):
        layer = architecture.layers[index]
        extra = keywords[index]
        module = teacher.get_submodule(layer.name)
        with _on_device(module, device), autocast():
            _advance(module, state.teacher, extra, config.batch, device)
        module = student.get_submodule(layer.name)
        where = f"reconstruct_blocks: layer {layer.name}"
        with _on_device(module, device), fake_quantized_kv(module, kv_bits, kv_clip, where) as cache:
            extra = {**extra, **cache}
            losses = train_layer(module, layer.name, state, extra, config, autocast, seed + index, device)
            with autocast():
                _advance(module, state.student, extra, config.batch, device)
        state.next_layer = index + 1
        if after_layer is not None:
            after_layer(state, losses)


@contextlib.contextmanager
def _on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module on a device inside the ``with`` block, and back on its own device behind it."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


@torch.no_grad()
def _advance(module: nn.Module, hidden: Tensor, extra: dict[str, Any], batch: int, device: torch.device) -> None:
    """Replace hidden states by a layer's output."""
    for part in hidden.split(batch):
        part.copy_(run_layer(module, part.to(device), extra))


def train_layer(
    module: nn.Module,
    name: str,
    state: BlockState,
    extra: dict[str, Any],
    config: BlockConfig,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    seed: int,
    device: torch.device,
) -> list[float]:
    """Train one layer. Returns the mean loss of each epoch."""
    optimizer = make_optimizer(students(module), config.weight_lr, config.quantizer_lr)
    batches = -(-config.sequences // config.batch)
    generator = torch.Generator().manual_seed(seed)
    inverse = 1.0 / state.teacher.square().mean(-1, keepdim=True).clamp_(min=1e-12)
    means = []
    for epoch in range(config.epochs):
        total = 0.0
        for number, rows in enumerate(torch.randperm(config.sequences, generator=generator).split(config.batch)):
            set_rates(optimizer, schedule(epoch * batches + number, config.epochs * batches, 5, 0.05))
            with autocast():
                output = run_layer(module, state.student[rows].to(device), extra)
            difference = output.float() - state.teacher[rows].to(device)
            loss = (difference.square() * inverse[rows].to(device)).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"reconstruct_blocks: the loss must be finite, got {value} in layer {name}; lower the "
                    f"learning rates"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += value
        means.append(total / batches)
    return means
