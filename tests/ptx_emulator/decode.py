"""The registry of opcodes: what each instruction does, and what lanes wait for before it.

An operation is built once per instruction: the builder looks at every modifier, raises
`UnknownInstruction` for any it does not know, and returns a closure over whole groups of lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .instruction import Instruction
from .registers import Group
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

Operation = Callable[[Group], None]
Builder = Callable[["Machine", Instruction], Operation]

_OPERATIONS: dict[str, Builder] = {}
_GATES: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Register the builder of an opcode (the part before the first dot)."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _OPERATIONS[name] = builder
        return builder

    return register


def gate(*names: str) -> Callable[[Builder], Builder]:
    """Register what lanes wait for before an opcode runs.

    The closure releases the lanes that may go on (`machine.release`) and blocks the others
    (`machine.block`)."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _GATES[name] = builder
        return builder

    return register


def build(machine: Machine, ins: Instruction) -> Operation:
    builder = _OPERATIONS.get(ins.opcode)
    if builder is None:
        raise UnknownInstruction(ins)
    return _called(builder, machine, ins)


def _called(builder: Builder, machine: Machine, ins: Instruction) -> Operation:
    """Operands that a builder did not expect are an unknown form of the instruction."""
    try:
        return builder(machine, ins)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UnknownInstruction(ins, f"operands: {error}") from error


def build_gate(machine: Machine, ins: Instruction) -> Operation:
    builder = _GATES.get(ins.opcode)
    if builder is None:
        raise UnknownInstruction(ins)
    return _called(builder, machine, ins)


class Modifiers:
    """The modifiers of one instruction, ticked off as they are understood."""

    def __init__(self, ins: Instruction) -> None:
        self.ins = ins
        self.left = list(ins.modifiers)

    def take(self, *names: str) -> str:
        """The first of `names` that is present, removed; "" when none is."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return ""

    def need(self, *names: str) -> str:
        found = self.take(*names)
        if not found:
            raise UnknownInstruction(self.ins, f"expected one of {', '.join(names)}")
        return found

    def last(self) -> str:
        """The last modifier: the type."""
        if not self.left:
            raise UnknownInstruction(self.ins, "no type")
        return self.left.pop()

    def done(self) -> None:
        if self.left:
            raise UnknownInstruction(self.ins, f"modifier {'.'.join(self.left)}")


def operand_count(ins: Instruction, *counts: int) -> None:
    if len(ins.operands) not in counts:
        raise UnknownInstruction(ins, f"{len(ins.operands)} operands")
