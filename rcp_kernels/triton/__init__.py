"""Kernels for NVIDIA GPUs in Triton. Importing this package registers them with torch, if Triton is installed.

It does not import Triton, which takes longer than all else here: the first call on a CUDA tensor does.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import torch


def _kernel(module: str, op: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        return getattr(import_module(f"{__name__}.{module}"), op)(*arguments)

    return launch


def _without_triton(op: str) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> NoReturn:
        raise RuntimeError(f"{op}: CUDA tensors need Triton, got an installation without it; pip install triton")

    return refuse


_INSTALLED = find_spec("triton") is not None
for _module, _ops in (
    ("kv_cache", ("kv_cache_append", "kv_cache_dequantize", "kv_cache_attention")),
    ("walsh_transform", ("walsh_transform", "walsh_transform_", "walsh_quantize")),
):
    for _op in _ops:
        torch.library.impl(f"rcp_kernels::{_op}", "CUDA", _kernel(_module, _op) if _INSTALLED else _without_triton(_op))
