"""Kernels for NVIDIA GPUs in Triton. Importing this package registers them with torch, if Triton is installed.

It does not import Triton, which takes longer than all else here: the first call on a CUDA tensor does.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def _kernel(module: str, op: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), op)(*arguments)

    return launch


if find_spec("triton") is not None:
    for _module, _ops in (
        ("kv_cache", ("kv_cache_append", "kv_cache_dequantize", "kv_cache_attention")),
        ("walsh_transform", ("walsh_transform", "walsh_transform_", "walsh_quantize")),
    ):
        for _op in _ops:
            torch.library.impl(f"rcp_kernels::{_op}", "CUDA", _kernel(_module, _op))
