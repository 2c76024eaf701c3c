"""What a training changes of a student, by name: to copy, to check, and to tell from that of another model.

A tensor may be split over processes by FSDP2; a checkpoint holds the whole of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...models import Architecture
from ..student import FakeQuantLinear, make_student
from .config import RcpConfig

__all__ = [
    "copy_student",
    "split_optimizer_state",
    "start_student",
    "student_values",
    "whole",
    "whole_optimizer_state",
]


def start_student(model: nn.Module, config: RcpConfig, init: str) -> Architecture:
    """:func:`make_student` with the settings of a training."""
    return make_student(
        model,
        bits=config.bits,
        group_size=config.group_size,
        act_bits=config.act_bits,
        act_clip=config.act_clip,
        init=init,
        learn_clip=config.learn_clip,
        learn_partition=config.learn_partition,
    )


def student_values(layers: list[FakeQuantLinear]) -> dict[str, Tensor]:
    """What training changes, and the buffers that stand for what it does not, by name."""
    return {
        f"{layer.name}.{name}": value.detach()
        for layer in layers
        for name, value in (*layer.named_parameters(), *layer.quantizer.named_buffers(prefix="quantizer"))
    }


def copy_student(layers: list[FakeQuantLinear], state: Mapping[str, Tensor]) -> None:
    """Give layers the values of a checkpoint, in place; ValueError if it is of another model."""
    with torch.no_grad():
        for name, value in student_values(layers).items():
            if name not in state or state[name].shape != value.shape:
                raise ValueError(
                    f"train: the checkpoint must have {name} of shape {list(value.shape)}; it is another's"
                )
            value.copy_(split_like(state[name], value))


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor that may be split over processes, all of which have to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, split as another is."""
    if not isinstance(other, DTensor):
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its ``state_dict`` with whole tensors, for which all processes have to ask."""
    state = optimizer.state_dict()
    entries = {index: {name: whole(value) for name, value in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": entries}


def split_optimizer_state(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The inverse: what ``load_state_dict`` of an optimizer of these parameters, split or not, takes."""
    entries = {
        index: {name: split_like(value, parameters[index]) if value.dim() else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
