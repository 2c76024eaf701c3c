"""The Triton kernels as compiled for every architecture, without a GPU: registers, spills, accesses to memory.

interpreted/walsh_transform.py tests the results. Triton's wheel brings ptxas, nvdisasm and cuobjdump.
Compiled kernels stay in Triton's cache, so a second run is faster.
"""

import functools
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rcp_kernels.ops.walsh_matrices import factor_size, sequency_permutation

triton = pytest.importorskip("triton", reason="the Triton kernels need triton: pip install triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets kernels in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from rcp_kernels.triton.walsh_transform import launch as kernels  # noqa: E402

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The most that one block may have: sm_75. 1024 bytes are the system's on newer ones.
SHARED_LIMITS = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Variant:
    """A call of the operators; bits 0 is a transform, else a token of `groups` quantized."""

    n: int
    dtype: torch.dtype
    order: str = "sequency"
    inverse: bool = False
    bits: int = 0
    packed: bool = False
    groups: int = 1

    def __str__(self) -> str:
        parts = [str(self.n), NAMES[self.dtype], self.order]
        parts += (
            ["inverse"] * self.inverse + [f"q{self.bits}x{self.groups}"] * bool(self.bits) + ["packed"] * self.packed
        )
        return "-".join(parts)

    def tile(self, architecture: int) -> kernels.Tile:
        return kernels.tile_config(
            self.n,
            self.dtype,
            factor_size(self.n)[0],
            self.groups if self.bits else 0,
            self.order == "sequency",
            self.inverse,
            architecture >= 80,
        )


@dataclass(frozen=True)
class Compiled:
    tile: kernels.Tile
    ttir: str
    ttgir: str
    sass: tuple[str, ...]  # opcodes with their modifiers
    registers: int
    stack: int
    shared: int

    def count(self, *opcodes: str) -> int:
        return sum(op.split(".")[0] in opcodes for op in self.sass)

    def widths(self, opcode: str) -> list[int]:
        """Bytes per thread of each of its global loads (LDG) or stores (STG)."""
        sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        accesses = [op.split(".")[1:] for op in self.sass if op.split(".")[0] == opcode]
        return [next((sizes[word] for word in words if word in sizes), 4) for words in accesses]

    def exchanges(self) -> int:
        return self.ttgir.count("ttg.convert_layout ")

    def accesses(self) -> list[tuple[str, tuple[int, ...], str, list[int], list[int]]]:
        """Global loads and stores of tiles: operation, shape, element, values per thread, threads per warp."""
        layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<(.*)>$", self.ttgir, re.M))
        found = []
        pattern = r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*tensor<([\dx]+)x!tt\.ptr<(\w+)>, (#\w+)>"
        for operation, shape, element, layout in re.findall(pattern, self.ttgir):
            numbers = [
                [int(n) for n in re.search(rf"{field} = \[([\d, ]+)\]", layouts[layout])[1].split(",")]
                for field in ("sizePerThread", "threadsPerWarp")
            ]
            found.append((operation, tuple(map(int, shape.split("x"))), element, *numbers))
        return found


@functools.cache
def compiled(variant: Variant, architecture: int) -> Compiled:
    tile = variant.tile(architecture)
    pointer = "*" + NAMES[variant.dtype]
    tables = {"base_ptr": "*fp32", "permutation_ptr": "*i32"}
    if variant.bits:
        kernel = kernels._quantize_kernel
        types = {"x_ptr": pointer, "q_ptr": "*u8" if variant.packed else "*i8", "scale_ptr": "*fp32", **tables}
        types |= {"scale": "fp32", "clip": "fp32"}
        constants = {"GROUPS": variant.groups, "QMAX": 2 ** (variant.bits - 1) - 1, "PACKED": variant.packed}
    else:
        kernel = kernels._transform_kernel
        types = {"x_ptr": pointer, "y_ptr": pointer, **tables, "rows": "i32", "scale": "fp32"}
        constants = {}
    constants["TILE"] = tile
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=tile.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(result.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / tool, option, binary], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    assert int(local) == 0
    return Compiled(
        tile,
        result.asm["ttir"],
        result.asm["ttgir"],
        tuple(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.M)),
        int(registers),
        int(stack),
        result.metadata.shared,
    )


def check(variant: Variant, architecture: int) -> Compiled:
    """What holds for every kernel on every architecture."""
    kernel = compiled(variant, architecture)
    assert kernel.stack == 0
    assert kernel.count("LDL", "STL") == 0
    assert kernel.registers * 32 * kernel.tile.warps <= 65536
    assert kernel.shared <= SHARED_LIMITS.get(architecture, 99 << 10)
    assert kernel.count("ATOM", "ATOMG", "RED") == 0
    return kernel


def assert_one_read_one_write(variant: Variant, kernel: Compiled) -> None:
    """For powers of two: a block moves its tile once in each direction, in vectors, and a warp moves whole sectors."""
    tile = kernel.tile
    size = variant.dtype.itemsize
    threads = 32 * tile.warps
    values = tile.rows * tile.n
    tokens_scale = 4 if variant.bits else 0
    loads, stores = kernel.widths("LDG"), kernel.widths("STG")
    assert sum(loads) * threads == values * size
    if not variant.bits:
        assert sum(stores) * threads == values * size
        assert set(stores) == {min(16, tile.n * size, values * size // threads)}
    else:
        out = values // (1 + variant.packed)
        assert (sum(stores) - tokens_scale) * threads == out
        assert max(stores) >= min(4, out // threads)
    assert set(loads) == {min(16, tile.n * size, values * size // threads)}
    for operation, shape, element, per_thread, lanes in kernel.accesses():
        run = per_thread[-1] * lanes[-1]
        assert run * {"f32": 4, "f16": 2, "bf16": 2, "i8": 1}[element] >= 32 or run == shape[-1], operation


REPRESENTATIVE = [
    Variant(128, torch.float16),  # a quantization group
    Variant(4096, torch.bfloat16),
    Variant(8192, torch.float32),
    Variant(32768, torch.float32),
    Variant(4096, torch.float16, "natural"),
    Variant(128, torch.bfloat16, bits=4, packed=True, groups=32),
    Variant(4096, torch.float32, "natural", bits=8),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", REPRESENTATIVE, ids=str)
def test_powers_of_two(variant, architecture):
    assert_one_read_one_write(variant, check(variant, architecture))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("order", ["sequency", "natural"])
@pytest.mark.parametrize("n", [2, 8, 32, 512, 2048, 16384])
def test_powers_of_two_of_every_size(n, order, dtype):
    variant = Variant(n, dtype, order)
    assert_one_read_one_write(variant, check(variant, 80))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=NAMES.get)
@pytest.mark.parametrize("n", [128, 1024, 4096, 8192])
def test_sequency_order_costs_nothing(n, dtype):
    sequency, natural = (check(Variant(n, dtype, order), 80) for order in ("sequency", "natural"))
    assert sequency.exchanges() <= natural.exchanges()
    assert sequency.exchanges() == len(sequency.tile.chunks) - 1
    values = sequency.tile.rows * n // (32 * sequency.tile.warps)
    # One float instruction per value and stage, and one for the scale; the signs of a chunk's first stage are a few.
    arithmetic = sequency.count("FADD", "FFMA", "FMUL")
    assert values * (math.log2(n) + 1) <= arithmetic <= values * (math.log2(n) + 1) + values
    assert sequency.widths("STG") == natural.widths("STG")


@pytest.mark.parametrize(("n", "groups"), [(128, 32), (4096, 1)])
def test_quantization_needs_no_exchange_of_the_tile(n, groups):
    for order in ("sequency", "natural"):
        for packed in (False, True):
            kernel = check(Variant(n, torch.float16, order, bits=4, packed=packed, groups=groups), 80)
            assert kernel.exchanges() <= len(kernel.tile.chunks) - (order == "sequency" or n == 4096)


@pytest.mark.parametrize(("n", "groups"), [(128, 112), (128, 300), (1, 11008)])
def test_long_tokens(n, groups):
    for architecture in (75, 90):
        check(
            Variant(n, torch.float16, "natural" if n == 1 else "sequency", bits=4, packed=True, groups=groups),
            architecture,
        )


DENSE = [
    Variant(576, torch.float16),
    Variant(14336, torch.float16, "natural"),
    Variant(14336, torch.bfloat16, inverse=True),
    Variant(11008, torch.bfloat16),
    Variant(14336, torch.float32),
    Variant(11008, torch.float16, "natural", bits=4, packed=True),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", DENSE, ids=str)
def test_with_a_dense_factor(variant, architecture):
    kernel = check(variant, architecture)
    element = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[variant.dtype]
    # x is loaded in one place and y stored in one; float32 is also the type of the base.
    loads = re.findall(rf"tt\.load .*x!tt\.ptr<{element}>>", kernel.ttir)
    assert len(loads) == (2 if variant.dtype == torch.float32 else 1)
    assert len(re.findall(r"tt\.store .*tensor<", kernel.ttir)) == 1
    if architecture >= 80 and variant.dtype != torch.float32:
        assert any("MMA" in op for op in kernel.sass)
    if not kernel.tile.interleaved and not variant.bits:
        assert set(kernel.widths("STG")) == {16}


@pytest.mark.parametrize("architecture", [75, 90])
def test_a_dense_factor_alone(architecture):
    for variant in (Variant(28672, torch.float32), Variant(27648, torch.float16, inverse=True)):
        kernel = check(variant, architecture)
        assert kernel.tile.blocks > 1


@pytest.mark.parametrize("n", [576, 3072, 5504, 11008, 13824, 14336])
def test_sectors_of_interleaved_stores(n):
    """32 lanes store 32 ranks of one column: how many sectors does that touch, beside those that the output has?"""
    m, c = factor_size(n)
    kernel = compiled(Variant(n, torch.float16), 80)
    (_, shape, _, per_thread, lanes) = next(access for access in kernel.accesses() if access[0] == "tt.store")
    assert per_thread == [1, 1, 1]
    assert shape[-1] == kernel.tile.padded_m
    ranks = sequency_permutation(n).view(c, m) // c
    even, odd = ranks[0].tolist(), ranks[1].tolist()
    width = min(lanes[-1], 32)
    touched = 0
    for column in range(c):
        rank = list(range(m)) if column % 2 == 0 else [odd.index(row) for row in even]
        for first in range(0, m, width):
            touched += len({(column * m + r) * 2 // 32 for r in rank[first : first + width]})
    assert touched <= 2.2 * n * 2 / 32


def test_variants_are_what_they_say():
    """The numbers above would mean little if the counting were off: a kernel counted by hand."""
    kernel = compiled(Variant(128, torch.float16), 80)
    assert Counter(kernel.widths("LDG")) == {16: 2}
    assert kernel.tile.chunks == (3, 1, 3)
    assert kernel.exchanges() == 2


def test_another_number_of_rows_compiles_no_second_kernel():
    rows = next(parameter for parameter in kernels._transform_kernel.params if parameter.name == "rows")
    assert rows.do_not_specialize
