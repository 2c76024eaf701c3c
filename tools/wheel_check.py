"""Proves that one wheel serves many torch versions: built on the torch of this environment, used on another one.

    python tools/wheel_check.py --other-torch torch==2.14.1

1. Builds the wheel on the torch that runs this script, and checks its tag and its contents.
2. Builds the sdist, and from the unpacked sdist a second wheel, with the same contents.
3. Computes the same layers with the wheel here, with the sdist's wheel here, and with the wheel on the other torch
   (for which a CUDA build will do: no GPU is asked for), on every instruction set that this CPU has. All results must
   be equal bit for bit. On a torch with CUDA the CUDA kernels must have loaded and registered, GPU or none.

Both wheels hold the CUDA kernels (RCP_CUDA=0: neither); the sdist's are for one architecture, which takes a seventh of
the time.

The other torch may be gigabytes (2.14.1 from PyPI: 5.5 GB with CUDA). It is installed once, into
$RCP_CACHE_DIR (or ~/.cache/rcp_kernels), where the next run finds it; with --no-cache it is removed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel-check"
TAG = "cp310-abi3-"
CUDA = os.environ.get("RCP_CUDA", "1") != "0"
CUDA_OPS = ("quantize_activation", "lut_linear", "pack_weight", "unpack_weight", "dequantize")
# What pip needs on disk while it installs a CUDA torch: 3 GB of wheels beside the 5.5 GB they unpack to.
DISK_NEEDED = 10 * 2**30


def run(*command: str | Path, cwd: Path = ROOT, path: Path | None = None, **variables: str) -> str:
    """Standard output of a command that must succeed; ``path`` is its PYTHONPATH, by default none."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"wheel-check: {' '.join(map(str, command))} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def say(text: str, started: float) -> None:
    print(f"[{time.monotonic() - started:5.0f} s] {text}", flush=True)


def build_wheel(source: Path, out_dir: Path, **variables: str) -> Path:
    """The wheel of the source tree at ``source``, compiled against the torch that runs this script."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out_dir, source)
    run(*command, RCP_CUDA=str(int(CUDA)), **variables)
    (wheel,) = out_dir.glob("*.whl")
    if TAG not in wheel.name:
        sys.exit(f"wheel-check: the wheel must be tagged {TAG}*, so that every Python from 3.10 on takes it: {wheel}")
    return wheel


def build_sdist(out_dir: Path) -> Path:
    """The sdist of this repository, unpacked: the folder that holds its setup.py."""
    hook = f"from setuptools import build_meta; build_meta.build_sdist({str(out_dir)!r})"
    run(sys.executable, "-c", hook)
    (archive,) = out_dir.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out_dir, filter="data")
    (unpacked,) = (path.parent for path in out_dir.glob("*/setup.py"))
    return unpacked


def contents(wheel: Path) -> set[str]:
    """Names of the files in a wheel, which must have the extension and nothing that is not the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {"rcp_kernels/_C.abi3.so", "rcp_kernels/py.typed", "rcp_kernels/ops/lut_linear.py"}
    missing = (wanted | ({"rcp_kernels/_C_cuda.abi3.so"} if CUDA else set())) - names
    strange = {name for name in names if not re.match(r"rcp_kernels(-[^/]*\.dist-info)?/", name)}
    if missing or strange:
        sys.exit(f"wheel-check: {wheel.name} lacks {sorted(missing)} and has what is no part of it: {sorted(strange)}")
    return names


def install(wheel: Path, target: Path) -> Path:
    """The wheel alone, in a folder that PYTHONPATH can name: no environment is changed."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--target", target, wheel)
    return target


def other_python(requirement: str, base: str, directory: Path) -> Path:
    """Python of an environment with that torch in ``directory``, installed if it is not there completely."""
    python = directory / "bin" / "python"
    complete = directory / ".complete"
    if complete.exists():
        return python
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    free = shutil.disk_usage(directory).free
    if free < DISK_NEEDED:
        sys.exit(
            f"wheel-check: installing {requirement} may need {DISK_NEEDED >> 30} GiB, and {directory} has "
            f"{free / 2**30:.1f} free; make room, or name a larger disk in RCP_CACHE_DIR"
        )
    run(base, "-m", "venv", directory)
    run(python, "-m", "pip", "install", "--no-cache-dir", "--no-compile", *requirement.split(), "numpy")
    complete.touch()
    return python


def probe() -> None:
    """Prints, as JSON, a digest of every result that the installed package computes under this Python."""
    import torch

    import rcp_kernels
    from rcp_kernels import PackedWeight, QuantLinear, quantize_activation

    def noise(*shape: int, seed: int) -> torch.Tensor:
        """Integers in [0, 2**16), by arithmetic alone: a generator's stream may change from torch to torch."""
        count = int(torch.tensor(shape).prod())
        steps = torch.arange(seed * 7919, seed * 7919 + count)
        return ((steps * 2654435761) % 2**32 // 2**16).reshape(shape)

    def digest(*tensors: torch.Tensor) -> str:
        digester = hashlib.sha256()
        for tensor in tensors:
            digester.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digester.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digester.hexdigest()

    results = {}
    rows, columns, tokens = 40, 576, 19
    activation = noise(tokens, columns, seed=1).float() / 2**12 - 8
    operators = torch.ops.rcp_kernels
    for isa in range(operators.cpu_isa_supported() + 1):
        operators.set_cpu_isa(isa)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = activation.to(dtype)
            for bits in (4, 8):
                results[f"quantize_activation isa={isa} {dtype} A{bits}"] = digest(*quantize_activation(x, bits))
            for bits in (2, 3, 4):
                for group_size in (32, 128, columns):
                    groups = -(-columns // group_size)
                    levels = noise(rows, groups, 2**bits, seed=3) % 256 - 128
                    packed = PackedWeight.pack(
                        (noise(rows, columns, seed=2) % 2**bits).to(torch.uint8),
                        levels.sort(dim=-1).values.to(torch.int8),
                        (noise(rows, groups, seed=4) / 2**16 + 0.5).half(),
                        torch.tensor(2.0**-7),
                        bits=bits,
                        group_size=group_size,
                    )
                    bias = noise(rows, seed=5).float() / 2**16
                    for act_bits in (4, 8, 16):
                        layer = QuantLinear.from_packed(packed, bias=bias, act_bits=act_bits)
                        name = f"isa={isa} {dtype} W{bits}A{act_bits} G{group_size}"
                        with torch.inference_mode():
                            results[f"{name} batch"] = digest(layer(x))
                            results[f"{name} single"] = digest(layer(x[:1]))
                        results[f"{name} state"] = digest(*layer.state_dict().values())
    print(
        json.dumps(
            {
                "file": rcp_kernels.__file__,
                "python": sys.version.split()[0],
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "cuda_missing": rcp_kernels.ops.cuda_library.MISSING,
                "cuda_ops": [
                    op
                    for op in CUDA_OPS
                    if torch._C._dispatch_has_kernel_for_dispatch_key(f"rcp_kernels::{op}", "CUDA")
                ],
                "results": results,
            }
        )
    )


def probe_with(python: str | Path, target: Path, started: float) -> dict[str, str]:
    """What ``probe`` computes under ``python`` with the package in ``target``, and no other copy of it."""
    report = json.loads(run(python, __file__, "--probe", cwd=WORK, path=target))
    if not Path(report["file"]).is_relative_to(target):
        sys.exit(f"wheel-check: meant to test the package in {target}, and {report['file']} was imported")
    cuda = f"CUDA {report['cuda']}" if report["cuda"] else "no CUDA"
    if CUDA and report["cuda"]:
        # Both are asked: where the library is missing, kernels that explain it are registered in its place.
        if report["cuda_missing"] is not None or set(report["cuda_ops"]) != set(CUDA_OPS):
            sys.exit(f"wheel-check: CUDA kernels are not there ({report['cuda_missing']}), only {report['cuda_ops']}")
        cuda += f", {len(CUDA_OPS)} CUDA kernels registered"
    say(f"{len(report['results'])} results on Python {report['python']}, torch {report['torch']}, {cuda}", started)
    return report["results"]


def must_equal(here: dict[str, str], there: dict[str, str], where: str) -> None:
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if different:
        sys.exit(f"wheel-check: {len(different)} of {len(here)} results differ {where}, among them {different[:5]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other-torch", default="torch==2.14.1", help="what pip installs as the other torch")
    parser.add_argument("--other-python", default=sys.executable, help="the Python to run it under (default: this one)")
    parser.add_argument("--no-cache", action="store_true", help="remove the other torch at the end")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        probe()
        return

    started = time.monotonic()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    wheel = build_wheel(ROOT, WORK / "wheel")
    say(f"built {wheel.name}, {wheel.stat().st_size / 2**20:.2f} MiB", started)
    sdist_wheel = build_wheel(build_sdist(WORK / "sdist"), WORK / "sdist-wheel", RCP_CUDA_ARCHS="86")
    only_one = contents(wheel) ^ contents(sdist_wheel)
    if only_one:
        sys.exit(f"wheel-check: the repository's wheel and its sdist's wheel do not hold the same: {sorted(only_one)}")
    say("built the sdist, and a wheel from the unpacked sdist with the same contents", started)

    target = install(wheel, WORK / "installed")
    here = probe_with(sys.executable, target, started)
    from_sdist = probe_with(sys.executable, install(sdist_wheel, WORK / "sdist-installed"), started)
    must_equal(here, from_sdist, "from the sdist")

    version = run(arguments.other_python, "-c", "import sys; print('py%d.%d' % sys.version_info[:2])").strip()
    slug = re.sub(r"[^\w.]+", "-", f"{arguments.other_torch}-{version}")
    home = Path(os.environ.get("RCP_CACHE_DIR") or Path.home() / ".cache" / "rcp_kernels")
    with tempfile.TemporaryDirectory(dir=WORK) as scratch:
        directory = Path(scratch) / slug if arguments.no_cache else home / slug
        say(f"{arguments.other_torch} lives in {directory}", started)
        python = other_python(arguments.other_torch, arguments.other_python, directory)
        must_equal(here, probe_with(python, target, started), f"on {arguments.other_torch}")
    say(f"the wheel gives the same bits on {arguments.other_torch}", started)


if __name__ == "__main__":
    main()
