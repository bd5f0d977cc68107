"""Kernels, instructions and operands as the parser leaves them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_WIDTH = re.compile(r"\d+")


def type_bytes(name: str) -> int:
    """Size of a fundamental type such as `b32` or `bf16x2`; `pred` counts as one byte."""
    if name == "pred":
        return 1
    width = int(_WIDTH.search(name)[0])  # type: ignore[index]
    return width // 8 * (2 if name.endswith("x2") else 1)


class Reg(NamedTuple):
    """A register; `negated` only for predicates written `!%p`."""

    name: str
    negated: bool = False


class Imm(NamedTuple):
    """A literal: `kind` is "int", "f32" or "f64"; floats carry their bit pattern."""

    value: int
    kind: str


class Symbol(NamedTuple):
    """The address of a variable, or a special register such as `%tid.x`, or a label."""

    name: str
    offset: int = 0


class Vector(NamedTuple):
    """`{a, b, c, d}`."""

    items: tuple


class Memory(NamedTuple):
    """`[base + offset]`, and for tensor copies `[map, {coordinates}]`."""

    base: Reg | Symbol | Imm
    offset: int = 0
    coordinates: Vector | None = None


class Pair(NamedTuple):
    """`d|p`, the two destinations of shfl, elect and others."""

    first: object
    second: object


Sink = Symbol("_")


@dataclass(slots=True)
class Instruction:
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple
    guard: Reg | None
    line: int
    source: str
    text: str
    index: int = -1

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Variable:
    """A `.param`, `.shared`, `.local`, `.global` or `.const` variable."""

    name: str
    space: str
    align: int
    size: int
    data: bytes = b""
    extern: bool = False


@dataclass
class Kernel:
    name: str
    params: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[str, ...]] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
