"""`tcgen05.fence`: order of tensor memory accesses across threads that meet without acquire and
release.

PTX ISA "Specialized Inter-thread Synchronization for tcgen05 instructions": what a thread did in
tensor memory before its `fence::before_thread_sync` is ordered before its later execution ordering
operations (mbarriers, barriers and strong accesses of a location, relaxed ones too), and what it
does after a `fence::after_thread_sync` is ordered after its earlier ones. Memory order by release
and acquire applies as well, to operations that are complete; those still running are passed on by
fences only.

Kernels without such fences pay nothing.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from .clocks import latest

if TYPE_CHECKING:
    from .machine import Machine

Row = np.ndarray  # a tick per column of the clocks


def _joint(*rows: Row | None) -> Row | None:
    """The latest of each tick in those rows that are there."""
    found = [row for row in rows if row is not None]
    return reduce(latest, found) if found else None


class ThreadSync:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.used = any(
            ins.opcode == "tcgen05" and ins.modifiers[0].startswith("fence")
            for ins in machine.kernel.instructions
        )
        self.posted: dict[int, Row] = {}  # by fence::before_thread_sync
        self.met: dict[int, Row] = {}  # through execution ordering operations
        self.view: dict[int, Row] = {}  # since fence::after_thread_sync
        self.flags: dict[tuple[int, int], Row] = {}  # by team and location

    def restart(self, team: int, lanes: slice) -> None:
        for rows in (self.posted, self.met, self.view):
            for lane in range(lanes.start, lanes.stop):
                rows.pop(lane, None)
        for key in [key for key in self.flags if key[0] == team]:
            del self.flags[key]

    # ---- fences ----------------------------------------------------------------------------

    def before(self, lanes: np.ndarray) -> None:
        """Everything done, and every multiplication started, is passed on from here."""
        machine = self.machine
        for lane in lanes.tolist():
            team, member = machine.team_and_member(lane)
            row = machine.clocks.release(team, np.array([member]))
            for column, tick in machine.tensor_memory.started(lane):
                row[column] = tick
            self.posted[lane] = latest(_joint(self.posted.get(lane), self.view.get(lane)), row)

    def after(self, lanes: np.ndarray) -> None:
        for lane in lanes.tolist():
            joint = _joint(self.view.get(lane), self.met.get(lane))
            if joint is not None:
                self.view[lane] = joint

    # ---- execution ordering ----------------------------------------------------------------

    def arrive(self, lanes: np.ndarray, before: Row | None) -> Row | None:
        """What a barrier hands on after these arrivals, given what it held `before`."""
        for lane in lanes.tolist() if self.used else ():
            before = _joint(before, self.posted.get(lane), self.met.get(lane))
        return before

    def meet(self, lanes: np.ndarray, row: Row | None) -> None:
        """The lanes waited for those arrivals."""
        if row is not None and self.used:
            for lane in lanes.tolist():
                self.met[lane] = latest(self.met.get(lane), row)

    def post(self, lane: int, flag: int) -> None:
        """A strong write at a location; what was handed on there before goes with it."""
        key = lane // self.machine.team_lanes, flag
        row = self.arrive(np.array([lane]), self.flags.get(key))
        if row is not None:
            self.flags[key] = row

    def clear(self, lane: int, flag: int) -> None:
        """A store, which carries nothing on of the stores before it."""
        self.flags.pop((lane // self.machine.team_lanes, flag), None)

    def collect(self, lane: int, flag: int) -> None:
        """A strong read of a location."""
        self.meet(np.array([lane]), self.flags.get((lane // self.machine.team_lanes, flag)))

    def knows(self, lane: int, column, tick: np.ndarray) -> np.ndarray:
        """Whether accesses at `tick` (of lanes or engines `column`) are ordered before now."""
        team, member = self.machine.team_and_member(lane)
        done = self.machine.clocks.knows(team, member, column, tick)
        row = self.view.get(lane)
        if row is not None:
            columns = np.broadcast_to(column, np.shape(tick))
            inside = columns < len(row)
            done = done | (inside & (tick <= row[np.where(inside, columns, 0)]))
        return done
