"""The host code of lut_linear's CUDA binding, with a stub of the CUDA runtime (tools/host_path)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rcp_kernels import ops
from rcp_kernels.formats import Geometry
from rcp_kernels.ops.walsh_transform import transform_tables

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import host_path
from rcp_kernels import ops

loaded, device = host_path.load(host_path.build())
loaded.host_path_grid.restype = host_path.ctypes.POINTER(host_path.ctypes.c_int64)

def fills(case):
    fills, before = loaded.host_path_fills(), loaded.host_path_fill_bytes()
    ops.lut_linear(*host_path.arguments(loaded, device, *case))
    return loaded.host_path_fills() - fills, loaded.host_path_fill_bytes() - before

def grid(case):
    ops.lut_linear(*host_path.arguments(loaded, device, *case))
    return loaded.host_path_grid()[0], loaded.host_path_grid()[1]
"""


def run(program: str) -> str:
    spec = importlib.util.spec_from_file_location("cuda_toolkit", ROOT / "tools" / "cuda_toolkit.py")
    toolkit = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = toolkit
    spec.loader.exec_module(toolkit)
    if toolkit.usable()[0] is None:
        pytest.skip("nvcc compiles the binding, and it is not here")
    command = [sys.executable, "-c", PROGRAM + program, str(ROOT / "tools" / "host_path")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_kept_plan_is_that_of_its_call() -> None:
    """Calls that differ in one number: a grid does not depend on the calls before it."""
    cases = [(4096, 4096, 2, 4, 1), (4096, 4096, 2, 4, 128), (4096, 4096, 2, 16, 1), (1024, 4096, 2, 4, 1)]
    cases += [(4096, 11008, 2, 16, 1), (4096, 4096, 3, 4, 128), (4096, 4096, 2, 4, 300)]
    line = run(f"cases = {cases}\nprint([grid(c) for c in cases], [grid(c) for c in cases], sep='|')")
    first, again = line.split("|")
    assert first == again
    backwards = run(f"cases = {cases[::-1]}\nprint([grid(c) for c in cases][::-1])")
    assert backwards == first
    assert len(set(eval(first))) >= 4


def test_counters_are_fetched_for_splits_alone_and_by_need() -> None:
    one, split = (4096, 4096, 2, 4, 128), (64, 4096, 2, 16, 1)
    program = f"""
facts = [fills({one}), fills({split}), fills({split})]
for graph in (1, 2, 2):
    loaded.host_path_capture(graph)
    facts.append(fills({split}))
print(facts)
"""
    # A graph has counters of its own, once.
    assert run(program) == str([(0, 0), (1, 1024), (0, 0), (1, 1024), (1, 1024), (0, 0)])


def test_the_operator_refuses_a_rotation_that_does_not_fuse() -> None:
    program = """
x, weight, bias, geometry, act_bits = host_path.arguments(loaded, device, 64, 512, 2, 4, 1)
try:
    torch.ops.rcp_kernels.lut_linear(x, weight, bias, *geometry, act_bits, 1.0, None, None, 256)
except ValueError as error:
    print(str(error).splitlines()[0])
"""
    line = run(program)
    assert "rotation_group must be 0, or 32, 64 or 128" in line
    assert "got 256 and act_bits 4" in line


@pytest.mark.parametrize(
    ("where", "group", "act_bits", "before"),
    [("cuda", 128, 4, 0), ("cuda", 128, 16, 1), ("cuda", 256, 4, 1), ("cuda", 96, 4, 1), ("cpu", 256, 4, 0)],
)
def test_a_rotation_that_does_not_fuse_is_a_walsh_transform_before_it(where, group, act_bits, before) -> None:
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            called.append((function.name(), arguments))
            return function(*arguments, **(keywords or {}))

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 768, device=where)
        weight = torch.empty(100, dtype=torch.uint8, device=where)
        rotation = ops.Rotation(*transform_tables("test", x, group, "natural"), group)
        with Record():
            ops.lut_linear(x, weight, None, Geometry(64, 768, 2, 128), act_bits, rotation=rotation)
            order = torch.empty(768, dtype=torch.int64, device=where)
            if before:
                with pytest.raises(ValueError, match=r"input_order .* rotation_group"):
                    ops.lut_linear(
                        x, weight, None, Geometry(64, 768, 2, 128), act_bits, rotation=rotation, input_order=order
                    )
    names = [name for name, _ in called if name.startswith("rcp_kernels::")]
    assert names == ["rcp_kernels::walsh_transform"] * before + ["rcp_kernels::lut_linear"]
    operator = next(arguments for name, arguments in called if name == "rcp_kernels::lut_linear")
    # Defaults are left out of the arguments: no rotation.
    assert (operator[11] if len(operator) > 11 else 0) == (0 if before else group)
