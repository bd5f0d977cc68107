"""Outstanding wgmma operations of every warpgroup, and the registers they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .async_work import Job
from .instruction import Instruction, Vector
from .program import registers_in
from .registers import Group

if TYPE_CHECKING:
    from .machine import Machine


class Outstanding(NamedTuple):
    """A wgmma in flight: its group, its work, its tick, and the registers it holds."""

    group: int
    job: Job
    tick: int
    registers: frozenset[str]
    accumulators: frozenset[str]


@dataclass
class Warpgroup:
    """One warpgroup: `touched` are registers of wgmmas that other instructions used since the
    last `wgmma.fence`."""

    column: int
    jobs: list[Outstanding] = field(default_factory=list)
    committed: int = 0
    touched: set[str] = field(default_factory=set)
    fenced: bool = False

    @property
    def flying(self) -> set[str]:
        return set().union(*(entry.registers for entry in self.jobs))


def held_registers(ins: Instruction) -> frozenset[str]:
    """Accumulators and fragments of A of a `wgmma.mma_async`; empty for other instructions."""
    if ins.opcode != "wgmma" or ins.modifiers[0] != "mma_async":
        return frozenset()
    a = ins.operands[1]
    fragments = registers_in(a) if isinstance(a, Vector) else []
    return frozenset([*registers_in(ins.operands[0]), *fragments])


class WarpgroupQueues:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.queues: dict[int, Warpgroup] = {}
        self.columns: dict[int, int] = {}

    def of(self, number: int) -> Warpgroup:
        if number not in self.queues:
            inside = number % (self.machine.team_lanes // 128)
            if inside not in self.columns:
                self.columns[inside] = self.machine.clocks.add_engine()
            self.queues[number] = Warpgroup(self.columns[inside])
        return self.queues[number]

    def wait(self, number: int, newest: int) -> None:
        """All but the newest groups are complete: results and operand reads are ordered."""
        queue, machine = self.of(number), self.machine
        limit = queue.committed - newest
        due = [entry for entry in queue.jobs if entry.group < limit]
        queue.jobs = [entry for entry in queue.jobs if entry.group >= limit]
        for entry in due:
            machine.async_work.finish(entry.job)
        if due:
            lanes = np.arange(number * 128, number * 128 + 128)
            known = np.zeros(machine.clocks.known.shape[2], np.int32)
            known[queue.column] = max(entry.tick for entry in due)
            machine.clocks.acquire(
                number * 128 // machine.team_lanes, lanes % machine.team_lanes, known
            )
        machine.flying = machine.flying_registers()

    def touch(self, group: Group, names: frozenset[str]) -> None:
        """Another instruction uses registers of wgmmas: the next wgmma needs a fence."""
        for number in np.unique(group.lanes // 128).tolist():
            if number in self.queues:
                self.queues[number].touched |= names

    def check_registers(self, ins: Instruction, group: Group) -> None:
        """No other instruction may touch registers of an operation that is still in flight."""
        if ins.opcode == "wgmma":
            return
        used = {name for operand in ins.operands for name in registers_in(operand)}
        if not used & self.machine.flying:
            return
        for number in np.unique(group.lanes // 128).tolist():
            queue = self.queues.get(number)
            held = used & queue.flying if queue is not None else None
            if held:
                name = min(held)
                self.machine.find(
                    "in-flight", f"register {name} belongs to a wgmma nobody waited for", None
                )
        loading = self.machine.tensor_memory.loading
        again = ins.opcode == "tcgen05" and ins.modifiers[0] == "ld"
        for warp in np.unique(group.lanes // 32).tolist() if not again else ():
            if used & loading.get(warp, set()):
                self.machine.find("in-flight", "result of tcgen05.ld before tcgen05.wait::ld", None)
