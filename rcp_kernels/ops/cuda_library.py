"""Loads ``rcp_kernels._C_cuda``, the CUDA kernels, if torch is a CUDA build; otherwise holds the reason why not."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import torch

__all__ = ["MISSING", "require"]

_OPS = ("quantize_activation", "lut_linear", "pack_weight", "unpack_weight", "dequantize")


def _load() -> str | None:
    """Load the library; return None, or a sentence with the missing part and the remedy."""
    if torch.version.cuda is None:
        # The library needs libtorch_cuda.so, which only a CUDA build of torch has.
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if find_spec("rcp_kernels._C_cuda") is None:
        return (
            "this installation of rcp_kernels was built without its CUDA kernels (rcp_kernels._C_cuda); build it again "
            "with RCP_CUDA=1, for example RCP_CUDA=1 pip install --no-build-isolation . (docs/build.md)"
        )
    try:
        import_module("rcp_kernels._C_cuda")
    except ImportError as error:
        return (
            f"the CUDA kernels (rcp_kernels._C_cuda) could not be loaded: {error}; build the package again, for this "
            f"torch, with RCP_CUDA=1 (docs/build.md)"
        )
    return None


MISSING: str | None = _load()
"""Why the CUDA kernels are not loaded, with the remedy. None if they are loaded."""


def require(where: str) -> None:
    """Raise unless the CUDA kernels are loaded and torch sees a GPU.

    Args:
        where: the caller; begins the message.

    Raises:
        RuntimeError: the kernels or the GPU are missing, or both.
    """
    lacks = [MISSING] if MISSING else []
    if torch.version.cuda is not None and not torch.cuda.is_available():
        lacks.insert(0, "torch sees no GPU (its driver is missing, or CUDA_VISIBLE_DEVICES hides it)")
    if lacks:
        raise RuntimeError(
            f"{where}: a CUDA device needs a GPU and rcp_kernels' CUDA kernels, got {'; and '.join(lacks)}"
        )


def _explains(op: str) -> Any:
    def kernel(*arguments: Any) -> NoReturn:
        require(op)
        raise RuntimeError(f"{op}: {MISSING}")

    return kernel


if MISSING is not None:
    for _op in _OPS:
        torch.library.impl(f"rcp_kernels::{_op}", "CUDA", _explains(_op))
