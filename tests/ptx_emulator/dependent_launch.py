"""Programmatic dependent launch: the buffers a kernel may not touch before `griddepcontrol.wait`.

"griddepcontrol.wait causes the executing thread to wait until all prerequisite grids in flight
have completed and all the memory operations from the prerequisite grids are performed and made
visible to the current grid". One kernel runs here at a time, so the caller of `run` names the
buffers that the kernel before it writes or reads (`after`); touching one of them in a block none
of whose threads has waited is a finding. Whether the thread that waited is ordered before the one
that touches is not checked: any thread
of the block will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, opcode, operand_count
from .instruction import Instruction

if TYPE_CHECKING:
    from .machine import Machine


class DependentLaunch:
    """Offsets [begin, end) of the buffers in question, and which block slots have waited."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.ranges: list[tuple[int, int]] = []
        self.waited = np.zeros(machine.lane_count // machine.block_lanes, bool)

    def restart(self, lanes: slice) -> None:
        """New blocks start in these lanes."""
        size = self.machine.block_lanes
        self.waited[lanes.start // size : lanes.stop // size] = False

    def wait(self, lanes: np.ndarray) -> None:
        self.waited[lanes // self.machine.block_lanes] = True

    def check(self, lanes: np.ndarray, at: np.ndarray) -> None:
        """An access of `lanes` to global offsets `at`."""
        early = ~self.waited[lanes // self.machine.block_lanes]
        if not early.any():
            return
        for begin, end in self.ranges:
            bad = early & (at >= begin) & (at < end)
            if bad.any():
                self.machine.find(
                    "dependent-launch",
                    "a buffer of the kernel before this one is touched before "
                    f"griddepcontrol.wait, {self.machine.memory.describe(int(at[bad][0]))}",
                    bad,
                )


@opcode("griddepcontrol")
def dependent_control(machine: Machine, ins: Instruction) -> Operation:
    """launch_dependents lets the next kernel start early: without effect on this one."""
    mods = Modifiers(ins)
    action = mods.need("wait", "launch_dependents")
    mods.done()
    operand_count(ins, 0)
    if action == "launch_dependents":
        return lambda group: None
    return lambda group: machine.dependent_launch.wait(group.lanes)
