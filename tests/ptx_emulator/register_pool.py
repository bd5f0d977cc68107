"""Registers per thread, and `setmaxnreg`, which moves them between the warps of a block.

"setmaxnreg.dec releases registers, setmaxnreg.inc blocks until enough are available in the
per-CTA-register-pool". PTX does not say how many registers ptxas gives a thread, so the caller of
`run` may (`registers`); without that number only the form of the instruction is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .decode import Modifiers, Operation, gate, opcode
from .instruction import Instruction
from .ops_async import constant
from .registers import Group
from .report import UnknownInstruction
from .states import EXITED

if TYPE_CHECKING:
    from .machine import Machine


class RegisterPool:
    """Registers per thread of every warp, and the free ones of every block slot."""

    def __init__(self, machine: Machine, registers: int | None) -> None:
        self.machine = machine
        self.at_launch = registers
        warps = machine.lane_count // 32
        self.of_warp = np.full(warps, registers or 0)
        self.free = np.zeros(machine.lane_count // machine.block_lanes, np.int64)

    def restart(self, lanes: slice) -> None:
        """New blocks start in these lanes."""
        self.of_warp[lanes.start // 32 : lanes.stop // 32] = self.at_launch or 0
        size = self.machine.block_lanes
        self.free[lanes.start // size : lanes.stop // size] = 0

    def enough(self, warp: int, count: int) -> bool:
        """Whether `warp` can have `count` registers per thread now."""
        return count - self.of_warp[warp] <= self.free[self._slot(warp)]

    def change(self, warp: int, count: int, grow: bool) -> None:
        before = int(self.of_warp[warp])
        if (count < before) if grow else (count > before):
            which = "inc" if grow else "dec"
            self.machine.stop(
                "register-count", f"setmaxnreg.{which} from {before} registers to {count}", None
            )
        self.free[self._slot(warp)] -= count - before
        self.of_warp[warp] = count

    def _slot(self, warp: int) -> int:
        return warp * 32 // self.machine.block_lanes


class RegisterCountForm:
    """setmaxnreg.{inc,dec}.sync.aligned.u32: a multiple of 8 in 24..256."""

    def __init__(self, ins: Instruction) -> None:
        mods = Modifiers(ins)
        self.grow = mods.need("inc", "dec") == "inc"
        for name in ("sync", "aligned", "u32"):
            mods.need(name)
        mods.done()
        self.count = constant(ins, 0)
        if self.count % 8 or not 24 <= self.count <= 256:
            raise UnknownInstruction(ins, f"{self.count} registers")


@gate("setmaxnreg")
def enough_registers(machine: Machine, ins: Instruction) -> Operation:
    """The warp is together, and what it asks for is in the pool of its block."""
    form = RegisterCountForm(ins)
    pool = machine.register_pool
    if pool.at_launch is None or not form.grow:
        return machine.gather_warps

    def wait(group: Group) -> None:
        order = machine.pc[group.lanes[0]]
        for warp in np.unique(group.lanes >> 5).tolist():
            lanes = np.arange(warp * 32, warp * 32 + 32)
            live = lanes[machine.status[lanes] != EXITED]
            here = group.lanes[group.lanes >> 5 == warp]
            if not (machine.pc[live] == order).all():
                machine.block(here, "the other lanes of its warp")
            elif pool.enough(warp, form.count):
                pool.change(warp, form.count, grow=True)
                machine.release(live)
            else:
                machine.block(here, f"registers: {form.count} a thread are not free in its block")

    return wait


@opcode("setmaxnreg")
def set_register_count(machine: Machine, ins: Instruction) -> Operation:
    form = RegisterCountForm(ins)
    pool = machine.register_pool
    if pool.at_launch is None or form.grow:  # the gate took the registers
        return lambda group: None

    def run(group: Group) -> None:
        for warp in np.unique(group.lanes >> 5).tolist():
            pool.change(warp, form.count, grow=False)
        machine.progress += 1
        for block in np.unique(group.lanes // machine.block_lanes).tolist():
            first = block * machine.block_lanes
            machine.retry(np.arange(first, first + machine.block_lanes))

    return run
