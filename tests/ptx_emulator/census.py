"""Which instructions a kernel contains, and which of them the emulator does not implement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .code import check_branch
from .decode import build, build_gate
from .instruction import Instruction, Kernel
from .launch import prepare
from .machine import Machine
from .program import gate_of, is_branch
from .report import UnknownInstruction
from .syntax import Module


def census(kernel: Kernel) -> Counter[str]:
    """Opcodes with all modifiers and how often they occur."""
    return Counter(ins.name for ins in kernel.instructions)


def unstarted(module: Module, kernel: Kernel) -> Machine:
    """A machine on which instructions can be built, with the least that the kernel demands."""
    block = kernel.directives.get("reqntid") or kernel.directives.get("maxntid") or (128,)
    cluster = kernel.directives.get("reqnctapercluster") or (1,)
    return prepare(module, replace(kernel, directives={}), cluster, block, cluster=cluster)


def problem(machine: Machine, ins: Instruction) -> str:
    """Why an instruction is unknown; "" when it is known."""
    try:
        if is_branch(ins):
            check_branch(ins)
        else:
            build(machine, ins)
        if gate_of(ins) == "self":
            build_gate(machine, ins)
    except UnknownInstruction as error:
        return str(error)
    return ""


def unknown_instructions(module: Module, kernel: Kernel) -> list[str]:
    """Build every instruction without running anything."""
    machine = unstarted(module, kernel)
    return [text for ins in kernel.instructions if (text := problem(machine, ins))]
