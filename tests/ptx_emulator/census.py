"""Which instructions a kernel contains, and which of them the emulator does not implement."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .decode import build, build_gate
from .instruction import Kernel
from .launch import prepare
from .program import gate_of, is_branch
from .report import UnknownInstruction
from .syntax import Module


def census(kernel: Kernel) -> Counter[str]:
    """Opcodes with all modifiers and how often they occur."""
    return Counter(ins.name for ins in kernel.instructions)


def unknown_instructions(module: Module, kernel: Kernel) -> list[str]:
    """Build every instruction without running anything."""
    block = kernel.directives.get("reqntid") or kernel.directives.get("maxntid") or (128,)
    cluster = kernel.directives.get("reqnctapercluster") or (1,)
    machine = prepare(module, replace(kernel, directives={}), cluster, block, cluster=cluster)
    problems = []
    for ins in kernel.instructions:
        try:
            if not is_branch(ins):
                build(machine, ins)
            if gate_of(ins) == "self":
                build_gate(machine, ins)
        except UnknownInstruction as error:
            problems.append(str(error))
    return problems
