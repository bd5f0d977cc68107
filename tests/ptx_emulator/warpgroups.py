"""Outstanding wgmma operations of every warpgroup, and the registers they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .async_work import Job
from .instruction import Instruction
from .program import registers_in
from .registers import Group

if TYPE_CHECKING:
    from .machine import Machine


@dataclass
class Warpgroup:
    """Outstanding operations of one warpgroup."""

    column: int
    jobs: list[tuple[int, Job, int]] = field(default_factory=list)
    committed: int = 0
    flying: set[str] = field(default_factory=set)
    fenced: bool = False


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
        due = [entry for entry in queue.jobs if entry[0] < limit]
        queue.jobs = [entry for entry in queue.jobs if entry[0] >= limit]
        for _, job, _ in due:
            machine.async_work.finish(job)
        if due:
            lanes = np.arange(number * 128, number * 128 + 128)
            known = np.zeros(machine.clocks.known.shape[2], np.int32)
            known[queue.column] = max(tick for _, _, tick in due)
            machine.clocks.acquire(
                number * 128 // machine.team_lanes, lanes % machine.team_lanes, known
            )
        if not queue.jobs:
            queue.flying.clear()
        machine.flying = machine.flying_registers()

    def check_registers(self, ins: Instruction, group: Group) -> None:
        """No other instruction may touch registers of an operation that is still in flight."""
        used = {name for operand in ins.operands for name in registers_in(operand)}
        if not used & self.machine.flying or ins.opcode == "wgmma":
            return
        for number in np.unique(group.lanes // 128).tolist():
            queue = self.queues.get(number)
            if queue is not None and used & queue.flying:
                name = sorted(used & queue.flying)[0]
                self.machine.find(
                    "in-flight", f"register {name} belongs to a wgmma nobody waited for", None
                )
        loading = self.machine.tensor_memory.loading
        for warp in np.unique(group.lanes // 32).tolist() if ins.opcode != "tcgen05" else ():
            if used & loading.get(warp, set()):
                self.machine.find("in-flight", "result of tcgen05.ld before tcgen05.wait::ld", None)
