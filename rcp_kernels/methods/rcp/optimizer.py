"""The optimizers of a student, their rates, and their state when FSDP2 splits parameters over processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ... import extras
from ..student import FakeQuantLinear

__all__ = [
    "OPTIMIZERS",
    "full_optimizer_state",
    "full_tensor",
    "host_tensors",
    "make_optimizer",
    "schedule",
    "set_rates",
    "split_like",
    "split_optimizer_state",
]


OPTIMIZERS = ("adamw", "adamw8bit")
"""torch's AdamW, and torchao's with 8-bit states."""


def make_optimizer(
    layers: list[FakeQuantLinear],
    weight_lr: float,
    quantizer_lr: float,
    beta2: float = 0.95,
    name: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW without decay: the weights of layers, then their quantizers. The rates are peaks for :func:`set_rates`.

    Args:
        name: one of `OPTIMIZERS`.

    Raises:
        MissingExtra: torchao is not installed.
    """
    groups: list[dict[str, Any]] = [{"params": [layer.weight for layer in layers], "peak": weight_lr}]
    quantizers = [p for layer in layers for p in layer.quantizer.parameters()]
    if quantizers:
        groups.append({"params": quantizers, "peak": quantizer_lr})
    options: dict[str, Any] = {"lr": 0.0, "betas": (0.9, beta2), "weight_decay": 0.0}
    if name == "adamw8bit":
        extras.require("torchao")
        from torchao.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
        return optimizer
    # torch's default on a GPU updates all parameters with one list of temporaries, each as large as all weights.
    fused = layers[0].weight.device.type == "cuda"
    return torch.optim.AdamW(groups, **options, fused=fused, foreach=False)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set each group's learning rate to this share of its peak."""
    for group in optimizer.param_groups:
        rate = group["peak"] * share
        if isinstance(group["lr"], Tensor):  # torchao's, which its compiled step reads
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def schedule(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak learning rate: linear up over ``warmup`` steps, then a cosine down to ``floor``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))


def full_tensor(value: Tensor) -> Tensor:
    """The full tensor of a shard. All processes that hold shards must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def host_tensors(values: Mapping[str, Any], keep: bool) -> dict[str, Any]:
    """Full tensors of shards, on the CPU, and other values as they are. All processes that hold shards must call this.

    One tensor at a time is whole on the device. Without ``keep`` it is dropped there, and the result is empty.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        whole = full_tensor(value) if isinstance(value, Tensor) else value
        if keep:
            kept[name] = whole.to("cpu") if isinstance(whole, Tensor) else whole
    return kept


def split_like(value: Tensor, other: Tensor) -> Tensor:
    """A full tensor, split over processes as ``other`` is."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def full_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with full tensors, on the CPU. All processes must call this.

    Without ``keep`` the entries are empty.
    """
    state = optimizer.state_dict()
    entries = {index: host_tensors(entry, keep) for index, entry in state["state"].items()}
    return {**state, "state": entries}


def split_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The inverse of :func:`full_optimizer_state`, for ``load_state_dict`` of an optimizer of these parameters."""
    entries = {
        index: {name: split_like(value, parameters[index]) if value.dim() else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
