"""The values of a student that training changes, by name: for checkpoints, and for copies of the best student."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...models import Architecture
from ..student import FakeQuantLinear, make_student
from .config import RcpConfig
from .optimizer import host_tensors, split_like

__all__ = ["copy_student", "full_student_values", "start_student"]


def start_student(model: nn.Module, config: RcpConfig, init: str, device: torch.device | None = None) -> Architecture:
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
        device=device,
    )


def _student_values(layers: list[FakeQuantLinear]) -> dict[str, Tensor]:
    """The parameters of layers, and the buffers of quantizers whose parameters are not all trained, by name."""
    return {
        f"{layer.name}.{name}": value.detach()
        for layer in layers
        for name, value in (*layer.named_parameters(), *layer.quantizer.named_buffers(prefix="quantizer"))
    }


def full_student_values(layers: list[FakeQuantLinear], keep: bool = True) -> dict[str, Tensor]:
    """The values of layers as full tensors on the CPU. All processes that hold shards must call this.

    Without ``keep`` the result is empty.
    """
    return host_tensors(_student_values(layers), keep)


def copy_student(layers: list[FakeQuantLinear], state: Mapping[str, Tensor]) -> None:
    """Copy the values of a checkpoint into layers. ValueError if the checkpoint is of another model."""
    with torch.no_grad():
        for name, value in _student_values(layers).items():
            if name not in state or state[name].shape != value.shape:
                raise ValueError(
                    f"train: the checkpoint must have {name} of shape {list(value.shape)}, got one of another model; "
                    f"pass the model that the training began with"
                )
            value.copy_(split_like(state[name], value))
