"""The Triton kernels of the key-value cache: executed by the interpreter, and compiled for every architecture.

The interpreted tests run in a process of their own, because Triton decides between its interpreter and a GPU when it is
imported. With RCP_TEST_GPU=1 they run compiled, on the GPU.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")

OPS = ("kv_cache_append", "kv_cache_dequantize", "kv_cache_attention")
TESTS = Path(__file__).parent / "interpreted" / "kv_cache.py"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def test_kernels():
    on_gpu = os.environ.get("RCP_TEST_GPU") == "1"
    environment = {**os.environ, "TRITON_INTERPRET": "0" if on_gpu else "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    run = subprocess.run(command, env=environment, cwd=TESTS.parents[3], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    print(run.stdout.splitlines()[-1])


def test_registered_without_importing_triton():
    code = f"""
import sys, torch, rcp_kernels
print(*(torch._C._dispatch_has_kernel_for_dispatch_key(f"rcp_kernels::{{op}}", "CUDA") for op in {OPS}))
print(*(m for m in sys.modules if "triton.kv" in m))"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parents[3], capture_output=True, text=True, check=False
    )
    assert run.stdout.split("\n")[:2] == ["True True True", ""], run.stderr


@functools.cache
def compiled(kernel_name: str, dtype: torch.dtype, head_dim: int, architecture: int, masked: bool = False):
    """The compiled kernel, its opcodes, and (registers, stack, bytes of shared memory)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rcp_kernels.triton import kv_cache as kernels

    kernel = getattr(kernels, kernel_name)
    types = {name: "*u8" for name in kernel.arg_names if "codes" in name}
    types |= {name: "*fp16" for name in kernel.arg_names if "scales" in name}
    types |= {"x_ptr": "*" + NAMES[dtype], "query_ptr": "*" + NAMES[dtype], "out_ptr": "*" + NAMES[dtype]}
    types |= {"partial_ptr": "*fp32", "mask_ptr": "*u8", "held_ptr": "*i64", "clip": "fp32", "scale": "fp32"}
    operand = kernels.operand(dtype, architecture >= 80)
    tile = kernels.tile_config(head_dim, operand, architecture >= 80)
    constants = {
        "HEAD_DIM": head_dim,
        "PAIRS": kernels.pairs(head_dim),
        "PART": tile.part,
        "ROWS": tile.rows,
        "POSITIONS": tile.positions,
        "CAUSAL": masked,
        "WINDOW": masked,
        "MASK": masked,
        "HELD": masked,
        "OPERAND": operand,
        "BLOCK": kernels.POSITIONS,
    }
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    warps = tile.warps if kernel_name == "_attention_kernel" else 1
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / tool, option, binary], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.M)
    return opcodes, int(registers), int(stack) + int(local), result.metadata.shared


def check(*variant) -> list[str]:
    opcodes, _, stack, shared = compiled(*variant)
    assert stack == 0
    bare = {op.split(".")[0] for op in opcodes}
    assert not bare & {"LDL", "STL", "ATOM", "ATOMG", "RED"}
    assert shared <= 48 << 10  # what a block may have on every architecture without asking
    return opcodes


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets kernels in this process")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.get)
def test_attention_as_compiled(dtype, architecture):
    opcodes = check("_attention_kernel", dtype, 128, architecture)
    if architecture >= 80 and dtype != torch.float32:
        assert any("MMA" in op for op in opcodes)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets kernels in this process")
@pytest.mark.parametrize("architecture", [75, 90])
@pytest.mark.parametrize(("head_dim", "masked"), [(64, True), (80, False), (256, True)])
def test_attention_of_other_sizes(head_dim, masked, architecture):
    check("_attention_kernel", torch.float16, head_dim, architecture, masked)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets kernels in this process")
@pytest.mark.parametrize("architecture", [75, 80, 90, 120])
@pytest.mark.parametrize("kernel", ["_append_kernel", "_dequantize_kernel", "_join_kernel"])
def test_others_as_compiled(kernel, architecture):
    for masked in (False, True) if kernel == "_append_kernel" else (False,):
        check(kernel, torch.bfloat16, 128, architecture, masked)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets kernels in this process")
def test_numbers_that_grow_with_the_text_compile_no_second_kernel():
    from rcp_kernels.triton import kv_cache as kernels

    for name, numbers in (
        ("_append_kernel", {"position", "tokens"}),
        ("_dequantize_kernel", {"length"}),
        ("_attention_kernel", {"length", "split_size", "rows", "queries", "mask_query"}),
        ("_join_kernel", {"rows", "splits"}),
    ):
        parameters = getattr(kernels, name).params
        assert numbers <= {parameter.name for parameter in parameters if parameter.do_not_specialize}
