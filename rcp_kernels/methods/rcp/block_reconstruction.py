"""Phase one of training: each decoder layer by itself learns to give the float model's hidden states.

A fraction of the cost of end-to-end training: a layer's weights stay in cache while it is trained, an update needs no
pass through the other layers and no output head, and few tokens serve several epochs. After EfficientQAT's block-wise
training (Chen et al. 2024, arXiv 2407.11062); the loss is ours.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models import Layer, describe
from ...models.hf import cache_argument
from ..layers import check_calibration_ids, first_layer_inputs, run_layer
from ..student import FakeQuantKV, FakeQuantLinear

__all__ = ["BlockConfig", "BlockState", "reconstruct_blocks", "schedule"]


@dataclass(frozen=True)
class BlockConfig:
    """How each layer is trained.

    Attributes:
        sequences: of the calibration text.
        epochs: passes over them.
        batch: sequences an update.
        weight_lr, quantizer_lr: peak learning rates of AdamW.
    """

    sequences: int = 96
    epochs: int = 2
    batch: int = 4
    weight_lr: float = 2e-4
    quantizer_lr: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("sequences", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"BlockConfig: {name} must be at least 1, got {getattr(self, name)}; raise it")


@dataclass
class BlockState:
    """Where the pass through the layers stands: the next layer, and its inputs in the student and in the teacher."""

    next_layer: int
    student: Tensor
    teacher: Tensor


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate: linear up over ``warmup`` steps, then a cosine down to ``floor``.

    Args:
        step: counted from 0.
        steps: in all.
        warmup: steps.
        floor: share of the peak at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


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
) -> None:
    """Train every decoder layer of a student in order, on inputs from the layers trained before.

    The target is the teacher's hidden state after the layer, from the teacher's own path, so that a layer also mends
    what the layers before it broke. The loss is the mean over tokens of ``|h_s - h_t|^2 / |h_t|^2``: the norm that
    comes next removes a token's magnitude, and a few tokens have magnitudes hundreds of times the others' (ours).

    Args:
        student: of :func:`rcp_kernels.methods.student.make_student`, in place; the rest of the model is the teacher's.
        teacher: the float model in the same basis (rotated alike), its residual stream being what is compared.
        ids: int64 [at least config.sequences, tokens].
        config: see there.
        kv_bits, kv_clip: of keys and values; 16 bits for none.
        autocast: makes the context of forward passes.
        seed: of the order of sequences.
        state: where an earlier pass was; None for the start.
        after_layer: called with the state after each layer and the mean loss of each epoch.

    Raises:
        ValueError: too few sequences, or a loss that is not finite, naming the layer.
    """
    architecture = describe(student)
    check_calibration_ids(ids, "reconstruct_blocks")
    if ids.shape[0] < config.sequences:
        raise ValueError(
            f"reconstruct_blocks: {config.sequences} sequences are needed, got {ids.shape[0]}; pass more text or fewer "
            f"sequences"
        )
    student.eval()
    ids = ids[: config.sequences]
    hidden, keywords = first_layer_inputs(teacher, ids)
    if state is None:
        state = BlockState(0, hidden.to(torch.float32), hidden.to(torch.float32).clone())
    for index in range(state.next_layer, len(architecture.layers)):
        layer = architecture.layers[index]
        extra = keywords[index]
        with torch.no_grad(), autocast():
            module = teacher.get_submodule(layer.name)
            state.teacher = torch.cat([run_layer(module, x, extra).float() for x in state.teacher.split(config.batch)])
        cache = None if kv_bits == 16 else FakeQuantKV(kv_bits, kv_clip)
        if cache is not None:
            extra = {**extra, **cache_argument(student.get_submodule(layer.name), cache)}
        losses = _train_layer(student, layer, state, extra, config, autocast, seed + index)
        with torch.no_grad(), autocast():
            module = student.get_submodule(layer.name)
            state.student = torch.cat([run_layer(module, x, extra).float() for x in state.student.split(config.batch)])
        if cache is not None:
            cache.check_asked(f"reconstruct_blocks: layer {layer.name}")
        state.next_layer = index + 1
        if after_layer is not None:
            after_layer(state, losses)


def _train_layer(
    student: nn.Module,
    layer: Layer,
    state: BlockState,
    extra: dict[str, Any],
    config: BlockConfig,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    seed: int,
) -> list[float]:
    """Mean loss of each epoch."""
    module = student.get_submodule(layer.name)
    linears = [part for part in module.modules() if isinstance(part, FakeQuantLinear)]
    weights = [part.weight for part in linears]
    quantizers = [p for part in linears for p in part.quantizer.parameters()]
    groups: list[dict[str, Any]] = [{"params": weights, "peak": config.weight_lr}]
    if quantizers:
        groups.append({"params": quantizers, "peak": config.quantizer_lr})
    optimizer = torch.optim.AdamW(groups, lr=config.weight_lr, betas=(0.9, 0.95), weight_decay=0.0)
    batches = -(-config.sequences // config.batch)
    generator = torch.Generator().manual_seed(seed)
    inverse = 1.0 / state.teacher.square().mean(-1, keepdim=True).clamp_(min=1e-12)
    means = []
    for epoch in range(config.epochs):
        total = 0.0
        for number, rows in enumerate(torch.randperm(config.sequences, generator=generator).split(config.batch)):
            share = schedule(epoch * batches + number, config.epochs * batches, 5, 0.05)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            with autocast():
                output = run_layer(module, state.student[rows], extra)
            loss = ((output.float() - state.teacher[rows]).square() * inverse[rows]).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"reconstruct_blocks: the loss must be finite, got {value} in layer {layer.name}; lower the "
                    f"learning rates"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += value
        means.append(total / batches)
    return means
