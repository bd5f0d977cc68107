"""Accesses to the shared memory of another block of the cluster, and whether it outlives them.

"Shared memory of a block is there while the block runs": before it exits, the block must know of
every access by its peers. Checked by happens-before, so no schedule has to make the block leave
first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .states import EXITED

if TYPE_CHECKING:
    from .machine import Machine


class Visits:
    """The last access of every lane to every rank of its cluster: tick, place, barriers before."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        shape = (machine.layout.cluster_size, machine.lane_count)
        self.ticks, self.places, self.arrivals = (np.zeros(shape, np.int64) for _ in range(3))

    def record(self, lanes: np.ndarray, slots: np.ndarray) -> None:
        """`lanes` access the shared memory of blocks `slots`, one each."""
        machine = self.machine
        away = slots != machine.slots_of(lanes)
        lanes, ranks = lanes[away], slots[away] % machine.layout.cluster_size
        self.ticks[ranks, lanes] = machine.ticks(lanes)
        self.places[ranks, lanes] = machine.at.index
        self.arrivals[ranks, lanes] = machine.cluster_barriers.arrivals[lanes]

    def restart(self, lanes: slice) -> None:
        self.ticks[:, lanes] = 0

    def exited(self, slots: np.ndarray) -> None:
        """Threads of these blocks have exited; if they were the last, nobody may come any more."""
        machine = self.machine
        for slot in slots.tolist():
            block = slice(slot * machine.block_lanes, (slot + 1) * machine.block_lanes)
            if (machine.status[block] == EXITED).all():
                self._check(*divmod(slot, machine.layout.cluster_size), block)

    def _check(self, team: int, rank: int, block: slice) -> None:
        machine = self.machine
        first = team * machine.team_lanes
        cluster = slice(first, first + machine.team_lanes)
        ticks = self.ticks[rank, cluster]
        visitors = np.nonzero(ticks)[0]
        inside = slice(block.start - first, block.stop - first)
        known = machine.clocks.known[team, inside][:, visitors].max(axis=0)
        passed = machine.cluster_barriers.passed[block].max()
        late = (known < ticks[visitors]) & (passed <= self.arrivals[rank, cluster][visitors])
        at, group = machine.at, machine.group
        machine.group = None
        for visitor in visitors[late].tolist():
            machine.at = machine.instruction(int(self.places[rank, first + visitor]))
            name = machine.lane_name(first + visitor)
            message = f"shared memory of block rank {rank}, which may have exited [{name}]"
            machine.find("exited-block", message, None)
        machine.at, machine.group = at, group
