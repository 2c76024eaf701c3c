"""The memory of a method on a device, counted by running its own code on the meta device.

A tensor on the meta device has a shape and a dtype and no values. torch runs every operator there, so code that moves
no values decides when each tensor is made and freed. :class:`MemoryCounter` adds up their bytes as a device's allocator
would. Nothing is rounded up to the blocks of an allocator, and the scratch memory inside an operator is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MemoryCounter", "functions_for_meta"]


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the tensors on the meta device that are made inside the ``with`` block.

    Numbers that code reads back from the device, such as a loss, are 1, 0 or True there, by their dtype.

    Attributes:
        tag: the part that a tensor belongs to from now on.
        bytes: live bytes of each tag.
        peaks: for each tag, ``bytes`` at the moment of their largest sum while it was the tag.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tag = "temporaries"
        self.bytes: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self._live: set[int] = set()

    @contextlib.contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Tensors that are made inside the ``with`` block belong to this part."""
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before

    def watch(self, module: nn.Module, tag: str) -> None:
        """Count the parameters and buffers of a module, except those that are counted already."""
        with self.tagged(tag):
            for tensor in (*module.parameters(), *module.buffers()):
                self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live.add(key)
        self.bytes[self.tag] += storage.nbytes()
        weakref.finalize(storage, self._forget, key, self.tag, storage.nbytes())
        if self.tag not in self.peaks or self.bytes.total() > self.peaks[self.tag].total():
            self.peaks[self.tag] = self.bytes.copy()

    def _forget(self, key: int, tag: str, size: int) -> None:
        self._live.discard(key)
        self.bytes[tag] -= size


class _Attention(torch.autograd.Function):
    """The tensors of a fused attention: it keeps its inputs, its output and a float32 for each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


@contextlib.contextmanager
def functions_for_meta(fused_attention: bool) -> Iterator[None]:
    """torch's functions for linear layers and attention take part in the CPU's autocast on the meta device.

    torch has no autocast for the meta device. A mode of torch's functions would not do: the engine of the backward
    pass, in which checkpointed layers run again, does not see it.

    Args:
        fused_attention: whether attention keeps no matrix of scores, as torch's kernels for CUDA and CPUs do.
    """
    linear, attention = functional.linear, functional.scaled_dot_product_attention

    def cast(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not torch.is_autocast_enabled("cpu"):
            return values
        return tuple(v.to(torch.bfloat16) if isinstance(v, Tensor) and v.dtype == torch.float32 else v for v in values)

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = _Attention.apply(*cast(args)[:3])
        return result

    def split(*args: Any, **kwargs: Any) -> Tensor:
        return attention(*cast(args), **kwargs)

    functional.linear = lambda *args: linear(*cast(args))
    functional.scaled_dot_product_attention = fused if fused_attention else split
    try:
        yield
    finally:
        functional.linear, functional.scaled_dot_product_attention = linear, attention
