"""The launches that lut_linear's host code makes, captured without a GPU: kernel, grid, and the bytes of its arguments.

The launcher (csrc/include/rcp/lut_linear.cuh) is compiled as it is, with a runtime that only writes down
(tests/ptx/host_runtime.cpp). So grids, splits and tails of a report are those of the package, not a copy of its plan.
Needs a source checkout and nvcc.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .sass_walk import Buffer, Launch

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-w")

# What the device headers include beside each other.
_HEADERS = ("float_types.h", "lut_linear_cuda_arguments.h", "lut_linear_cuda_layout.h", "lut_linear_plan.h")
_KERNEL_HEADERS = tuple(
    f"lut_linear_{part}.cuh" for part in ("gemv", "gemm", "quantize", "a16_fixed_point", "a16_half")
)
_HOST_HEADERS = ("lut_linear.cuh", "lut_linear_integer.cuh", "lut_linear_plan.h")  # no device code in them
_FLOAT_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
_PLACES = {"weight": 1 << 40, "x": 2 << 40, "y": 3 << 40, "workspace": 4 << 40, "counters": 5 << 40}
_SIZE = 1 << 38

_HOST = """
#include "rcp/lut_linear.cuh"
using namespace rcp::cuda;
extern "C" int capture(const LutLinearArguments* a, int sm_count, int compute_capability) {
  return lut_linear(*a, sm_count, compute_capability);
}
extern "C" int64_t weight_bytes(int64_t rows, int64_t columns, int64_t group_size, int64_t bits) {
  return CudaLayout{rows, columns, group_size, static_cast<int>(bits)}.total_bytes();
}
"""


class _Arguments(ctypes.Structure):
    """LutLinearArguments of lut_linear_cuda_arguments.h."""

    _fields_ = [
        ("weight", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("x_type", ctypes.c_int),
        ("bias", ctypes.c_uint64),
        ("bias_type", ctypes.c_int),
        ("y", ctypes.c_uint64),
        ("tokens", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("group_size", ctypes.c_int),
        ("act_bits", ctypes.c_int),
        ("clip", ctypes.c_float),
        ("rotation_group", ctypes.c_int),
        ("rotation_sequency", ctypes.c_bool),
        ("workspace", ctypes.c_uint64),
        ("counters", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Problem:
    """A call of lut_linear: W``bits``A``act_bits``, G = 128."""

    bits: int = 2
    act_bits: int = 4
    tokens: int = 1
    rows: int = 4096
    columns: int = 4096
    dtype: str = "float16"
    rotation_group: int = 0

    def __str__(self) -> str:
        rotation = f" rotated by {self.rotation_group}" if self.rotation_group else ""
        return f"W{self.bits}A{self.act_bits} M={self.tokens}{rotation}"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rcp_kernels" / "sass"


def nvcc() -> str:
    """The compiler that tools/cuda_toolkit.py finds.

    Raises:
        FileNotFoundError: there is none.
    """
    import importlib.util

    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools" / "cuda_toolkit.py")
    if spec is None or spec.loader is None or not (ROOT / "tools" / "cuda_toolkit.py").exists():
        raise FileNotFoundError(f"sass_launches: a source checkout is needed, got {ROOT}; clone the repository")
    import sys

    module = sys.modules.setdefault("cuda_toolkit", importlib.util.module_from_spec(spec))
    if not hasattr(module, "find_nvcc"):
        spec.loader.exec_module(module)
    found = module.find_nvcc()
    if found is None:
        raise FileNotFoundError(
            "sass_launches: nvcc must be in CUDA_HOME, on the PATH or among the PyPI packages, got none; pip install "
            "-r tools/cuda_toolkit.txt"
        )
    return str(found)


def compile_cached(source: str, suffix: str, words: list[str], more: tuple[Path, ...] = (), host: bool = True) -> Path:
    """What nvcc makes of the source text, kept in ~/.cache/rcp_kernels/sass by the content of all that goes into it;
    without ``host``, of all that the kernels depend on.

    Raises:
        RuntimeError: nvcc did not compile it; its words are the message.
    """
    include = ROOT / "csrc" / "include"
    compiler = nvcc()
    key = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for part in (*words, source):
        key.update(part.encode() + b"\0")
    headers = (*(include / "rcp").glob("*.cuh"), *((include / "rcp" / name) for name in _HEADERS))
    for path in (*sorted(headers), *more):
        if host or path.name not in _HOST_HEADERS:
            key.update(path.read_bytes())
    kept = cache_folder() / f"{key.hexdigest()}{suffix}"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    file = kept.with_name(f"{key.hexdigest()[:16]}-{os.getpid()}.cu")
    partial = file.with_suffix(".partial")
    file.write_text(source)
    try:
        command = [compiler, *FLAGS, *words, f"-I{include}", str(file), *map(str, more), "-o", str(partial)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"sass_launches: nvcc must compile the source, got\n{run.stdout}{run.stderr}")
        partial.rename(kept)
    finally:
        file.unlink()
        partial.unlink(missing_ok=True)
    return kept


def compile_cubin(kernels: Iterable[str], arch: int) -> Path:
    """Only these kernels, by mangled name, for one architecture."""
    names = sorted(set(kernels))
    demangled = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    # Not rcp/lut_linear.cuh: that would compile all kernels, through its launchers.
    source = "".join(f'#include "rcp/{header}"\n' for header in _KERNEL_HEADERS)
    source += "".join(f"template __global__ {signature};\n" for signature in demangled)
    return compile_cached(source, ".cubin", [f"-arch=sm_{arch}", "-cubin"], host=False)


class Launcher:
    """lut_linear's host code."""

    def __init__(self) -> None:
        # -O0 for the device: its code is not looked at, only the kernels' names.
        words = ["-Xcicc", "-O0", "-gencode=arch=compute_80,code=compute_80", "-shared"]
        words += ["-Xcompiler=-fPIC", "-Xlinker=-Bsymbolic", "-cudart=none"]
        runtime = ROOT / "tests" / "ptx" / "host_runtime.cpp"
        self.library = ctypes.CDLL(str(compile_cached(_HOST, ".so", words, (runtime,))))
        self.library.weight_bytes.restype = ctypes.c_int64

    def weight_bytes(self, problem: Problem) -> int:
        """Of the packed weight on the device."""
        values = (problem.rows, problem.columns, min(128, problem.columns), problem.bits)
        return int(self.library.weight_bytes(*map(ctypes.c_int64, values)))

    def launches(self, problem: Problem, sm_count: int, compute_capability: int) -> list[Launch]:
        """Of one call, in order.

        Raises:
            RuntimeError: the launcher refuses the problem.
        """
        seen: list[Launch] = []

        def on_launch(name: bytes, grid: list[int], block: list[int], pointers: list[int], shared: int) -> int:
            # Both kinds of kernels take one structure by value; its size is not known here, 256 bytes hold any.
            parameters = ctypes.string_at(pointers[0], 256)
            g, b = (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])
            seen.append(Launch(name.decode(), g, b, shared, parameters))
            return 0

        unsigned = ctypes.POINTER(ctypes.c_uint)
        launch_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_char_p, unsigned, unsigned, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
        )
        fill_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        callback, fill = launch_type(on_launch), fill_type(lambda *_: 0)
        self.library.host_runtime_set(callback, fill, sm_count, compute_capability)
        x_type = _FLOAT_TYPES[problem.dtype]
        arguments = _Arguments(
            **_PLACES,
            x_type=x_type,
            bias_type=x_type,
            tokens=problem.tokens,
            rows=problem.rows,
            columns=problem.columns,
            bits=problem.bits,
            group_size=128,
            act_bits=problem.act_bits,
            clip=1.0,
            rotation_group=problem.rotation_group,
        )
        code = self.library.capture(ctypes.byref(arguments), sm_count, compute_capability)
        if code:
            raise RuntimeError(f"sass_launches: lut_linear must accept the problem, got error {code} for {problem}")
        return seen


def buffers() -> list[Buffer]:
    """Where the launches of :class:`Launcher` find their operands: addresses that nothing is ever stored at."""
    return [Buffer(name, address, _SIZE) for name, address in _PLACES.items()]
