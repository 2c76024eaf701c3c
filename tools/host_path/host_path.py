"""Times the host code of one CUDA lut_linear call, on a machine without a GPU: ``python tools/host_path/host_path.py``.

Tensors lie on the emulated device of the tests. A stub of the CUDA runtime counts launches. No figure is a GPU's time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [str(ROOT / "tests" / "emulated_device"), str(ROOT / "tools")]

import cuda_toolkit  # noqa: E402
import emulated_device  # noqa: E402

from rcp_kernels import ops  # noqa: E402
from rcp_kernels.formats import Geometry  # noqa: E402

# out_features, in_features, bits, act_bits, tokens.
CASES = [(4096, 4096, 2, 4, 1), (4096, 4096, 2, 4, 8), (4096, 4096, 2, 4, 128), (4096, 11008, 2, 4, 1)]
CASES += [(4096, 4096, 4, 16, 1), (11008, 4096, 2, 16, 8)]


def build(root: Path = ROOT) -> Path:
    """Compile the binding of a checkout of this repository with the stub; once for each content of its csrc.

    Raises:
        SystemExit: there is no usable nvcc.
        subprocess.CalledProcessError: the compiler has said why.
    """
    nvcc = cuda_toolkit.required().nvcc
    folders = [root / "csrc" / "cuda", root / "csrc", root / "csrc" / "include"]
    sources = [HERE / "runtime.cpp", HERE / "binding_without_gpu.cu", *sorted(folders[0].glob("lut_linear_w*.cu"))]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in (*sources, *sorted(path for path in folders[1].rglob("*") if path.is_file())):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "tests" / f"host_path_{digest.hexdigest()[:16]}"
    library = folder / "host_path.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # The kernels never run: one architecture, and no optimisation of device code.
    words = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-gencode=arch=compute_80,code=compute_80"]
    words += ["-Xcicc", "-O0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    words += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    words += [*(f"-I{path}" for path in folders), *(f"-isystem={path}" for path in include_paths())]
    objects = []
    for source in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([str(nvcc), *words, "-c", str(source), "-o", objects[-1]], check=True)
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    partial = folder / "partial.so"
    subprocess.run(["c++", "-shared", *objects, "-Wl,-Bsymbolic", *libraries, "-o", str(partial)], check=True)
    partial.rename(library)
    return library


def load(library: Path) -> tuple[ctypes.CDLL, torch.device]:
    """Register the binding for the emulated device in this process. A process holds one library."""
    device = emulated_device.load()
    loaded = ctypes.CDLL(str(library))
    for name in ("host_path_launches", "host_path_fills", "host_path_fill_bytes", "host_path_blob_bytes"):
        getattr(loaded, name).restype = ctypes.c_int64
    loaded.host_path_blob_bytes.argtypes = [ctypes.c_int64] * 4
    loaded.host_path_capture.argtypes = [ctypes.c_int64]
    return loaded, device


def arguments(
    loaded: ctypes.CDLL, device: torch.device, rows: int, columns: int, bits: int, act_bits: int, tokens: int
) -> tuple[Any, ...]:
    """The arguments of :func:`rcp_kernels.lut_linear`: float16 [tokens, columns], a blob of zeros and its geometry."""
    weight = torch.zeros(loaded.host_path_blob_bytes(rows, columns, bits, 128), dtype=torch.uint8, device=device)
    x = torch.zeros(tokens, columns, dtype=torch.float16, device=device)
    return x, weight, None, Geometry(rows, columns, bits, 128), act_bits


def microseconds(call: Callable[..., object], *given: object, count: int = 2000, runs: int = 15) -> float:
    """The median over runs of this process's CPU time for a call."""
    times = []
    for _ in range(runs + 1):
        start = time.process_time_ns()
        for _ in range(count):
            call(*given)
        times.append((time.process_time_ns() - start) / count / 1000)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="a checkout of this repository whose csrc is timed")
    loaded, device = load(build(parser.parse_args().root.resolve()))
    print("rows columns bits act_bits tokens: launches, us of a call, us of an operator that does nothing")
    with torch.no_grad():
        for case in CASES:
            x, weight, bias, geometry, act_bits = given = arguments(loaded, device, *case)
            before = loaded.host_path_launches()
            ops.lut_linear(*given)
            launches = loaded.host_path_launches() - before
            call = microseconds(ops.lut_linear, *given)
            rest = (x, weight, bias, *geometry, act_bits, 1.0, None, None, 0, None)
            nothing = microseconds(torch.ops.host_path.nothing.default, *rest)
            print(f"{' '.join(map(str, case))}: {launches}, {call:.2f}, {nothing:.2f}")


if __name__ == "__main__":
    main()
