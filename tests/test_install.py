"""What a user meets first: is the built library portable, is the import light, does a missing build say what to do."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import rcp_kernels

PACKAGE = Path(rcp_kernels.__file__).parent


@pytest.fixture(scope="module")
def library() -> Path:
    spec = importlib.util.find_spec("rcp_kernels._C")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def tool_output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} (binutils) reads the library, and it is not here")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own that sees no GPU and finds no compiler, with the package of ``path``.

    -S: the hook of an editable install would find the library that ``path`` lacks.
    """
    installed = os.pathsep.join({str(Path(module.__file__).parents[1]) for module in (torch, numpy)})
    environment = {"PYTHONPATH": f"{path}{os.pathsep}{installed}", "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=path, env=environment, capture_output=True, text=True)


def test_extension_is_named_for_the_stable_abi(library: Path) -> None:
    # Without "abi3" in it only the Python that built it would find it.
    assert library.name == "_C.abi3.so"


def test_extension_links_neither_python_nor_cuda(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool_output("readelf", "-d", library))
    assert needed
    for name in ("libpython", "libtorch_python", "libtorch_cuda", "libcudart", "libgomp"):
        assert not [entry for entry in needed if entry.startswith(name)], f"{name} is linked: {needed}"


def test_extension_uses_nothing_of_torch_but_its_stable_c_functions(library: Path) -> None:
    symbols = [line.split()[-1] for line in tool_output("nm", "-D", "--undefined-only", library).splitlines()]
    # A mangled name that says at::, c10:: or torch:: is C++ whose layout changes from release to release.
    assert [name for name in symbols if re.search(r"^_Z.*(2at|3c10|5torch)", name)] == []
    # C names carry a version when glibc, libgcc or libstdc++ has them; the rest is Python's or torch's.
    ours = re.compile(r"aoti_torch_|torch_|Py[A-Z]|_Py_|_ITM_|__gmon_start__|_Z")
    assert [name for name in symbols if "@" not in name and not ours.match(name)] == []
    assert "torch_library_impl" in symbols


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("rcp-kernels") == rcp_kernels.__version__


def test_console_script_exists() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="rcp-kernels")
    assert callable(script.load())


def test_import_needs_no_gpu_no_compiler_and_no_optional_package() -> None:
    done = run_python(
        "import sys, rcp_kernels, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(sorted({'transformers', 'gguf', 'rich', 'matplotlib', 'typer'} & set(sys.modules)))",
        PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "rcp_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_missing_extension_says_how_to_build_it(unbuilt: Path) -> None:
    done = run_python("import rcp_kernels", unbuilt)
    assert done.returncode != 0
    last = done.stderr[done.stderr.rindex("ImportError") :]
    assert "pip install ." in last
    assert "make build" in last


def test_unloadable_extension_says_why(unbuilt: Path, library: Path) -> None:
    (unbuilt / "rcp_kernels" / library.name).write_bytes(b"not a library")
    done = run_python("import rcp_kernels", unbuilt)
    assert done.returncode != 0
    last = done.stderr[done.stderr.rindex("ImportError") :]
    # The dynamic loader's own words: "file too short", "invalid ELF header".
    assert re.search("too short|ELF", last), last
    assert "make build" in last
