"""Runs tests/triton_kernels/interpreted/walsh_transform.py: the Triton kernels, executed.

In a process of its own, because Triton decides between its interpreter and a GPU when it is imported, and torch imports
it. With RCP_TEST_GPU=1 the same tests run compiled, on the GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcp_kernels.triton import _without_triton

pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

OPS = ("walsh_transform", "walsh_transform_", "walsh_quantize")
TESTS = Path(__file__).parent / "interpreted" / "walsh_transform.py"


def test_kernels():
    on_gpu = os.environ.get("RCP_TEST_GPU") == "1"
    environment = {**os.environ, "TRITON_INTERPRET": "0" if on_gpu else "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parents[3], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("installed", [True, False])
def test_registered_with_triton_and_without(installed):
    """Without Triton the kernels are there to say so."""
    code = f"""
import sys
{"" if installed else "sys.modules['triton'] = None"}
import torch, rcp_kernels, rcp_kernels.triton
print(*(torch._C._dispatch_has_kernel_for_dispatch_key(f"rcp_kernels::{{op}}", "CUDA") for op in {OPS}))
print(rcp_kernels.triton._INSTALLED)
"""
    assert run_python(code).split() == ["True"] * 3 + [str(installed)]


def test_without_triton_a_call_names_the_remedy():
    with pytest.raises(RuntimeError, match=r"^walsh_transform: .*pip install triton$"):
        _without_triton("walsh_transform")(torch.ones(2))


def test_importing_the_package_does_not_import_the_kernels():
    assert run_python("import sys, rcp_kernels.triton; print(*(m for m in sys.modules if 'triton.walsh' in m))") == ""
