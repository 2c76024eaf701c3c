"""Where the Triton kernels run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton interprets kernels on CPU tensors. Triton reads the variable when it decorates a kernel."""


def on_device_of(x: Tensor) -> Any:
    """A context in which x's device is the current one, because Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton uses this GPU's tensor cores. Triton does not use those of sm_75."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
