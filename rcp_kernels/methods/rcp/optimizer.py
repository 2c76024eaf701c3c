"""AdamW for a student: its rates, and its state when parameters are split over processes by FSDP2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..student import FakeQuantLinear

__all__ = [
    "full_optimizer_state",
    "full_tensor",
    "make_optimizer",
    "schedule",
    "set_rates",
    "split_like",
    "split_optimizer_state",
]


def make_optimizer(
    layers: list[FakeQuantLinear], weight_lr: float, quantizer_lr: float, beta2: float = 0.95
) -> torch.optim.AdamW:
    """AdamW without decay: the weights of layers, then their quantizers. The rates are peaks for :func:`set_rates`."""
    groups: list[dict[str, Any]] = [{"params": [layer.weight for layer in layers], "peak": weight_lr}]
    quantizers = [p for layer in layers for p in layer.quantizer.parameters()]
    if quantizers:
        groups.append({"params": quantizers, "peak": quantizer_lr})
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), weight_decay=0.0)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's learning rate to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate: linear up over ``warmup`` steps, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a shard. All processes that hold shards must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, other: Tensor) -> Tensor:
    """A full tensor, split over processes as ``other`` is."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def full_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with full tensors. All processes must call this."""
    state = optimizer.state_dict()
    entries = {i: {name: full_tensor(value) for name, value in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": entries}


def split_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The inverse of :func:`full_optimizer_state`, for ``load_state_dict`` of an optimizer of these parameters."""
    entries = {
        index: {name: split_like(value, parameters[index]) if value.dim() else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
