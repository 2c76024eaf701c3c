"""This machine: the device to compute on, and what a measurement depends on (CPU, caches, memory, GPU)."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import extras
from .ops import cuda_library

__all__ = [
    "ISA_NAMES",
    "choose_device",
    "conditions",
    "cpu_count",
    "cpu_isa",
    "cpu_isa_supported",
    "cpu_name",
    "default_device",
    "describe",
    "device_name",
    "fast_bfloat16",
    "last_level_cache_bytes",
    "memory_available_bytes",
    "require_kernels",
    "synchronize",
    "to_device_of",
]

ISA_NAMES = ("scalar", "avx2", "avx512", "amx")


def default_device() -> torch.device:
    """The device where none is named: "cuda" where torch sees a GPU, else "cpu"."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device to compute on.

    Args:
        device: any device string of torch, such as "cpu", "cuda" or "cuda:1". None: :func:`default_device`.

    Raises:
        ValueError: torch has no device of this name, or sees none of its type or index.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
        module = torch.get_device_module(found)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device: the name must be one that torch computes on, such as cpu, cuda or cuda:1, got {str(device)!r}; "
            f"check the spelling"
        ) from None
    if not module.is_available():
        why = _why_no_cuda() if found.type == "cuda" else "torch sees none"
        raise ValueError(
            f"device: {found} must be a device that torch sees, got none: {why}; pass cpu, or leave it out"
        )
    if (found.index or 0) >= module.device_count():
        raise ValueError(
            f"device: the index must be below {module.device_count()}, the number of {found.type} devices, got "
            f"{str(found)!r}; pass another"
        )
    return found


def to_device_of(model: object, ids: Tensor) -> Tensor:
    """Token ids on the device of a model.

    Args:
        model: an ``nn.Module``. The ids stay where they are for a function, for a module without parameters, and for a
            module whose parameters accelerate offloads to the meta device: its hooks move the ids.
        ids: any shape.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return ids if parameter is None or parameter.is_meta else ids.to(parameter.device)


def require_kernels(device: torch.device, where: str) -> None:
    """Raise RuntimeError, with the remedy, if the CUDA kernels are missing for a CUDA device.

    Args:
        device: any.
        where: the caller; begins the message.
    """
    if device.type == "cuda":
        cuda_library.require(where)


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work. A clock read before that shows the time of the launches alone."""
    torch.get_device_module(device).synchronize()


def device_name(device: torch.device) -> str:
    """A device in words: for a GPU its name and what its speed depends on, for the CPU its name."""
    if device.type == "cpu":
        return cpu_name()
    if device.type != "cuda":
        return str(device)
    gpu = torch.cuda.get_device_properties(device)
    return (
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs, "
        f"L2 {gpu.L2_cache_size >> 20} MB, CUDA {torch.version.cuda}"
    )


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: one of ISA_NAMES."""
    return ISA_NAMES[torch.ops.rcp_kernels.cpu_isa()]


def cpu_isa_supported() -> str:
    """The best instruction set of this CPU that has kernels: one of ISA_NAMES."""
    return ISA_NAMES[torch.ops.rcp_kernels.cpu_isa_supported()]


def cpu_name() -> str:
    """The name of the CPU, or its architecture if the system does not give a name."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def fast_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a device multiplies bfloat16 faster than float32.

    A CPU does with AVX512-BF16, AMX or Arm's BF16, as Linux names them, and a GPU from compute capability 8.0. Other
    CPUs convert every product to float32 and back. None stands for the CPU. A GPU that is not there counts as one of
    8.0: a dry run is planned for it.
    """
    if device is not None and device.type != "cpu":
        there = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        return not there or torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def cpu_count() -> int:
    """The number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache_bytes() -> int:
    """The size of the largest cache of CPU 0 in bytes, from Linux; 0 on other systems."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            sizes.append(int(match.group(1)) * units.get(match.group(2), 1))
    return max(sizes)


def memory_available_bytes(device: torch.device | None = None) -> int | None:
    """Bytes that can be allocated on a device; None where the system does not say.

    For the CPU, and without a device, this is Linux's estimate of the bytes that need no swapping.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        match = re.search(r"^MemAvailable:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) << 10 if match else None


def conditions(device: torch.device | None = None) -> dict[str, Any]:
    """The conditions to record with a measurement. ``device`` is among them if it is not the CPU."""
    there = {} if device is None or device.type == "cpu" else {"device": device_name(device)}
    return there | {
        "cpu": cpu_name(),
        "isa": cpu_isa(),
        "cpus": cpu_count(),
        "last_level_cache_mb": last_level_cache_bytes() / 2**20,
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def describe() -> dict[str, Any]:
    """The output of `rcp-kernels info`, as plain JSON types."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": {
            "name": cpu_name(),
            "cpus": cpu_count(),
            "threads": torch.get_num_threads(),
            "last_level_cache_mb": last_level_cache_bytes() / 2**20,
            "isa": cpu_isa(),
            "isa_supported": cpu_isa_supported(),
            "isa_forced_by_RCP_ISA": os.environ.get("RCP_ISA"),
        },
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
        },
        "extension": {"path": sys.modules["rcp_kernels._C"].__file__},
        "cuda_extension": {
            "path": None if cuda_library.MISSING else sys.modules["rcp_kernels._C_cuda"].__file__,
            "missing": cuda_library.MISSING,
        },
        "gpu": {
            "cuda_available": cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "note": None if cuda else _why_no_cuda(),
        },
        "extras": {
            extra.distribution: {
                "version": extra.version,
                "found": extra.found,
                "purpose": extra.purpose,
                "install": extra.install,
            }
            for extra in extras.EXTRAS.values()
        },
    }


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "torch is a CPU build; a CUDA build of torch is needed to see a GPU"
    return "torch is a CUDA build but sees no GPU"
