"""The blocks of a program as closures: what waits before each, what runs in it, what ends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import decode
from .instruction import Instruction
from .program import Block, is_branch, registers_in
from .registers import Group
from .report import UnknownInstruction
from .warpgroups import held_registers

if TYPE_CHECKING:
    from .machine import Machine


def check_branch(ins: Instruction) -> None:
    """Raise for a form of a branch or an exit that is not known."""
    table = ("idx",) if ins.opcode == "brx" else ()
    if ins.modifiers not in (table, (*table, "uni")):
        raise UnknownInstruction(ins)


class Code:
    """Parallel lists, indexed by the order number of a block.

    `ends` holds (instruction, guard, target): the guard is None when unconditional, the target
    a function of the group, or None for the end of the thread."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.bodies: list[list[tuple]] = []
        self.gates: list[decode.Operation | None] = []
        self.gate_guards: list = []
        self.ends: list[tuple] = []
        self.held = frozenset().union(*map(held_registers, machine.kernel.instructions))
        for block in machine.program.blocks:
            self._add(block)

    def _add(self, block: Block) -> None:
        body = block.instructions
        branch = is_branch(block.end)
        self.bodies.append(
            [
                (ins, self._operation(ins), self._guard(ins))
                for ins in (body[:-1] if branch else body)
            ]
        )
        gate = None
        if block.gate == "self":
            gate = decode.build_gate(self.machine, body[0])
        elif block.gate:
            gate = self.machine.gathering(128 if block.gate == "warpgroup" else 32)
        self.gates.append(gate)
        self.gate_guards.append(self._guard(body[0]))
        self.ends.append(self._end(block.end) if branch else (None, None, None))

    def _operation(self, ins: Instruction) -> decode.Operation:
        operation = decode.build(self.machine, ins)
        used = (name for operand in ins.operands for name in registers_in(operand))
        names = self.held.intersection(used)
        if not names or ins.opcode == "wgmma":
            return operation

        def watched(group: Group) -> None:
            operation(group)
            self.machine.warpgroups.touch(group, names)

        return watched

    def _guard(self, ins: Instruction):
        return self.machine.registers.source(ins, ins.guard, "pred") if ins.guard else None

    def _end(self, end: Instruction) -> tuple:
        program = self.machine.program
        check_branch(end)
        if end.opcode == "bra":
            target = program.target(end.operands[0].name)
            return end, self._guard(end), lambda group: target
        if end.opcode == "brx":
            labels = self.machine.kernel.tables[end.operands[1].name]
            table = np.array([program.target(label) for label in labels], np.int32)
            index = self.machine.registers.source(end, end.operands[0], "u32")
            return end, self._guard(end), lambda group: table[index(group)]
        return end, self._guard(end), self._trap if end.opcode == "trap" else None

    def _trap(self, group: Group) -> None:
        self.machine.stop("trap", "the kernel executed trap", None)
