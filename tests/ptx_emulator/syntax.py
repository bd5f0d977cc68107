"""PTX text to a list of instructions.

Only what compilers emit is read: module variables, `.entry` kernels and `.func` functions, register
and variable declarations, nested scopes (inline assembly), labels, `.loc` lines and instructions.
Every instruction keeps its line in the PTX text and the source line that `.loc` gave it.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .calls import RETURN, Function, functions, inline
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
)
from .text import COMMENT, PtxSyntaxError, matching_brace, module_variables, split, variable


@dataclass(eq=False)
class Module:
    text: str
    target: str
    variables: list[Variable]
    entries: dict[str, tuple[int, int]]
    functions: dict[str, Function]

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
    return KernelParser(module, name, *module.entries[name]).parse()


_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:(?!:)"
    r"|(?P<line>\.(?:loc|file)\b[^\n]*)|(?P<statement>[^;]*);)"
)
_DIRECTIVE = re.compile(r"\.(\w+)\s*((?:\d+\s*,\s*)*\d+)?")
_OPERAND = re.compile(
    r"(?P<float>0[fFdD][0-9a-fA-F]+)|(?P<int>[-+]?(?:0[xX][0-9a-fA-F]+|\d+)U?(?![\w.]))"
    r"|(?P<decimal>[-+]?\d+\.\d*(?:[eE][-+]?\d+)?)|(?P<name>[%\w$][\w$.]*)"
)


def parse(text: str) -> Module:
    """Find the module's variables and kernels; kernels are parsed when asked for."""
    clean = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    target = re.search(r"\.target\s+(\w+)", clean)
    if target is None:
        raise PtxSyntaxError("no .target directive: not PTX text")
    entries: dict[str, tuple[int, int]] = {}
    bodies = functions(clean)
    inside = [(function.begin, function.end) for function in bodies.values()]
    for match in _ENTRY.finditer(clean):
        start = clean.index("{", match.end())
        entries[match[1]] = (match.end(), matching_brace(clean, start))
        inside.append((match.start(), entries[match[1]][1]))
    outside, position = [], 0
    for begin, end in sorted(inside):
        outside.append(clean[position:begin])
        position = end + 1
    outside.append(clean[position:])
    variables = list(module_variables("".join(outside)))
    return Module(clean, target[1], variables, entries, bodies)


class _Scope:
    def __init__(self, outer: _Scope | None, suffix: str) -> None:
        self.outer = outer
        self.suffix = suffix
        self.registers: dict[str, str] = {}
        self.ranges: dict[str, str] = {}
        self.labels: set[str] = set()
        self.symbols: dict[str, str] = {}  # variables and formal parameters to what they are

    def chain(self):
        scope: _Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.outer


class KernelParser:
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
        self.calls: list[str] = []

    def parse(self) -> Kernel:
        self._read_header()
        self.read(self.body, self.end)
        self._resolve_branches()
        return self.kernel

    def read(self, position: int, end: int) -> None:
        """The statements between two places of the text."""
        line = self.text.count("\n", 0, position) + 1
        while position < end:
            match = _STATEMENT.match(self.text, position, end)
            if match is None:
                if self.text[position:end].strip():
                    raise PtxSyntaxError(f"line {line}: cannot read a statement")
                break
            lead = len(match[0]) - len(match[0].lstrip())
            line += self.text.count("\n", position, position + lead)
            self._statement(match, line)
            line += self.text.count("\n", position + lead, match.end())
            position = match.end()

    @contextlib.contextmanager
    def inside(self, function: str, symbols: dict[str, str]) -> Iterator[None]:
        """Read the body of a function in a scope of its own; its returns lead to the end."""
        outer, self.scopes = self.scope, self.scopes + 1
        self.scope = scope = _Scope(None, f"@{self.scopes}")
        scope.symbols.update(symbols)
        scope.labels.add(RETURN)
        self.calls.append(function)
        yield
        self.calls.pop()
        self.kernel.labels[RETURN + scope.suffix] = len(self.kernel.instructions)
        self.scope = outer

    def leave(self, ins: Instruction, guard: Reg | None) -> None:
        """Go on behind the function that is being read."""
        way = replace(ins, opcode="bra", modifiers=(), operands=(Symbol(RETURN),), guard=guard)
        self._append(way)

    def _read_header(self) -> None:
        params = re.search(r"\((.*?)\)", self.header, re.S)
        rest = self.header
        if params:
            rest = self.header[params.end() :]
            for text in filter(None, (p.strip() for p in params[1].split(","))):
                self.kernel.params.append(variable(text))
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
            self._declare(variable(text))
        elif text.startswith(".branchtargets"):
            labels = tuple(name + self.scope.suffix for name in re.findall(r"[\w$]+", text)[1:])
            name = next(
                n
                for n, at in reversed(self.kernel.labels.items())
                if at == len(self.kernel.instructions)
            )
            self.kernel.tables[name] = labels
        elif not text.startswith(".pragma"):
            self._instruction(text, line)

    def _declare(self, variable: Variable) -> None:
        """Variables of functions are there once for each call, except in shared memory."""
        if variable.space == "shared":
            if variable.name not in [known.name for known in self.kernel.variables]:
                self.kernel.variables.append(variable)
            return
        unique = variable.name + self.scope.suffix
        self.scope.symbols[variable.name] = unique
        self.kernel.variables.append(replace(variable, name=unique, space="local"))

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
            register = self.name_of(match[2])
            guard = Reg(register.name, bool(match[1]))
        modifiers = tuple(part for part in match[4].split(".") if part)
        spelled = " ".join(text.split())
        ins = Instruction(match[3], modifiers, (), guard, line, self.source, spelled)
        if ins.opcode == "call":
            if not inline(self, match[5], ins):
                self._append(ins)
        elif ins.opcode == "ret" and self.calls:
            self.leave(ins, guard)
        else:
            ins.operands = tuple(self._operand(part, line) for part in split(match[5]))
            self._append(ins)

    def _append(self, ins: Instruction) -> None:
        ins.index = len(self.kernel.instructions)
        self.kernel.instructions.append(ins)
        if ins.opcode in ("bra", "brx"):
            self.branches.append((ins, self.scope))

    def _operand(self, text: str, line: int):
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, line) for part in split(text[1:-1])))
        if text.startswith("["):
            return self._memory(text[1:-1].strip(), line)
        if text.startswith("!"):
            return Reg(self.name_of(text[1:].strip()).name, True)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip(), line), self._operand(second.strip(), line))
        return self._sum(text, line)

    def _memory(self, text: str, line: int) -> Memory:
        parts = split(text)
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
        return self.name_of(match["name"])

    def name_of(self, name: str):
        for scope in self.scope.chain():
            kind = scope.registers.get(name) or self._ranged(scope, name)
            if kind:
                unique = name + scope.suffix
                self.kernel.registers[unique] = kind
                return Reg(unique)
            if name in scope.symbols:
                return Symbol(scope.symbols[name])
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
