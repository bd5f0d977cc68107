"""Instructions to basic blocks, numbered so that lanes of a warp meet again where they should.

A warp runs the lowest-numbered block that any of its lanes is ready for.  The numbering is a
topological order of the control flow graph in which a whole loop comes before what follows it
(Bourdoncle's weak topological order), so lanes that leave a loop or take the short side of an
`if` wait, in effect, at the immediate post-dominator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .instruction import Instruction, Kernel, Memory, Reg, Vector

EXIT_OPCODES = frozenset({"ret", "exit", "trap"})
# The warp's live lanes must be together: `.aligned` and matrix instructions.
WARP_OPCODES = frozenset({"mma", "ldmatrix", "stmatrix", "movmatrix"})
# Lanes named by a member mask must be together.
MASKED_OPCODES = frozenset({"shfl", "vote", "match", "redux", "elect"})


@dataclass(slots=True)
class Block:
    first: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)
    order: int = -1
    gate: str = ""

    @property
    def end(self) -> Instruction:
        return self.instructions[-1]


def gate_of(ins: Instruction) -> str:
    """What lanes wait for before this instruction: "", "warp", "warpgroup" or "self"."""
    op, mods = ins.opcode, ins.modifiers
    if op in WARP_OPCODES:
        return "warp"
    if op == "wgmma":
        return "warpgroup"
    if op == "tcgen05":
        if mods[0] == "alloc":
            return "self"
        return "warp" if "aligned" in mods else ""
    if op in ("bar", "barrier", "setmaxnreg") or op in MASKED_OPCODES:
        return "self"
    if op == "mbarrier" and mods[0] == "try_wait":
        return "self"
    return ""


def is_branch(ins: Instruction) -> bool:
    return ins.opcode in ("bra", "brx") or ins.opcode in EXIT_OPCODES


class Program:
    """The blocks of a kernel in execution order."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        blocks = _cut(kernel)
        for position, block in enumerate(_weak_topological_order(blocks)):
            blocks[block].order = position
        reached = [block for block in blocks if block.order >= 0]
        self.blocks = sorted(reached, key=lambda block: block.order)
        self.order_of = {block.first: block.order for block in self.blocks}
        self.following = {
            block.order: self.order_of.get(block.first + len(block.instructions), -1)
            for block in self.blocks
        }

    def target(self, label: str) -> int:
        return self.order_of[self.kernel.labels[label]]


def _cut(kernel: Kernel) -> list[Block]:
    instructions = kernel.instructions
    leaders = {0, *(at for at in kernel.labels.values() if at < len(instructions))}
    gates: dict[int, str] = {}
    together = False
    for i, ins in enumerate(instructions):
        together = together and i not in leaders
        gate = gate_of(ins)
        if gate in ("warpgroup", "self") or (gate == "warp" and not together):
            leaders.add(i)
            gates[i] = gate
            together = gate == "warp"
        if is_branch(ins):
            leaders.add(i + 1)
            together = False
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    number = {first: n for n, first in enumerate(starts)}
    blocks = []
    for first, stop in zip(starts, [*starts[1:], len(instructions)], strict=True):
        block = Block(first, instructions[first:stop], gate=gates.get(first, ""))
        block.successors = [number[at] for at in _targets(kernel, block.end, stop)]
        blocks.append(block)
    return blocks


def _targets(kernel: Kernel, end: Instruction, following: int) -> list[int]:
    falls_through = end.guard is not None or not is_branch(end)
    targets = [following] if falls_through and following < len(kernel.instructions) else []
    if end.opcode == "bra":
        targets.append(kernel.labels[end.operands[0].name])
    elif end.opcode == "brx":
        targets += [kernel.labels[label] for label in kernel.tables[end.operands[1].name]]
    return targets


def _weak_topological_order(blocks: list[Block]) -> list[int]:
    def visit(nodes: set[int], root: int, cut: int | None) -> list[int]:
        order: list[int] = []
        for component in _components(blocks, nodes, root, cut):
            head = min(component)
            if len(component) == 1:
                order.append(head)
            else:
                order += visit(component, head, head)
        return order

    return visit(set(range(len(blocks))), 0, None)


def _components(blocks: list[Block], nodes: set[int], root: int, cut: int | None):
    """Strongly connected components in topological order (Tarjan); edges into `cut` are gone."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    on_path: set[int] = set()
    found: list[set[int]] = []

    def successors(node: int):
        return iter([s for s in blocks[node].successors if s in nodes and s != cut])

    work = [(root, successors(root))]
    index[root] = low[root] = 0
    path.append(root)
    on_path.add(root)
    while work:
        node, remaining = work[-1]
        for successor in remaining:
            if successor not in index:
                index[successor] = low[successor] = len(index)
                path.append(successor)
                on_path.add(successor)
                work.append((successor, successors(successor)))
                break
            if successor in on_path:
                low[node] = min(low[node], index[successor])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                component = set()
                while node not in component:
                    component.add(path.pop())
                on_path -= component
                found.append(component)
    return reversed(found)


def registers_in(operand) -> list[str]:
    """Names of the registers an operand reads."""
    if isinstance(operand, Reg):
        return [operand.name]
    if isinstance(operand, Vector):
        return [name for item in operand.items for name in registers_in(item)]
    if isinstance(operand, Memory):
        inner = registers_in(operand.base)
        return inner + (registers_in(operand.coordinates) if operand.coordinates else [])
    return []
