"""Finds nvcc, and builds rcp_kernels._C_cuda with it: no GPU, no driver and no CUDA build of torch is needed.

    python tools/cuda_toolkit.py            # says which nvcc a build takes, or what is missing
    pip install -r tools/cuda_toolkit.txt   # an nvcc from PyPI, where there is none

setup.py calls :func:`build`. The library is compiled against torch's headers and linked with an empty library of the
name libtorch_cuda.so, so that it asks the loader for torch's own, which a CPU build of torch does not have.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "tools" / "cuda_toolkit.txt"

# SASS for each of these, and PTX of the last for what comes after it. 7.5 is the oldest that CUDA 13 knows.
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# The first nvcc that knows all of them.
OLDEST_NVCC = (12, 8)


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and the folder of the headers and libraries that belong to it."""

    nvcc: Path
    home: Path
    version: tuple[int, int]

    @property
    def cudart(self) -> Path:
        """libcudart_static.a: linked in, the library asks for no CUDA runtime but the driver."""
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            path = self.home / folder / "libcudart_static.a"
            if path.exists():
                return path
        raise FileNotFoundError(
            f"cuda_toolkit: libcudart_static.a must be among the libraries of {self.home}, got none; install the CUDA "
            f"toolkit whole, or pip install -r {REQUIREMENTS}"
        )


@dataclass(frozen=True)
class Step:
    """One command of the build, and its lines in ninja's file."""

    output: Path
    inputs: list[Path]
    command: list[str]
    reads: Path | None = None  # where the compiler lists the headers it has read

    def __str__(self) -> str:
        def path(value: Path) -> str:
            return re.sub(r"([$ :])", r"$\1", str(value))

        lines = [f"build {path(self.output)}: run {' '.join(map(path, self.inputs))}"]
        lines.append(f"  command = {shlex.join(self.command).replace('$', '$$')}")
        if self.reads is not None:
            lines += [f"  depfile = {path(self.reads)}", "  deps = gcc"]
        return "\n".join(lines) + "\n"


def requirements() -> list[str]:
    """The PyPI packages that make up a CUDA compiler, pinned."""
    lines = (line.strip() for line in REQUIREMENTS.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME (or CUDA_PATH), else on the PATH, else of the PyPI packages in this environment."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        return Path(on_path)
    packages = importlib.util.find_spec("nvidia")
    folders = sorted((packages.submodule_search_locations or ()) if packages else ())
    found = sorted(nvcc for folder in folders for nvcc in Path(folder).glob("cu*/bin/nvcc"))
    return found[-1] if found else None


def toolkit() -> Toolkit | None:
    """The toolkit of :func:`find_nvcc`."""
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    # nvcc may be a script or a link far from its toolkit; what it would run says where that is, and compiles nothing.
    plan = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    release = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if top is None or release is None:
        raise RuntimeError(f"cuda_toolkit: {nvcc} must be NVIDIA's nvcc, got output that names no toolkit:\n{plan}")
    return Toolkit(nvcc, Path(top[1].strip()).resolve(), (int(release[1]), int(release[2])))


def usable() -> tuple[Toolkit | None, str]:
    """A toolkit that knows all architectures, or None; and what was found."""
    found = toolkit()
    if found is None:
        return None, "no nvcc in CUDA_HOME, on the PATH or among the packages of this environment"
    if found.version < OLDEST_NVCC:
        return None, f"{found.nvcc} is CUDA {_dotted(found.version)}, {_dotted(OLDEST_NVCC)} or later is needed"
    return found, f"{found.nvcc}, CUDA {_dotted(found.version)}"


def wanted() -> bool:
    """Whether to build rcp_kernels._C_cuda: as RCP_CUDA says, 0 or 1; without it, where there is a toolkit."""
    wish = os.environ.get("RCP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"rcp-kernels: RCP_CUDA must be 0 or 1, got {wish!r}; without it nvcc is used where found")
    return wish == "1" or (wish == "" and usable()[0] is not None)


def required() -> Toolkit:
    """The usable toolkit.

    Raises:
        SystemExit: there is none.
    """
    found, why = usable()
    if found is None:
        raise SystemExit(
            f"rcp-kernels: RCP_CUDA=1 needs a CUDA compiler, got {why}; install one without root: "
            f"pip install {' '.join(requirements())}"
        )
    return found


def build(found: Toolkit, output: Path, objects: Path) -> None:
    """Compile csrc/cuda and link ``output``; with ninja, only what has changed since the objects were made.

    Args:
        found: of :func:`required`.
        output: the library to write.
        objects: folder for object files, kept from build to build.

    Raises:
        subprocess.CalledProcessError: the compiler has said why.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    # RCP_CUDA_ARCHS=86, one's own card alone, compiles in a seventh of the time.
    architectures = os.environ.get("RCP_CUDA_ARCHS", " ".join(ARCHITECTURES)).replace(";", " ").split()
    objects = objects.resolve()
    objects.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    compile_ = [
        str(found.nvcc),
        *("-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2"),
        *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures),
        f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-g0,-Wall",
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"),
        *(f"-I{folder}" for folder in (ROOT / "csrc", ROOT / "csrc/include")),
        *(f"-isystem={folder}" for folder in (*include_paths(), sysconfig.get_path("include"))),
    ]
    linker = [os.environ.get("CXX", "c++"), "-shared", "-fPIC"]
    libraries = [
        f"-L{objects}",
        *(f"-L{folder}" for folder in library_paths()),
        *("-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-Wl,--as-needed"),
        str(found.cudart),
        "-Wl,--exclude-libs,ALL",  # torch's CUDA runtime is another one, and must not meet ours
        *("-lrt", "-lpthread", "-ldl"),
    ]
    stub = objects / "libtorch_cuda.so"
    steps = [Step(stub, [], [*linker, "-x", "c++", os.devnull, f"-Wl,-soname,{stub.name}", "-o", str(stub)])]
    for source in sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.suffix in (".cpp", ".cu")):
        target = objects / f"{source.stem}.o"
        command = [*compile_, "-MD", "-MF", f"{target}.d", "-c", str(source), "-o", str(target)]
        steps.append(Step(target, [source], command, reads=Path(f"{target}.d")))
    compiled = [step.output for step in steps[1:]]
    steps.append(Step(output, [*compiled, stub], [*linker, *map(str, compiled), *libraries, "-o", str(output)]))

    print(f"rcp-kernels: building {output.name} for {' '.join(architectures)} with {found.nvcc}", flush=True)
    ninja = shutil.which("ninja")
    if ninja is None:
        for step in steps:
            subprocess.run(step.command, check=True)
        return
    (objects / "build.ninja").write_text("".join(["rule run\n  command = $command\n", *map(str, steps)]))
    # Each nvcc is two threads; and one that compiles for seven architectures takes its share of memory.
    jobs = os.environ.get("MAX_JOBS") or str(max(1, (os.cpu_count() or 2) // 2))
    subprocess.run([ninja, "-C", str(objects), "--quiet", "-j", jobs], check=True)


def main() -> None:
    """Exits with 1 where there is no usable toolkit."""
    found, why = usable()
    print(f"rcp_kernels._C_cuda {'can' if found else 'cannot'} be built here: {why}")
    if found is None:
        raise SystemExit(1)
    print(f"toolkit {found.home}, runtime {found.cudart}, architectures {' '.join(ARCHITECTURES)}")


def _output(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    return done.stdout + done.stderr


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


if __name__ == "__main__":
    main()
