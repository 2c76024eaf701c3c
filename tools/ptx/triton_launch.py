"""Runs a Triton kernel without a GPU: compiles it as Triton does, and executes the PTX on CPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from . import Counters, Memory, Module, launch, parse
from .memory import Buffer

__all__ = ["ExecutedKernel"]

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
_NAMES |= {torch.int8: "i8", torch.uint8: "u8"}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@functools.cache
def _compiled(kernel, types: tuple, constants: tuple, options: tuple, architecture: int) -> tuple[Module, int, int]:
    """Module, threads, bytes of shared memory."""
    names = kernel.arg_names
    signature = {name: dict(types).get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, dict(constants), attrs=aligned)
    result = compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(options))
    return parse(result.asm["ptx"]), 32 * result.metadata.num_warps, result.metadata.shared


class ExecutedKernel:
    """kernel[grid](*arguments, CONSTANT=..., num_warps=...) as of a ``triton.jit`` function.

    Args:
        kernel: the function.
        outputs: names of the parameters that it writes. They are uninitialised, unless another one is the same tensor,
            and each element of theirs must be written.
        architecture: 80 for sm_80.
    """

    def __init__(self, kernel: object, outputs: tuple[str, ...], architecture: int = 80) -> None:
        self.kernel, self.outputs, self.architecture = kernel, outputs, architecture
        self.counters: list[Counters] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: object, **keywords: object) -> None:
            options = {name: keywords.pop(name) for name in _OPTIONS if keywords.get(name, 0) != 0}
            named = dict(zip(self.kernel.arg_names, arguments, strict=False))
            types = {name: self._type(value) for name, value in named.items()}
            module, threads, shared = _compiled(
                self.kernel, tuple(types.items()), tuple(keywords.items()), tuple(options.items()), self.architecture
            )
            memory = Memory()
            buffers: dict[int, Buffer] = {}
            # Outputs last: a tensor that is an input too has contents.
            for name in sorted(named, key=lambda name: name in self.outputs):
                value = named[name]
                if isinstance(value, torch.Tensor) and value.data_ptr() not in buffers:
                    raw = value.view(torch.int8).numpy().view(_BITS[value.dtype.itemsize])
                    if name in self.outputs:
                        buffer = memory.output(name, raw.shape, raw.dtype)
                    else:
                        written = any(named[other] is value for other in self.outputs if other in named)
                        buffer = memory.allocate(name, raw, writable=written)
                    buffers[value.data_ptr()] = buffer
            values = [buffers[v.data_ptr()] if isinstance(v, torch.Tensor) else v for v in named.values()]
            (kernel,) = module.kernels.values()
            # Triton adds pointers to scratch memory, which kernels without any are given as null.
            values += [0] * (len(kernel.parameters) - len(values))
            self.counters.append(launch(module, kernel.name, memory, grid, threads, values, shared_bytes=shared))
            for name in self.outputs:
                if name in named:
                    raw = buffers[named[name].data_ptr()].numpy()
                    named[name].view(torch.int8).copy_(torch.from_numpy(raw.view(np.int8)))

        return run

    @staticmethod
    def _type(value: object) -> str:
        if isinstance(value, torch.Tensor):
            return f"*{_NAMES[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"
