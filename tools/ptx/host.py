"""Runs host code that launches kernels: nvcc compiles it without the CUDA runtime, and its launches are executed here.

Grids, argument structures and workspace sizes that a launcher computes are therefore tested with the kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np

from .build import FLAGS, ROOT, cache_folder, compile_ptx, header_digest, nvcc
from .counters import Counters
from .launching import launch
from .memory import GLOBAL_BASE, WRITTEN, Memory
from .module import PtxError
from .parser import parse

__all__ = ["HostProgram"]

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_int,
)
_FILL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_INVALID, _LAUNCH_FAILURE = 1, 719


class HostProgram:
    """CUDA C++ source text with kernels and ``extern "C"`` functions that launch them.

    Args:
        source, arch, includes, defines, flags: as for :func:`ptx.compile_ptx`.
        sm_count: what cudaDeviceGetAttribute says of multiprocessors.
    """

    def __init__(
        self,
        source: str,
        arch: str = "sm_80",
        includes: tuple[str | Path, ...] = (ROOT / "csrc" / "include",),
        defines: dict[str, object] | None = None,
        flags: tuple[str, ...] = (),
        sm_count: int = 108,
    ) -> None:
        self.module = parse(compile_ptx(source, arch, includes, defines, flags))
        self.capability, self.sm_count = int(arch.split("_")[1]), sm_count
        self.library = ctypes.CDLL(str(_library(source, arch, includes, defines, flags)))

    def call(
        self, name: str, memory: Memory, *arguments: object, early_buffers: tuple[str, ...] = (), **options: object
    ) -> tuple[int, list[Counters]]:
        """Calls a function that returns int.

        Args:
            memory: that its pointers are into.
            arguments: a Buffer is passed as a pointer, an int as int64, a float as double, ctypes objects as they are.
            early_buffers: as :func:`ptx.launch`, for launches with the attribute programmaticStreamSerialization.
            options: order, blocks_at_once, races, count_memory of :func:`ptx.launch`.

        Returns:
            What it returned, and the counters of each launch.

        Raises:
            PtxError: of the first kernel that did something wrong.
        """
        counters: list[Counters] = []
        failures: list[BaseException] = []

        def on_launch(kernel, grid, block, pointers, shared, early):
            if failures:
                return _LAUNCH_FAILURE
            try:
                parameters = self.module.kernels[kernel.decode()].parameters
                packed = b""
                for parameter, pointer in zip(parameters, pointers, strict=False):
                    packed += bytes(-len(packed) % parameter.align) + ctypes.string_at(pointer, parameter.size)
                more = {"grid": tuple(grid[:3]), "block": tuple(block[:3]), "shared_bytes": shared}
                if early:
                    more["early_buffers"] = early_buffers
                counters.append(launch(self.module, kernel.decode(), memory, arguments=packed, **more, **options))
            except BaseException as failure:
                failures.append(failure)
                return _LAUNCH_FAILURE
            return 0

        def inside(address, count, what):
            start = (address or 0) - GLOBAL_BASE
            if any(b.start <= start and start + count <= b.start + b.size for b in memory.buffers):
                return slice(start, start + count)
            failures.append(PtxError(f"{what}: {count} bytes must be in a buffer, got {memory.nearest(address or 0)}"))
            return None

        def on_fill(address, value, count):
            place = inside(address, count, "cudaMemset")
            if place is None:
                return _INVALID
            memory.space.data[place] = value
            memory.space.shadow[place] |= WRITTEN
            return 0

        def on_allocate(count):
            return memory.output(f"allocation {len(memory.buffers)}", count, np.uint8).address

        def on_copy(to, origin, count, kind):
            if kind not in (_TO_DEVICE, _TO_HOST, _ON_DEVICE):
                failures.append(PtxError(f"cudaMemcpy: the kind must say where from and where to, got {kind}"))
                return _INVALID
            source = inside(origin, count, "cudaMemcpy") if kind != _TO_DEVICE else None
            target = inside(to, count, "cudaMemcpy") if kind != _TO_HOST else None
            if failures:
                return _INVALID
            if source is None:
                data = np.frombuffer(ctypes.string_at(origin, count), np.uint8)
            else:
                data = memory.space.data[source].copy()
                if not (memory.space.shadow[source] & WRITTEN).all():
                    failures.append(
                        PtxError(f"cudaMemcpy: its source must be initialised, got {memory.nearest(origin)}")
                    )
                    return _INVALID
            if target is None:
                ctypes.memmove(to, data.tobytes(), count)
            else:
                memory.space.data[target] = data
                memory.space.shadow[target] |= WRITTEN
            return 0

        callbacks = _LAUNCH(on_launch), _FILL(on_fill), _ALLOCATE(on_allocate), _COPY(on_copy)
        self.library.host_runtime_set(*callbacks, self.sm_count, self.capability)
        result = getattr(self.library, name)(*[_argument(argument) for argument in arguments])
        if failures:
            raise failures[0]
        return result, counters


def _argument(value: object) -> object:
    if hasattr(value, "address"):
        return ctypes.c_void_p(value.address)
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _library(source: str, arch: str, includes, defines, flags) -> Path:
    compiler, version = nvcc()
    runtime = Path(__file__).with_name("host_runtime.cpp")
    name = arch.split("_")[1]
    # Only the kernels' names of the device code are used: less optimisation halves the time.
    words = [*FLAGS, "-Xcicc", "-O0", f"-gencode=arch=compute_{name},code=compute_{name}", *flags]
    words += [f"-D{key}={value}" for key, value in (defines or {}).items()]
    key = hashlib.sha256(version + runtime.read_bytes() + header_digest(includes))
    for part in (*words, source):
        key.update(part.encode() + b"\0")
    kept = cache_folder() / f"{key.hexdigest()}.so"
    if kept.exists():
        return kept
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file, partial = folder / f"{key.hexdigest()}-{os.getpid()}.cu", folder / f"{key.hexdigest()}-{os.getpid()}.so"
    file.write_text(source)
    command = [compiler, *words, *(f"-I{path}" for path in includes), "-shared", "-Xcompiler=-fPIC"]
    # Uses its own runtime even if the process has loaded another.
    command += ["-Xlinker=-Bsymbolic", "-cudart=none"]
    try:
        run = subprocess.run(
            [*command, str(file), str(runtime), "-o", str(partial)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(f"HostProgram: nvcc must compile the source, got\n{run.stdout}{run.stderr}")
        partial.rename(kept)
    finally:
        file.unlink()
    return kept
