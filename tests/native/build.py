"""Compiles tests/native/*.cpp: the CPU kernels of csrc/include with numpy in and numpy out, no torch anywhere.

    python tests/native/build.py [--sanitize]

A library's folder is named by a digest of its inputs (sources, flags, compiler, Python). A stale library is never
loaded, and an unchanged one is never compiled again. Compile before a sanitizer run: that
preloads libasan into Python, and a compiler started there would inherit it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pybind11

MODULE = "rcp_native"
HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
INCLUDE = ROOT / "csrc" / "include"

# As in setup.py, and every warning is an error. Two are off: GCC 12 gives them for its own AVX-512 intrinsics, where an
# "undefined" register is a variable initialised with itself.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
OPTIMIZED = ["-O3", "-g0"]
# -O1: at -O0 the intrinsics that take an immediate do not compile. Without vptr: it needs type information, which
# hidden visibility removes, and there is no virtual function here.
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
SANITIZED += ["-fno-sanitize-recover=all"]


def build(out_dir: str | Path, sanitize: bool = False, extra_flags: Sequence[str] = ()) -> Path:
    """Path of the compiled module in ``out_dir``; compiled now unless these very inputs were compiled before.

    Raises:
        RuntimeError: the compiler failed; the message ends in what it said.
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = ["-I", str(INCLUDE)]
    for system in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        includes += ["-isystem", system]
    flags = [*FLAGS, *(SANITIZED if sanitize else OPTIMIZED), *extra_flags]

    digest = hashlib.sha256(repr((compiler, flags, sys.version, pybind11.__version__)).encode())
    sources = sorted(HERE.glob("*.cpp"))
    for path in [*sources, *sorted(HERE.glob("*.h")), *sorted(INCLUDE.rglob("*.h"))]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    directory = Path(out_dir).resolve() / digest.hexdigest()[:16]
    library = directory / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
    if library.exists():
        return library

    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / f"{os.getpid()}.partial"
    command = [*compiler, *flags, *includes, *map(str, sources), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{MODULE} did not compile: {shlex.join(command)}\n{done.stderr}")
    unfinished.rename(library)
    return library


def load() -> ModuleType:
    """The compiled module, imported; the sanitized one when RCP_NATIVE_SANITIZE is 1 (see ``make sanitize``)."""
    path = build(ROOT / "build" / "native", sanitize=os.environ.get("RCP_NATIVE_SANITIZE") == "1")
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="compile the torch-free test module")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    print(build(ROOT / "build" / "native", sanitize=parser.parse_args().sanitize))
