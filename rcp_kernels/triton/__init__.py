"""Kernels for NVIDIA GPUs in Triton. Importing this package registers them with torch, if Triton is installed.

It does not import Triton, which takes longer than all else here: the first call on a CUDA tensor does.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def _kernel(op: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.walsh_transform"), op)(*arguments)

    return launch


if find_spec("triton") is not None:
    for _op in ("walsh_transform", "walsh_transform_", "walsh_quantize"):
        torch.library.impl(f"rcp_kernels::{_op}", "CUDA", _kernel(_op))
