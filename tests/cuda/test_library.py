"""rcp_kernels._C_cuda without a GPU: its contents, loading, and the errors where it is missing."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rcp_kernels
from rcp_kernels import QuantLinear, ops

ROOT = Path(__file__).parents[2]
PACKAGE = Path(rcp_kernels.__file__).parent
OPS = ("quantize_activation", "lut_linear", "pack_weight", "unpack_weight", "dequantize")


def load_toolkit() -> ModuleType:
    """tools/cuda_toolkit.py; tools is no package."""
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools" / "cuda_toolkit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


toolkit = load_toolkit()


@pytest.fixture(scope="module")
def library() -> Path:
    path = PACKAGE / "_C_cuda.abi3.so"
    if not path.exists():
        if os.environ.get("RCP_CUDA") == "0" or toolkit.usable()[0] is None:
            pytest.skip("the package was built without its CUDA kernels (docs/build.md)")
        pytest.fail("nvcc is here, and rcp_kernels._C_cuda is not built; make build")
    return path


def tool_output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} (binutils) reads the library, and it is not here")
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    """cuobjdump of Triton or of the CUDA toolkit."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(folder) / "backends/nvidia/bin" for folder in triton.submodule_search_locations] if triton else []
    found = shutil.which("cuobjdump", path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip("cuobjdump reads the kernels, and neither Triton nor a CUDA toolkit that has it is here")
    return Path(found)


def test_library_links_torch_and_the_driver_alone(library: Path) -> None:
    """The CUDA runtime is linked in, and the driver comes with the GPU."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", tool_output("readelf", "-d", library)))
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    assert not [name for name in needed if re.match(r"libcud|libpython|libtorch_python|libc10_cuda|libgomp", name)]
    # The loader must not look for the empty library that the build linked with.
    assert "RUNPATH" not in tool_output("readelf", "-d", library)


def test_library_uses_nothing_of_torch_but_its_stable_c_functions(library: Path) -> None:
    symbols = [line.split()[-1] for line in tool_output("nm", "-D", "--undefined-only", library).splitlines()]
    assert [name for name in symbols if re.search(r"^_Z.*(2at|3c10|5torch)", name)] == []
    ours = re.compile(r"aoti_torch_|torch_|Py[A-Z]|_Py_|_ITM_|__gmon_start__|_Z")
    assert [name for name in symbols if "@" not in name and not ours.match(name)] == []
    assert {"torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= set(symbols)
    # Torch has its own CUDA runtime and must not find this one.
    defined = tool_output("nm", "-D", "--defined-only", library)
    assert "PyInit__C_cuda" in defined
    assert not re.search(r" cuda[A-Z]", defined)


def test_fat_binary_has_every_architecture(library: Path, cuobjdump: Path) -> None:
    names = re.findall(r"sm_(\d+)\.cubin", tool_output(cuobjdump, "--list-elf", library))
    assert set(names) == set(toolkit.ARCHITECTURES), "built with RCP_CUDA_ARCHS; build again without it"
    assert len(set(map(names.count, names))) == 1  # each file of kernels for each of them
    assert set(re.findall(r"sm_(\d+)\.ptx", tool_output(cuobjdump, "--list-ptx", library))) == {"120"}


def resource_usage(library: Path, cuobjdump: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, kernel, its registers, bytes of stack, ...) of every kernel in the library."""
    usage = []
    architecture = kernel = ""
    for line in tool_output(cuobjdump, "--dump-resource-usage", library).splitlines():
        if match := re.search(r"^arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.search(r"^ Function (\w+):", line):
            kernel = match[1]
        elif match := re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line):
            usage.append((architecture, kernel, {name: int(value) for name, value in match}))
    return usage


def test_no_kernel_spills_on_any_architecture(library: Path, cuobjdump: Path) -> None:
    """A spilled register is in DRAM: 400 cycles instead of 4."""
    usage = resource_usage(library, cuobjdump)
    assert {architecture for architecture, _, _ in usage} == set(toolkit.ARCHITECTURES)
    for op in ("quantize_activation", "pack_weight", "unpack_weight", "dequantize", "lut_linear"):
        assert [kernel for _, kernel, _ in usage if op in kernel], f"no kernel of {op}"
    spilled = [(*where, used) for *where, used in usage if used["STACK"] or used["LOCAL"]]
    assert spilled == []


def test_weights_are_loaded_16_bytes_at_a_time(library: Path, cuobjdump: Path) -> None:
    """Every kernel that streams a weight has LDG.E.128, or copies to shared memory (LDGSTS) of as many bytes."""
    loads: dict[str, list[str]] = {}
    kernel = ""
    for line in tool_output(cuobjdump, "-sass", "-arch", "sm_80", library).splitlines():
        if match := re.search(r"Function : (\w+)", line):
            kernel = match[1]
        elif match := re.search(r"\bLDG(STS)?[.\w]*", line):
            loads.setdefault(kernel, []).append(match[0])
    streaming = {
        name: found for name, found in loads.items() if re.search(r"tokenI|tokensILi\d+ELi|_kernelILi\dELi", name)
    }
    assert len(streaming) > 50
    for name, found in streaming.items():
        wide = [load for load in found if ".128" in load]
        # The least a lane needs for a unit of 512 columns: codes, tables and scales.
        assert len(wide) >= 6, name
        # Activations, bias and partial sums may be read one by one, but nothing is copied in small pieces.
        assert not [load for load in found if load.startswith("LDGSTS") and ".128" not in load], name


def other_python() -> Path:
    """The Python whose torch has CUDA. `make wheel-check` installs and keeps it."""
    home = Path(os.environ.get("RCP_CACHE_DIR") or Path.home() / ".cache" / "rcp_kernels")
    found = [path.parent / "bin/python" for path in sorted(home.glob("torch-*/.complete"))]
    if not found:
        pytest.skip(f"no torch with CUDA in {home}: make wheel-check installs one")
    return found[-1]


PROBE = """
import json, sys
import torch
import rcp_kernels
from rcp_kernels import QuantLinear, ops

def error(call):
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return None

layer = QuantLinear.from_linear(torch.nn.Linear(256, 48), act_bits=4)
model = torch.nn.Sequential(QuantLinear(64, 16, group_size=32, bias=False))
before = layer.packed.clone()
print(json.dumps({
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.is_available(),
    "missing": ops.cuda_library.MISSING,
    "ops": [torch._C._dispatch_has_kernel_for_dispatch_key(f"rcp_kernels::{op}", "CUDA") for op in sys.argv[1:]],
    "cuda()": error(layer.cuda),
    "to": error(lambda: layer.to("cuda:0", torch.float16)),
    "model": error(lambda: model.to("cuda")),
    "unchanged": torch.equal(layer.packed, before) and layer(torch.ones(1, 256)).isfinite().all().item(),
}))
"""


def probe(python: Path, folder: Path) -> dict:
    environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    environment["HOME"] = os.environ.get("HOME", "/")
    done = subprocess.run([python, "-c", PROBE, *OPS], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_library_loads_on_torch_with_cuda_and_no_gpu(library: Path) -> None:
    facts = probe(other_python(), PACKAGE.parent)
    assert facts["cuda"] is not None
    assert facts["missing"] is None
    assert facts["ops"] == [True] * len(OPS)
    for call in ("cuda()", "to", "model"):
        assert re.match(r"RuntimeError: QuantLinear: .* torch sees no GPU", facts[call]), facts[call]
        assert "rcp_kernels._C_cuda)" not in facts[call]
    assert facts["unchanged"]


def test_torch_with_cuda_and_no_library_says_so(tmp_path: Path) -> None:
    python = other_python()
    shutil.copytree(PACKAGE, tmp_path / "rcp_kernels", ignore=shutil.ignore_patterns("_C_cuda*", "__pycache__"))
    facts = probe(python, tmp_path)
    assert "built without its CUDA kernels" in facts["missing"]
    assert "RCP_CUDA=1" in facts["missing"]
    # Neither a GPU nor the library: the message names both.
    assert "torch sees no GPU" in facts["cuda()"]
    assert "built without its CUDA kernels" in facts["cuda()"]
    assert facts["unchanged"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA; the tests above ask it")
@pytest.mark.parametrize("call", [lambda layer: layer.cuda(), lambda layer: layer.to("cuda")])
def test_cpu_torch_says_that_it_has_no_cuda(call) -> None:
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 8), group_size=32)
    with pytest.raises(RuntimeError, match=r"QuantLinear: .* got torch .* is built without CUDA; install a CUDA build"):
        call(layer)
    assert layer(torch.ones(1, 64)).shape == (1, 8)  # nothing has moved
    with pytest.raises(RuntimeError, match=r"^here: .* is built without CUDA"):
        ops.cuda_library.require("here")


def test_missing_toolkit_is_an_error_only_where_it_is_demanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    monkeypatch.delenv("RCP_CUDA", raising=False)
    assert not toolkit.wanted()
    monkeypatch.setenv("RCP_CUDA", "1")
    assert toolkit.wanted()
    with pytest.raises(
        SystemExit, match=r"RCP_CUDA=1 needs a CUDA compiler, got no nvcc .* pip install nvidia-cuda-nvcc=="
    ):
        toolkit.required()
    monkeypatch.setenv("RCP_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"RCP_CUDA must be 0 or 1, got 'yes'"):
        toolkit.wanted()
    # Too old: it does not know all architectures.
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\necho "#\\$ TOP=/tmp"\necho "Cuda compilation tools, release 12.4, V12.4.131"\n')
    nvcc.chmod(0o755)
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: nvcc)
    monkeypatch.delenv("RCP_CUDA")
    assert not toolkit.wanted()
    assert toolkit.usable()[1] == f"{nvcc} is CUDA 12.4, 12.8 or later is needed"


def test_nvcc_is_looked_for_in_cuda_home_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.find_nvcc() == tmp_path / "bin" / "nvcc"
    # Nothing in CUDA_HOME or on the PATH: the packages of PyPI, whose folder is nvidia/cu13.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "")
    packaged = tmp_path / "nvidia" / "cu13" / "bin"
    packaged.mkdir(parents=True)
    (packaged / "nvcc").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert toolkit.find_nvcc() == packaged / "nvcc"


def test_ninja_file_survives_odd_paths(tmp_path: Path) -> None:
    """A home folder with a space, a dollar and a colon: ninja's own escapes and the shell's are not the same."""
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not here; the commands then run one after the other")
    folder = tmp_path / "a b$c:d"
    folder.mkdir()
    (folder / "in").write_text("text")
    step = toolkit.Step(folder / "out", [folder / "in"], ["cp", str(folder / "in"), str(folder / "out")])
    (folder / "build.ninja").write_text(f"rule run\n  command = $command\n{step}")
    for expected in ("cp ", "no work to do"):
        done = subprocess.run(["ninja", "-C", str(folder), "-v"], capture_output=True, text=True, check=True)
        assert expected in done.stdout
    assert (folder / "out").read_text() == "text"


def test_benchmark_without_a_gpu_is_refused_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import testing as typer

    from rcp_kernels.cli import app as cli

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = typer.CliRunner().invoke(cli.app, ["bench", "--device", "cuda"])
    assert done.exit_code == 2
    assert "cuda must be a device that torch sees" in " ".join(done.output.replace("│", " ").split())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused = typer.CliRunner().invoke(cli.app, ["bench", "--device", "cuda", "--isa", "avx2"])
    assert refused.exit_code == 2
    assert "--isa does not apply on cuda" in " ".join(refused.output.replace("│", " ").split())
