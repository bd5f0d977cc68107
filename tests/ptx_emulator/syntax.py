"""PTX text to a list of instructions.

Only what compilers emit is read: module variables, `.entry` kernels, register and variable
declarations, nested scopes (inline assembly), labels, `.loc` lines and instructions.  Every
instruction keeps its line in the PTX text and the source line that `.loc` gave it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .instruction import (
    Imm,
    Instruction,
    Kernel,
    Memory,
    Pair,
    Reg,
    Symbol,
    Variable,
    Vector,
    type_bytes,
)


class PtxSyntaxError(ValueError):
    """The text is not PTX that this parser understands."""


@dataclass(eq=False)
class Module:
    text: str
    target: str
    variables: list[Variable]
    entries: dict[str, tuple[int, int]]

    def kernel(self, name: str) -> Kernel:
        """One kernel; `name` may be any part that fits a single entry."""
        if name not in self.entries:
            fits = [entry for entry in self.entries if name in entry]
            if len(fits) != 1:
                raise PtxSyntaxError(f"kernel {name!r}: {len(fits)} of {list(self.entries)} fit")
            name = fits[0]
        return _parsed(self, name)


@lru_cache(maxsize=32)
def _parsed(module: Module, name: str) -> Kernel:
    """Launches share the kernel: reading one costs more than executing it on a few blocks."""
    return _KernelParser(module, name, *module.entries[name]).parse()


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:(?!:)"
    r"|(?P<line>\.(?:loc|file)\b[^\n]*)|(?P<statement>[^;]*);)"
)
_VARIABLE = re.compile(
    r"\.(?P<space>param|shared|local|global|const)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$%]+)\s*"
    r"(?P<array>\[\s*\d*\s*\])?\s*(?:=\s*(?P<data>.*))?$",
    re.S,
)
_DIRECTIVE = re.compile(r"\.(\w+)\s*((?:\d+\s*,\s*)*\d+)?")
_OPERAND = re.compile(
    r"(?P<float>0[fFdD][0-9a-fA-F]+)|(?P<int>[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?(?![\w.]))"
    r"|(?P<decimal>[-+]?\d+\.\d*(?:[eE][-+]?\d+)?)|(?P<name>[%\w$][\w$.]*)"
)


def parse(text: str) -> Module:
    """Find the module's variables and kernels; kernels are parsed when asked for."""
    clean = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    target = re.search(r"\.target\s+(\w+)", clean)
    if target is None:
        raise PtxSyntaxError("no .target directive: not PTX text")
    entries: dict[str, tuple[int, int]] = {}
    outside: list[str] = []
    position = 0
    for match in _ENTRY.finditer(clean):
        start = clean.index("{", match.end())
        end = _matching_brace(clean, start)
        outside.append(clean[position : match.start()])
        position = end + 1
        entries[match[1]] = (match.end(), end)
    outside.append(clean[position:])
    return Module(clean, target[1], list(_module_variables("".join(outside))), entries)


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return start + match.start()
    raise PtxSyntaxError("unbalanced braces")


def _module_variables(text: str):
    text = re.sub(r"\.section\b.*", "", text, flags=re.S)
    for statement in text.split(";"):
        found = re.search(r"\.(?:shared|global|const)\b.*", statement, re.S)
        if found:
            variable = _variable(found[0].strip())
            variable.extern = ".extern" in statement
            yield variable


def _variable(text: str) -> Variable:
    match = _VARIABLE.match(text)
    if match is None:
        raise PtxSyntaxError(f"cannot read the declaration {text!r}")
    unit = type_bytes(match["type"])
    count = 1
    if match["array"]:
        count = int(match["array"].strip("[] \t\n") or 0)
    data = b""
    if match["data"]:
        values = re.findall(r"-?(?:0x[0-9a-fA-F]+|\d+)", match["data"])
        data = b"".join((int(v, 0) % (1 << 8 * unit)).to_bytes(unit, "little") for v in values)
    return Variable(match["name"], match["space"], int(match["align"] or unit), unit * count, data)


class _Scope:
    def __init__(self, outer: _Scope | None, suffix: str) -> None:
        self.outer = outer
        self.suffix = suffix
        self.registers: dict[str, str] = {}
        self.ranges: dict[str, str] = {}
        self.labels: set[str] = set()

    def chain(self):
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer


class _KernelParser:
    def __init__(self, module: Module, name: str, header: int, end: int) -> None:
        self.module = module
        self.kernel = Kernel(name)
        self.text = module.text
        self.body = self.text.index("{", header) + 1
        self.end = end
        self.header = self.text[header : self.body - 1]
        self.scope = _Scope(None, "")
        self.scopes = 0
        self.branches: list[tuple[Instruction, _Scope]] = []
        self.files: dict[str, str] = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.text))
        self.source = ""

    def parse(self) -> Kernel:
        self._read_header()
        line = self.text.count("\n", 0, self.body) + 1
        position = self.body
        while position < self.end:
            match = _STATEMENT.match(self.text, position, self.end)
            if match is None:
                if self.text[position : self.end].strip():
                    raise PtxSyntaxError(f"line {line}: cannot read a statement")
                break
            lead = len(match[0]) - len(match[0].lstrip())
            line += self.text.count("\n", position, position + lead)
            self._statement(match, line)
            line += self.text.count("\n", position + lead, match.end())
            position = match.end()
        self._resolve_branches()
        return self.kernel

    def _read_header(self) -> None:
        params = re.search(r"\((.*?)\)", self.header, re.S)
        rest = self.header
        if params:
            rest = self.header[params.end() :]
            for text in filter(None, (p.strip() for p in params[1].split(","))):
                self.kernel.params.append(_variable(text))
        for name, values in _DIRECTIVE.findall(rest):
            numbers = tuple(int(v) for v in values.split(",")) if values else ()
            self.kernel.directives[name] = numbers

    def _statement(self, match: re.Match, line: int) -> None:
        if match["open"]:
            self.scopes += 1
            self.scope = _Scope(self.scope, f"@{self.scopes}")
        elif match["close"]:
            if self.scope.outer is None:
                raise PtxSyntaxError(f"line {line}: unbalanced braces")
            self.scope = self.scope.outer
        elif match["label"]:
            self.scope.labels.add(match["label"])
            self.kernel.labels[match["label"] + self.scope.suffix] = len(self.kernel.instructions)
        elif match["line"]:
            self._source_line(match["line"])
        elif match["statement"].strip():
            self._simple(match["statement"].strip(), line)

    def _source_line(self, text: str) -> None:
        words = text.split()
        if words[0] == ".loc":
            name = self.files.get(words[1], f"file {words[1]}").rsplit("/", 1)[-1]
            self.source = f"{name}:{words[2]}"

    def _simple(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif re.match(r"\.(?:local|shared|param)\b", text):
            self.kernel.variables.append(_variable(text))
        elif text.startswith(".branchtargets"):
            labels = tuple(re.findall(r"[\w$]+", text)[1:])
            name = next(
                n
                for n, at in reversed(self.kernel.labels.items())
                if at == len(self.kernel.instructions)
            )
            self.kernel.tables[name] = labels
        elif not text.startswith(".pragma"):
            self._instruction(text, line)

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text, re.S)
        if match is None:
            raise PtxSyntaxError(f"cannot read {text!r}")
        for name in re.split(r"\s*,\s*", match[2].strip()):
            ranged = re.match(r"(.*)<\d+>$", name)
            if ranged:
                self.scope.ranges[ranged[1]] = match[1]
            else:
                self.scope.registers[name] = match[1]

    def _instruction(self, text: str, line: int) -> None:
        match = re.match(r"(?:@(!?)([\w%$]+)\s+)?([a-z_]\w*)((?:[.:][\w:]+)*)\s*(.*)$", text, re.S)
        if match is None:
            raise PtxSyntaxError(f"line {line}: cannot read {text!r}")
        guard = None
        if match[2]:
            register = self._name(match[2])
            guard = Reg(register.name, bool(match[1]))
        modifiers = tuple(part for part in match[4].split(".") if part)
        operands = tuple(self._operand(part, line) for part in _split(match[5]))
        ins = Instruction(
            match[3],
            modifiers,
            operands,
            guard,
            line,
            self.source,
            " ".join(text.split()),
            len(self.kernel.instructions),
        )
        self.kernel.instructions.append(ins)
        if match[3] in ("bra", "brx"):
            self.branches.append((ins, self.scope))

    def _operand(self, text: str, line: int):
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, line) for part in _split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1].strip(), line)
        if text.startswith("!"):
            return Reg(self._name(text[1:].strip()).name, True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip(), line), self._operand(second.strip(), line))
        return self._sum(text, line)

    def _memory(self, text: str, line: int) -> Memory:
        parts = _split(text)
        base = self._sum(parts[0], line)
        coordinates = self._operand(parts[1], line) if len(parts) > 1 else None
        if isinstance(base, Symbol):
            return Memory(Symbol(base.name), base.offset, coordinates)
        if isinstance(base, _Offset):
            return Memory(base.register, base.offset, coordinates)
        return Memory(base, 0, coordinates)

    def _sum(self, text: str, line: int):
        """A literal, a name, or a name with constant offsets: `%rd1+-8`, `buffer+16`."""
        match = _OPERAND.match(text)
        if match is None:
            raise PtxSyntaxError(f"line {line}: cannot read the operand {text!r}")
        rest = re.sub(r"\s+", "", text[match.end() :])
        first = self._atom(match)
        if not rest:
            return first
        offset = 0
        for sign, number in re.findall(r"([-+]+)(0[xX][0-9a-fA-F]+|\d+)", rest):
            offset += int(number, 0) * (-1 if sign.count("-") % 2 else 1)
        if re.sub(r"[-+]+(?:0[xX][0-9a-fA-F]+|\d+)", "", rest):
            raise PtxSyntaxError(f"line {line}: cannot read the operand {text!r}")
        if isinstance(first, Symbol):
            return Symbol(first.name, offset)
        if isinstance(first, Reg):
            return _Offset(first, offset)
        return Imm(first.value + offset, "int")

    def _atom(self, match: re.Match):
        if match["float"]:
            return Imm(int(match[0][2:], 16), "f32" if match[0][1] in "fF" else "f64")
        if match["int"]:
            return Imm(int(match[0].rstrip("U"), 0), "int")
        if match["decimal"]:
            return Imm(struct.unpack("<Q", struct.pack("<d", float(match[0])))[0], "f64")
        return self._name(match["name"])

    def _name(self, name: str):
        for scope in self.scope.chain():
            kind = scope.registers.get(name) or self._ranged(scope, name)
            if kind:
                unique = name + scope.suffix
                self.kernel.registers[unique] = kind
                return Reg(unique)
        return Symbol(name)

    @staticmethod
    def _ranged(scope: _Scope, name: str) -> str | None:
        return scope.ranges.get(name.rstrip("0123456789")) if name[-1].isdigit() else None

    def _resolve_branches(self) -> None:
        for ins, scope in self.branches:
            target = ins.operands[-1].name
            for outer in scope.chain():
                if target in outer.labels:
                    ins.operands = (*ins.operands[:-1], Symbol(target + outer.suffix))
                    break
            else:
                raise PtxSyntaxError(f"line {ins.line}: no label {target}")


class _Offset(NamedTuple):
    register: Reg
    offset: int


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
