"""Reads PTX text into a :class:`Module`.

The grammar is the part of the PTX ISA (https://docs.nvidia.com/cuda/parallel-thread-execution) that nvcc and Triton
write. Every opcode is accepted; the ``instructions_*`` modules define the meaning of instructions.
"""

from __future__ import annotations

import re
import struct

from .module import Address, Immediate, Instruction, Kernel, Module, PtxError, Symbol, Variable

__all__ = ["TYPE_BYTES", "parse"]

TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64, 128)}
TYPE_BYTES |= {"bf16": 2, "f16x2": 4, "bf16x2": 4, "pred": 1}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_NAME = r"[A-Za-z_$%][\w$]*"


def _number(text: str) -> int:
    text = text.rstrip("U")
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-")
    if text[:2].lower() in ("0x", "0b"):
        return sign * int(text, 0)
    return sign * (int(text, 8) if len(text) > 1 and text[0] == "0" else int(text))


def _split(text: str, separator: str = ",") -> list[str]:
    """Splits at separators outside of braces, brackets and parentheses."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == separator and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


class _Reader:
    def __init__(self, text: str) -> None:
        # Comments become blanks, which keeps the line numbers.
        self.text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        self.place = 0
        self.newlines = [match.start() for match in re.finditer("\n", self.text)]

    def line(self, place: int) -> int:
        low, high = 0, len(self.newlines)
        while low < high:
            middle = (low + high) // 2
            if self.newlines[middle] < place:
                low = middle + 1
            else:
                high = middle
        return low + 1

    def skip_blank(self) -> bool:
        match = re.compile(r"\s*").match(self.text, self.place)
        self.place = match.end()
        return self.place < len(self.text)

    def until(self, letters: str) -> tuple[str, str]:
        """The text up to one of the letters, and the letter, which is consumed too."""
        place = self.place
        while place < len(self.text) and self.text[place] not in letters:
            place += 1
        found = self.text[self.place : place]
        letter = self.text[place] if place < len(self.text) else ""
        self.place = place + 1
        return found.strip(), letter

    def braces(self) -> str:
        """The text inside balanced braces whose opening one was consumed."""
        depth, place = 1, self.place
        while depth and place < len(self.text):
            depth += {"{": 1, "}": -1}.get(self.text[place], 0)
            place += 1
        found = self.text[self.place : place - 1]
        self.place = place
        return found


def _variable(statement: str, space: str, line: int) -> Variable:
    """``.shared .align 16 .b8 name[64] = {1, 2}`` and its like."""
    declaration, _, values = statement.partition("=")
    align = re.search(r"\.align\s+(\d+)", declaration)
    vector = re.search(r"\.v([24])\b", declaration)
    match = re.search(
        rf"\.([busf]f?\d+(?:x2)?|texref|samplerref|surfref)\s+({_NAME})\s*((?:\[[^\]]*\]\s*)*)$", declaration
    )
    if match is None or match[1] not in TYPE_BYTES:
        raise PtxError(f"parse: a variable must have a type and a name, got {statement.strip()!r} in line {line}")
    element = TYPE_BYTES[match[1]] * (int(vector[1]) if vector else 1)
    count = 1
    for extent in re.findall(r"\[([^\]]*)\]", match[3]):
        count *= _number(extent.strip()) if extent.strip() else 0
    variable = Variable(match[2], space, element * count, int(align[1]) if align else element)
    variable.extern = ".extern" in declaration and count == 0
    if values.strip():
        data = b""
        for text in _split(values.strip().strip("{}").replace("{", "").replace("}", "")):
            symbol = re.match(rf"(?:generic\()?({_NAME})\)?(?:\+(\d+))?$", text)
            if re.match(r"0[fFdD][0-9a-fA-F]+$", text):
                data += int(text[2:], 16).to_bytes(TYPE_BYTES[match[1]], "little")
            elif _NUMBER.match(text):
                data += (_number(text) & (2 ** (8 * TYPE_BYTES[match[1]]) - 1)).to_bytes(TYPE_BYTES[match[1]], "little")
            elif symbol:
                variable.pointers.append((len(data), Symbol(symbol[1], int(symbol[2] or 0))))
                data += bytes(8)
            else:
                raise PtxError(f"parse: an initial value must be a number or a symbol, got {text!r} in line {line}")
        variable.initial = data
    return variable


class _Body:
    """A kernel's body: `{` and `}` open and close scopes, in which registers and labels have names of their own."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[tuple[str, dict[str, str]]] = [("", {})]
        self.count = 0

    def resolve(self, name: str) -> str:
        for _, names in reversed(self.scopes):
            if name in names:
                return names[name]
        return name

    def declare_registers(self, statement: str) -> None:
        words = re.match(r"\.reg\s+(?:\.v[24]\s+)?\.(\w+)\s+(.*)", statement, re.S)
        suffix, names = self.scopes[-1]
        for text in _split(words[2]):
            many = re.match(rf"({_NAME})<(\d+)>$", text)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [text]:
                names[name] = name + suffix
                self.kernel.registers[name + suffix] = words[1]

    def operand(self, text: str):
        if text.startswith("{"):
            return tuple(self.operand(part) for part in _split(text[1:-1]))
        if text.startswith("["):
            parts = _split(text[1:-1])
            if len(parts) > 1:
                return tuple(self.operand(part) for part in parts)
            base, sign, offset = re.match(r"([^+\-\s]*)\s*([+-]?)\s*(.*)$", parts[0], re.S).groups()
            # nvcc writes [%rd1+-8].
            shift = _number(offset.replace(" ", "")) * (-1 if sign == "-" else 1) if offset else 0
            if _NUMBER.match(base):
                return Address(None, _number(base) + shift)
            name = self.resolve(base)
            return Address(name if name in self.kernel.registers else Symbol(base), shift)
        if "|" in text:
            return tuple(self.operand(part) for part in _split(text, "|"))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), 4)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), 8)
        if _NUMBER.match(text):
            return Immediate(_number(text))
        if re.match(r"[+-]?\d+\.\d*(?:[eE][+-]?\d+)?$", text):
            return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"), 8)
        if text.startswith("!"):
            return ("!", self.operand(text[1:].strip()))
        name = self.resolve(text)
        if name in self.kernel.registers or text.startswith("%") or text == "_":
            return name
        symbol = re.match(rf"({_NAME})\s*([+-]\s*\w+)?$", text)
        if symbol is None:
            raise PtxError(f"parse: an operand must be one of the PTX ISA's, got {text!r}")
        return Symbol(symbol[1], _number(symbol[2].replace(" ", "")) if symbol[2] else 0)

    def instruction(self, statement: str, line: int) -> None:
        text = " ".join(statement.split())
        match = re.match(r"(?:@(!?)\s*([\w%$]+)\s+)?([a-z]\w*)((?:(?:\.|::)[\w]+)*)\s*(.*)$", text, re.S)
        if match is None:
            raise PtxError(f"parse: a statement must be an instruction, got {text!r} in line {line}")
        negated, guard, base, modifiers, operands = match.groups()
        words = tuple(modifiers.replace("::", ":").split(".")[1:])
        if base == "call":
            parsed: tuple = ()
        else:
            try:
                parsed = tuple(self.operand(part) for part in _split(operands))
            except (PtxError, AttributeError, ValueError) as error:
                raise PtxError(f"parse: cannot read {text!r} in line {line}: {error}") from error
        guard = self.resolve(guard) if guard else None
        self.kernel.instructions.append(Instruction(text, line, base, words, parsed, guard, bool(negated)))

    def read(self, reader: _Reader) -> None:
        depth = 1
        while reader.skip_blank():
            letter = reader.text[reader.place]
            if letter == "{":
                reader.place += 1
                depth += 1
                self.count += 1
                self.scopes.append((f"@{self.count}", {}))
                continue
            if letter == "}":
                reader.place += 1
                depth -= 1
                self.scopes.pop()
                if depth == 0:
                    return
                continue
            label = re.compile(rf"({_NAME})\s*:(?!:)").match(reader.text, reader.place)
            if label:
                name = label[1] + self.scopes[-1][0]
                self.scopes[-1][1][label[1]] = name
                self.kernel.labels[name] = len(self.kernel.instructions)
                reader.place = label.end()
                continue
            if letter == ";":
                reader.place += 1
                continue
            line = reader.line(reader.place)
            if re.compile(r"\.(loc|file)\b").match(reader.text, reader.place):
                reader.until("\n")
                continue
            statement = self._statement(reader)
            if statement.startswith(".reg"):
                self.declare_registers(statement)
            elif statement.startswith((".shared", ".local")):
                variable = _variable(statement, statement[1 : statement.index(" ")].split(".")[0].strip(), line)
                self.kernel.variables.append(variable)
            elif statement.startswith((".pragma", ".param", ".branchtargets", ".callprototype", ".align")):
                continue
            else:
                self.instruction(statement, line)
        raise PtxError(f"parse: the body of {self.kernel.name} must end with a brace; the text is cut off")

    def _statement(self, reader: _Reader) -> str:
        depth, place = 0, reader.place
        while place < len(reader.text):
            letter = reader.text[place]
            if letter in "{([":
                depth += 1
            elif letter in "})]":
                depth -= 1
            elif letter == ";" and depth == 0:
                break
            place += 1
        found = reader.text[reader.place : place]
        reader.place = place + 1
        return found.strip().replace("\t", " ")

    def link(self) -> None:
        """Branch targets become indices. Labels of inner scopes carry the scope's suffix."""
        for instruction in self.kernel.instructions:
            if instruction.base == "bra":
                name = instruction.operands[-1]
                name = name.name if isinstance(name, Symbol) else name
                found = [label for label in self.kernel.labels if label.split("@")[0] == name.split("@")[0]]
                if len(found) > 1:
                    # A label of inline assembly may occur several times: the nearest one belongs to this scope.
                    place = self.kernel.instructions.index(instruction)
                    found.sort(key=lambda label: abs(self.kernel.labels[label] - place))
                if not found:
                    raise PtxError(f"parse: a branch must have a target, got {instruction}")
                instruction.target = self.kernel.labels[found[0]]


def _kernel(header: str, reader: _Reader, line: int) -> Kernel:
    match = re.search(rf"\.entry\s+({_NAME})\s*(?:\((.*?)\))?(.*)$", header, re.S)
    parameters = []
    for text in _split(match[2] or ""):
        text = re.sub(r"\.ptr(?:\s+\.(?:global|const|shared|local|generic))?(?:\s+\.align\s+\d+)?", "", text)
        parameters.append(_variable(text, "param", line))
    kernel = Kernel(match[1], parameters, {}, [], [], {})
    for name, numbers in re.findall(r"\.(reqntid|maxntid)\s+([\d,\s]+)", match[3]):
        threads = tuple(int(number) for number in re.findall(r"\d+", numbers))
        if name == "reqntid":
            kernel.required_threads = threads
        else:
            kernel.most_threads = threads
    body = _Body(kernel)
    body.read(reader)
    body.link()
    return kernel


def parse(text: str) -> Module:
    """A module of PTX text. Functions that are no kernels are passed over: a call is an error when it is executed."""
    reader = _Reader(text)
    module = Module("", "", [], {})
    while reader.skip_blank():
        line = reader.line(reader.place)
        start = reader.place
        head = re.compile(r"\.(version|target|address_size|file|loc)\b").match(reader.text, start)
        if head:
            words, _ = reader.until("\n")
            if head[1] == "target":
                module.target = words.split()[1].rstrip(",")
            elif head[1] == "version":
                module.version = words.split()[1]
            continue
        if re.compile(r"\.section\b").match(reader.text, start):
            reader.until("{")
            reader.braces()
            continue
        statement, letter = reader.until(";{")
        if re.search(r"\.entry\b", statement):
            kernel = _kernel(statement, reader, line)
            module.kernels[kernel.name] = kernel
        elif re.search(r"\.func\b", statement):
            if letter == "{":
                reader.braces()
        elif re.search(r"\.(?:global|const|shared)\b", statement):
            if letter == "{":
                statement += "{" + reader.braces() + "}"
                reader.until(";")
            space = re.search(r"\.(global|const|shared)\b", statement)[1]
            module.variables.append(_variable(statement, space, line))
        elif letter == "{" or statement not in ("", ".pragma"):
            raise PtxError(f"parse: a statement of a module must be a variable or a kernel, got {statement!r}")
    return module
