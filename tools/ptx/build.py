"""Compiles CUDA C++ to PTX with nvcc, once for each content."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

__all__ = ["FLAGS", "ROOT", "cache_folder", "compile_ptx", "compile_ptx_file", "cuda_toolkit", "header_digest", "nvcc"]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")


@functools.cache
def cuda_toolkit() -> ModuleType:
    """tools/cuda_toolkit.py, which finds nvcc. tools is not a package."""
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools" / "cuda_toolkit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rcp_kernels" / "ptx"


@functools.cache
def nvcc() -> tuple[str, bytes]:
    found = cuda_toolkit().find_nvcc()
    if found is None:
        raise FileNotFoundError(
            "compile_ptx: nvcc must be in CUDA_HOME, on the PATH or among the PyPI packages, got none; pip install -r "
            "tools/cuda_toolkit.txt"
        )
    return str(found), subprocess.run([found, "--version"], capture_output=True, check=True).stdout


def header_digest(folders: tuple[str | Path, ...]) -> bytes:
    """A digest of every header below these folders. A changed header compiles its users again."""
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".hpp", ".inl"):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.digest()


def compile_ptx(
    source: str,
    arch: str = "sm_80",
    includes: tuple[str | Path, ...] = (ROOT / "csrc" / "include",),
    defines: dict[str, object] | None = None,
    flags: tuple[str, ...] = (),
) -> str:
    """The PTX of CUDA C++ source text.

    Args:
        arch: "sm_80" or "compute_80": what __CUDA_ARCH__ is, and what the code may use.
        includes: folders of headers. Every header below them is part of the key under which the result is kept, in
            ~/.cache/rcp_kernels/ptx.
        defines: macros.
        flags: further words for nvcc.

    Raises:
        RuntimeError: nvcc did not compile it; its words are the message.
    """
    compiler, version = nvcc()
    words = [*FLAGS, f"-arch={arch.replace('compute_', 'sm_')}", *flags]
    words += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    key = hashlib.sha256(version + header_digest(includes))
    for part in (*words, source):
        key.update(part.encode() + b"\0")
    kept = cache_folder() / f"{key.hexdigest()}.ptx"
    if kept.exists():
        return kept.read_text()
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder) / "source.cu", Path(folder) / "output.ptx"
        file.write_text(source)
        command = [compiler, *words, *(f"-I{path}" for path in includes), "-ptx", str(file), "-o", str(output)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"compile_ptx: nvcc must compile the source, got\n{run.stdout}{run.stderr}")
        text = output.read_text()
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Renamed, because another process must not read half a file.
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.rename(kept)
    return text


def compile_ptx_file(path: str | Path, *arguments: object, **options: object) -> str:
    """:func:`compile_ptx` of a file; its own folder is among those of its headers."""
    path = Path(path)
    includes = (path.parent, *options.pop("includes", (ROOT / "csrc" / "include",)))
    return compile_ptx(path.read_text(), *arguments, includes=includes, **options)
