"""The second device of emulated_device.cpp: tests of devices run without a GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import torch

__all__ = ["extension", "load"]

_SOURCE = Path(__file__).with_name("emulated_device.cpp")


@functools.cache
def extension() -> Any:
    """The compiled extension, with ``memory_allocated()``, ``max_memory_allocated()``, ``reset_peak_memory_stats()``.

    The first call compiles it, in about 40 seconds, and registers device "emulated" in this process.
    """
    module = _module(_compiled())
    torch.utils.rename_privateuse1_backend("emulated")
    torch._register_device_module("emulated", _device_module(module))
    torch.utils.generate_methods_for_privateuse1_backend()
    return module


def _compiled() -> Path:
    """The compiled extension, which is written under another name and then renamed: two processes may both compile."""
    from torch.utils.cpp_extension import include_paths, library_paths

    content = f"{torch.__version__} {sys.version}".encode() + _SOURCE.read_bytes()
    folder = _SOURCE.parents[2] / "build" / "tests"
    path = folder / f"emulated_device_{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), "-O1", "-std=c++20", "-shared", "-fPIC", str(_SOURCE), "-o", str(part)]
        command += ["-DTORCH_EXTENSION_NAME=emulated_device", "-DTORCH_API_INCLUDE_EXTENSION_H"]
        command += [f"-isystem{include}" for include in (*include_paths(), sysconfig.get_path("include"))]
        command += [f"-L{library}" for library in library_paths()]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"], check=True)
        part.replace(path)
    return path


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("emulated_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load() -> torch.device:
    """Register the emulated device in this process, and return it."""
    extension()
    return torch.device("emulated", 0)


def _device_module(module: Any) -> types.ModuleType:
    """``torch.emulated``: the functions that torch asks of a device's module."""
    device = types.ModuleType("torch.emulated")
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: module.memory_allocated(),
        "max_memory_allocated": lambda device=None: module.max_memory_allocated(),
        "reset_peak_memory_stats": lambda device=None: module.reset_peak_memory_stats(),
    }
    for name, function in functions.items():
        setattr(device, name, function)
    return device


if __name__ == "__main__":  # compile before two test processes would
    extension()
    sys.exit(0)
