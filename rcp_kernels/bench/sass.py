"""What the machine code of a CUDA kernel says about it: instructions, registers, spills, occupancy. Needs no GPU.

Text in, numbers out: :func:`parse_listing` reads what ``cuobjdump -sass`` prints, :func:`parse_resources` what
``cuobjdump -res-usage`` prints. How often each instruction is issued is :mod:`rcp_kernels.bench.sass_walk`'s.
"""

from __future__ import annotations

import collections
import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_EM_CUDA, _NO_BITS = 190, 8
_GUARD = re.compile(r"@(!?U?P[0-9T]+)\s+")


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!P0 IADD3 R1, R2, 0x1, RZ`` has guard ``!P0`` and opcode ``IADD3``."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Kernel:
    """A kernel's machine code for one architecture; the resources are filled in by :func:`load`."""

    arch: int
    name: str  # mangled
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = 0
    shared_bytes: int = 0  # static
    stack_bytes: int = 0
    local_bytes: int = 0
    constants: dict[int, bytes] = field(default_factory=dict)  # of the kernel's own banks: literals

    @property
    def spills(self) -> int:
        """Instructions that load from or store to local memory."""
        return sum(instruction.name in ("LDL", "STL") for instruction in self.instructions)


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at once (CUDA C++ Programming Guide, "Technical Specifications per Compute
    Capability", and the allocation units of its occupancy calculator)."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    register_unit: int = 256  # a warp's registers are allocated in such units
    warp_unit: int = 4  # a block's warps share the registers of four schedulers
    shared_unit: int = 128
    shared_reserved: int = 1024  # of each block, for the system


LIMITS = {
    75: Limits(warps=32, blocks=16, shared_bytes=64 << 10, shared_unit=256, shared_reserved=0),
    80: Limits(warps=64, blocks=32, shared_bytes=164 << 10),
    86: Limits(warps=48, blocks=16, shared_bytes=100 << 10),
    89: Limits(warps=48, blocks=24, shared_bytes=100 << 10),
    90: Limits(warps=64, blocks=32, shared_bytes=228 << 10),
    100: Limits(warps=64, blocks=32, shared_bytes=228 << 10),
    120: Limits(warps=48, blocks=24, shared_bytes=100 << 10),
}


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # of one multiprocessor
    warps: int
    fraction: float  # of the warps it could hold
    limited_by: str  # warps, blocks, registers or shared memory


def occupancy(arch: int, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Theoretical occupancy of blocks of ``threads`` threads with that many registers each.

    Args:
        arch: 75, 80, ...: a key of :data:`LIMITS`.
        shared_bytes: of a block, static and dynamic.
    """
    limits = LIMITS[arch]
    warps = math.ceil(threads / 32)
    bounds = {"warps": limits.warps // warps, "blocks": limits.blocks}
    if registers:
        of_warp = math.ceil(registers * 32 / limits.register_unit) * limits.register_unit
        resident = limits.registers // of_warp // limits.warp_unit * limits.warp_unit
        bounds["registers"] = resident // warps
    shared = shared_bytes + limits.shared_reserved
    if shared:
        bounds["shared memory"] = limits.shared_bytes // (math.ceil(shared / limits.shared_unit) * limits.shared_unit)
    limited_by = min(bounds, key=lambda name: bounds[name])
    blocks = bounds[limited_by]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limited_by)


# Classes of the report; an opcode that is in none counts as "other". I2F holds all conversions.
CLASSES = {
    "IMMA": ("IMMA",),
    "HMMA": ("HMMA",),
    "PRMT": ("PRMT",),
    "LOP3": ("LOP3", "PLOP3"),
    "SHF": ("SHF",),
    "IMAD": ("IMAD",),
    "IADD3": ("IADD3", "IADD", "VIADD", "LEA"),
    "FFMA": ("FFMA", "FFMA2"),
    "FADD/FMUL": ("FADD", "FADD2", "FMUL", "FMUL2"),
    "HADD2": ("HADD2", "HFMA2", "HMUL2"),
    "I2F": ("I2F", "I2FP", "F2I", "F2F", "F2FP"),
    "LDG": ("LDG",),
    "LDGSTS": ("LDGSTS",),
    "LDS": ("LDS", "LDSM"),
    "STS": ("STS",),
    "STG": ("STG",),
}
_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes}
TENSOR = ("IMMA", "HMMA")

# Opcodes of the ALU pipe: 16 lanes a scheduler on sm_75 to sm_120 as far as published, so one every other cycle.
ALU = frozenset(
    "BMSK BREV FLO FMNMX FSEL FSETP HMNMX2 IABS IADD IADD3 IMNMX ISETP LEA LOP3 PLOP3 POPC PRMT SEL SGXT SHF VABSDIFF "
    "VIADD VIMNMX VIMNMX3".split()
)


def class_of(instruction: Instruction) -> str:
    """Which of :data:`CLASSES`, or "other"."""
    return _CLASS_OF.get(instruction.name, "other")


def count_classes(instructions: list[Instruction], weights: list[float] | None = None) -> collections.Counter[str]:
    """Instructions by class, each counted once or ``weights[i]`` times."""
    counts: collections.Counter[str] = collections.Counter()
    for i, instruction in enumerate(instructions):
        counts[class_of(instruction)] += 1 if weights is None else weights[i]  # type: ignore[assignment]
    return counts


def access_bytes(instruction: Instruction) -> int:
    """Bytes a lane moves: ``LDG.E.128`` 16, ``LDS`` 4, ``LDG.E.U16`` 2."""
    for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("16", 2), ("U8", 1), ("S8", 1), ("8", 1)):
        if modifier in instruction.modifiers:
            return size
    return 4


def parse_instruction(address: int, text: str) -> Instruction:
    guard = _GUARD.match(text)
    if guard:
        text = text[guard.end() :]
    opcode, _, rest = text.partition(" ")
    operands, depth, current = [], 0, ""
    for character in rest:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        operands.append(current.strip())
    return Instruction(address, guard[1] if guard else "", opcode, tuple(operands))


def parse_listing(text: str) -> list[Kernel]:
    """Every kernel of ``cuobjdump -sass``'s output, without the padding after its last instruction.

    Raises:
        ValueError: an instruction comes before the name of a kernel or of its architecture.
    """
    kernels: list[Kernel] = []
    arch = 0
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*(?:code for |arch = )sm_(\d+)", line)
        if header:
            arch = int(header[1])
            continue
        function = re.match(r"\s*Function : (\S+)", line)
        if function:
            kernels.append(Kernel(arch, function[1]))
            continue
        found = _LINE.match(line)
        if not found:
            continue
        if not kernels or not arch:
            raise ValueError(
                f"parse_listing: instructions must follow 'code for sm_..' and 'Function : ..', got line {number}: "
                f"{line.strip()!r}; pass the whole output of cuobjdump -sass"
            )
        kernels[-1].instructions.append(parse_instruction(int(found[1], 16), found[2]))
    for kernel in kernels:
        code = kernel.instructions
        # The padding: NOPs behind a branch to itself.
        while code and (
            code[-1].name == "NOP" or (code[-1].name == "BRA" and branch_target(code[-1]) == code[-1].address)
        ):
            code.pop()
    return kernels


def branch_target(instruction: Instruction) -> int | None:
    """The address that the last operand names."""
    found = re.search(r"0x([0-9a-f]+)\)?$", instruction.operands[-1]) if instruction.operands else None
    return int(found[1], 16) if found else None


def parse_resources(text: str) -> dict[tuple[int, str], dict[str, int]]:
    """``cuobjdump -res-usage``'s output: (arch, mangled name) -> {"REG": .., "STACK": .., "SHARED": .., "LOCAL": ..}.
    The architecture is 0 where the output does not name one, as that of a bare cubin."""
    resources: dict[tuple[int, str], dict[str, int]] = {}
    arch, name = 0, ""
    for line in text.splitlines():
        header = re.match(r"\s*arch = sm_(\d+)", line)
        function = re.match(r"\s*Function (\S+):\s*$", line)
        if header:
            arch = int(header[1])
        elif function:
            name = function[1]
        elif name and "REG:" in line:
            resources[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            name = ""
    return resources


def find_tool(name: str) -> Path:
    """cuobjdump or cu++filt: beside nvcc, on the PATH, or where the triton wheel keeps it.

    Raises:
        FileNotFoundError: it is nowhere.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if (Path(home) / "bin" / name).exists():
            return Path(home) / "bin" / name
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    triton = importlib.util.find_spec("triton")
    for folder in (triton.submodule_search_locations or ()) if triton else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return path
    raise FileNotFoundError(
        f"sass: {name} must be in CUDA_HOME/bin, on the PATH or in the triton package, got none; pip install triton, "
        "or install the CUDA toolkit"
    )


def _run(*command: str | Path, folder: str | None = None) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=folder)
    if run.returncode:
        raise ValueError(f"sass.load: cuobjdump must read {command[-1]}, got: {run.stderr.strip()[:200]}")
    return run.stdout


def _sections(elf: bytes) -> dict[str, bytes]:
    """The sections of an ELF file of 64 bits by name."""
    start, size, count, names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    text = elf[headers[names][4] :]
    return {
        text[header[0] : text.index(b"\0", header[0])].decode(): elf[header[4] : header[4] + header[5]]
        for header in headers
        if header[1] != _NO_BITS
    }


def load(path: Path, arch: int | None = None) -> list[Kernel]:
    """Every kernel of a cubin, a fat binary or a library that contains one; with ``arch``, only its code.

    Raises:
        FileNotFoundError: no such file, or no cuobjdump.
        ValueError: no machine code in the file.
    """
    tool, content = find_tool("cuobjdump"), path.read_bytes()
    kernels: list[Kernel] = []
    if content[:4] == b"\x7fELF" and struct.unpack_from("<H", content, 18)[0] == _EM_CUDA:
        kernels = parse_listing(_run(tool, "-sass", path))
        resources, sections = parse_resources(_run(tool, "-res-usage", path)), _sections(content)
        for kernel in kernels:
            values = resources.get((kernel.arch, kernel.name)) or resources.get((0, kernel.name), {})
            kernel.registers = values.get("REG", 0)
            kernel.shared_bytes = values.get("SHARED", 0)
            kernel.stack_bytes = values.get("STACK", 0)
            kernel.local_bytes = values.get("LOCAL", 0)
            for bank in range(1, 8):
                literals = sections.get(f".nv.constant{bank}.{kernel.name}")
                if literals:
                    kernel.constants[bank] = literals
        return [kernel for kernel in kernels if arch in (None, kernel.arch)]
    with tempfile.TemporaryDirectory() as folder:
        _run(tool, "-xelf", f"sm_{arch}" if arch else "all", path.resolve(), folder=folder)
        for cubin in sorted(Path(folder).iterdir()):
            kernels += load(cubin, arch)
    if not kernels:
        raise ValueError(
            f"sass.load: {path} must contain machine code for sm_{arch or '..'}, got none; build it for that one"
        )
    return kernels


def short_name(mangled: str) -> str:
    """``_ZN3rcp4cuda20lut_linear_one_tokenILi2ELi128E...`` -> ``lut_linear_one_token<2,128>``."""
    name, at = mangled, mangled.find("_ZN") + 3
    parts = []
    while at >= 3 and (length := re.match(r"\d+", mangled[at:])):
        at += len(length[0])
        parts.append(mangled[at : at + int(length[0])])
        at += int(length[0])
    if parts:
        name = parts[-1]
        arguments = re.match(r"I((?:L[ijb]n?\d+E)+)E", mangled[at:])
        if arguments:
            values = re.findall(r"L[ijb](n?)(\d+)E", arguments[1])
            name += f"<{','.join(('-' if sign else '') + value for sign, value in values)}>"
    return name
