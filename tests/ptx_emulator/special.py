"""Special registers ("Special Registers" in the ISA)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instruction import Instruction
from .placement import unravel
from .registers import Group
from .report import UnknownInstruction

if TYPE_CHECKING:
    from .machine import Machine

_AXIS = {"x": 0, "y": 1, "z": 2}


class SpecialRegisters:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.time = 0

    def getter(self, ins: Instruction, name: str) -> Callable[[Group], np.ndarray]:
        machine, layout = self.machine, self.machine.layout
        match = re.match(r"%(\w+?)(?:\.([xyz]))?$", name)
        if match is None:
            raise UnknownInstruction(ins, f"special register {name}")
        base, axis = match[1], _AXIS.get(match[2] or "", -1)
        constants = {
            "ntid": layout.block,
            "nctaid": layout.grid,
            "nclusterid": layout.cluster_grid,
            "cluster_nctaid": layout.cluster,
        }
        if axis >= 0 and base in constants:
            value = np.array(constants[base][axis])
            return lambda group: value
        if axis >= 0:
            return self._position(ins, base, axis)
        scalars = {
            "cluster_nctarank": layout.cluster_size,
            "is_explicit_cluster": int(layout.cluster_size > 1),
            "nwarpid": layout.block_lanes // 32,
            "nsmid": 1 << 10,
            "dynamic_smem_size": machine.shared.window,
            "total_smem_size": machine.shared.window,
        }
        if base in scalars:
            constant = np.array(scalars[base])
            return lambda group: constant
        return self._scalar(ins, base)

    def _position(self, ins: Instruction, base: str, axis: int):
        layout = self.machine.layout
        if base == "tid":
            table = unravel(layout.thread, layout.block)[axis]
            return lambda group: table[group.sel]
        if base == "cluster_ctaid":
            table = unravel(layout.rank, layout.cluster)[axis]
            return lambda group: table[group.sel]
        if base == "ctaid":
            return lambda group: unravel(layout.lane_block[group.sel], layout.grid)[axis]
        if base == "clusterid":
            return lambda group: unravel(layout.lane_cluster[group.sel], layout.cluster_grid)[axis]
        raise UnknownInstruction(ins, f"special register %{base}")

    def _scalar(self, ins: Instruction, base: str):
        layout = self.machine.layout
        lane = layout.thread % 32
        tables = {
            "laneid": lane,
            "warpid": layout.thread // 32,
            "smid": layout.slot,
            "cluster_ctarank": layout.rank,
            "lanemask_eq": 1 << lane,
            "lanemask_lt": (1 << lane) - 1,
            "lanemask_le": (2 << lane) - 1,
            "lanemask_gt": 0xFFFFFFFF & ~((2 << lane) - 1),
            "lanemask_ge": 0xFFFFFFFF & ~((1 << lane) - 1),
        }
        if base in tables:
            table = tables[base]
            return lambda group: table[group.sel]
        if base in ("clock", "clock64", "clock_hi", "globaltimer", "globaltimer_lo"):
            return self._clock
        raise UnknownInstruction(ins, f"special register %{base}")

    def _clock(self, group: Group) -> np.ndarray:
        """Time only has to pass; reading it gives others a turn (bounded spins)."""
        self.time += 1000
        self.machine.yield_lanes(group.lanes)
        return np.array(self.time)
