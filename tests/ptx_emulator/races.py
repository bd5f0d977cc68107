"""Who touched which granule of memory last, and whether a new access is ordered after it.

A granule is the smallest access of the kernel (at most 16 bytes in shared, 4 in global memory), so
that neighbours never look like conflicts.  Stamps are (lane, tick of its clock).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .clocks import NEVER

if TYPE_CHECKING:
    from .machine import Machine

Same = Callable[[np.ndarray], np.ndarray]
_BUSY = "store to the source of an asynchronous operation nobody waited for,"


class Granules:
    """A space cut into granules of equal size."""

    def __init__(self, granule: int) -> None:
        self.shift = granule.bit_length() - 1

    def granules(self, at: np.ndarray, size: int) -> np.ndarray:
        """The granules [n, k] of accesses of `size` bytes."""
        first = at >> self.shift
        count = max(size >> self.shift, 1)
        return first[:, None] if count == 1 else first[:, None] + np.arange(count)


class SharedTracker(Granules):
    """Shared memory: lanes and engines of one cluster."""

    def __init__(self, machine: Machine, size: int, granule: int) -> None:
        super().__init__(granule)
        self.machine = machine
        self.clocks = machine.clocks
        count = size >> self.shift
        self.readers = machine.team_lanes // 32
        self.writer = np.full(count, -1, np.int32)
        self.written = np.zeros(count, np.int32)
        self.strong = np.zeros(count, bool)
        self.write_at = np.zeros(count, np.int32)
        self.reader = np.zeros((count, self.readers), np.int32)
        self.read = np.zeros((count, self.readers), np.int32)
        self.last_read = np.zeros(count, np.int32)
        self.read_at = np.zeros(count, np.int32)
        self.strong_read: np.ndarray | None = None  # once there are strong loads
        # reads by asynchronous engines: the last tick of each engine per granule
        self.engines: list[int] = []
        self.engine_read: list[np.ndarray] = []

    def clear(self, begin: int, end: int) -> None:
        part = slice(begin >> self.shift, end >> self.shift)
        self.writer[part] = -1
        self.written[part] = 0
        self.read[part] = 0
        self.last_read[part] = 0
        for ticks in self.engine_read:
            ticks[part] = 0

    def load(self, lanes: np.ndarray, at: np.ndarray, size: int, strong: bool = False) -> None:
        cells = self.granules(at, size)
        team, lane = self.machine.team_of(lanes)
        self._after_write(cells, team, lane, strong, "load", None)
        tick = self.clocks.now[team, lane][:, None]
        warp = (lane >> 5)[:, None]
        self.reader[cells, warp] = lane[:, None]
        self.read[cells, warp] = tick
        if strong and self.strong_read is None:
            self.strong_read = np.zeros(self.read.shape, bool)
        if self.strong_read is not None:
            self.strong_read[cells, warp] = strong
        self.last_read[cells] = np.maximum(self.last_read[cells], tick)
        self.read_at[cells] = self.machine.at.index

    def store(
        self,
        lanes: np.ndarray,
        at: np.ndarray,
        size: int,
        same: Same | None,
        strong: bool = False,
        pending: bool = False,
    ) -> None:
        """`same(rows)` tells which of the rows store what memory holds already."""
        cells = self.granules(at, size)
        team, lane = self.machine.team_of(lanes)
        self._after_write(cells, team, lane, strong, "store", same)
        self._after_reads(cells, team, lane, strong, same)
        self.writer[cells] = lane[:, None]
        self.written[cells] = NEVER if pending else self.clocks.now[team, lane][:, None]
        self.strong[cells] = strong
        self.write_at[cells] = self.machine.at.index

    def overlaps(self, lanes: np.ndarray, at: np.ndarray, size: int, same: Same) -> None:
        """After a store: lanes of one instruction that hit the same bytes must agree."""
        _, lane = self.machine.team_of(lanes)
        lost = (self.writer[self.granules(at, size)] != lane[:, None]).any(axis=1)
        if lost.any():
            lost[lost] = ~same(lost)
            if lost.any():
                message = "lanes of one instruction store different values to the same bytes"
                self.machine.find("race", message, lost)

    def landed(self, lanes: np.ndarray, at: np.ndarray, size: int) -> None:
        """The lanes waited for their `cp.async`: the bytes are theirs from now on."""
        cells = self.granules(at, size)
        team, lane = self.machine.team_of(lanes)
        mine = (self.writer[cells] == lane[:, None]) & (self.written[cells] == NEVER)
        tick = np.broadcast_to(self.clocks.now[team, lane][:, None], cells.shape)
        self.written[cells[mine]] = tick[mine]

    def _after_write(self, cells, team, lane, strong: bool, access: str, same: Same | None) -> None:
        tick = self.written[cells]
        late = tick > self.clocks.floor[team, lane][:, None]
        if not late.any():
            return
        row, column = np.nonzero(late)
        cell = cells[row, column]
        writer, tick = self.writer[cell], tick[row, column]
        pending = tick == NEVER
        ordered = self.clocks.knows(team[row], lane[row], writer, tick)
        bad = ~ordered & ((writer != lane[row]) | pending) & (writer >= 0)
        if strong:
            bad &= ~self.strong[cell]
        if not bad.any():
            return
        flying = pending | (writer >= self.clocks.lanes)
        self._report(
            bad & flying,
            row,
            cell,
            self.write_at,
            len(lane),
            "in-flight",
            f"{access} of the destination of an asynchronous copy nobody waited for,",
            None,
        )
        self._report(
            bad & ~flying,
            row,
            cell,
            self.write_at,
            len(lane),
            "race",
            f"{access} not ordered after the store",
            same,
        )

    def _after_reads(self, cells, team, lane, strong: bool, same: Same | None) -> None:
        late = self.last_read[cells] > self.clocks.floor[team, lane][:, None]
        if late.any():
            row, column = np.nonzero(late)
            cell = cells[row, column]
            reader, tick = self.reader[cell], self.read[cell]
            ordered = self.clocks.knows(team[row, None], lane[row, None], reader, tick)
            bad = ~ordered & (reader != lane[row, None])
            if strong and self.strong_read is not None:
                bad &= ~self.strong_read[cell]
            self._report(
                bad.any(axis=1),
                row,
                cell,
                self.read_at,
                len(lane),
                "race",
                "store not ordered after the load",
                same,
            )
        for column, ticks in zip(self.engines, self.engine_read, strict=True):
            row, place = np.nonzero(ticks[cells])
            if len(row):
                cell = cells[row, place]
                ordered = self.clocks.knows(team[row], lane[row], column, ticks[cell])
                self._report(~ordered, row, cell, self.read_at, len(lane), "in-flight", _BUSY, None)

    def _report(self, bad, row, cell, places, count, kind, message, same: Same | None) -> None:
        if not bad.any():
            return
        rows = np.zeros(count, bool)
        rows[row[bad]] = True
        if same is not None:
            rows[rows] = ~same(rows)
            if not rows.any():
                return
        first = np.nonzero(bad & rows[row])[0][0]
        other = self.machine.instruction(int(places[cell[first]]))
        where = self.machine.shared.describe(int(cell[first]) << self.shift)
        self.machine.find(kind, f"{message} at line {other.line} ({other.text}), {where}", rows)

    # ---- the asynchronous proxy -----------------------------------------------------------

    def engine_load(self, lane: int, cells: np.ndarray, column: int, tick: int, what: str) -> None:
        """An engine, started by the machine lane `lane`, reads granules `cells` (unique)."""
        team, member = self.machine.team_and_member(lane)
        self._engine_after_write(team, member, cells, what)
        if column not in self.engines:
            self.engines.append(column)
            self.engine_read.append(np.zeros(len(self.writer), np.int32))
        self.engine_read[self.engines.index(column)][cells] = tick
        self.read_at[cells] = self.machine.at.index

    def engine_store(self, lane: int, cells: np.ndarray, column: int, tick: int, what: str) -> None:
        team, member = self.machine.team_and_member(lane)
        self._engine_after_write(team, member, cells, what)
        reader, read = self.reader[cells], self.read[cells]
        unordered = ~self.clocks.knows(team, member, reader, read) & (reader != member)
        self._engine_report(
            unordered.any(axis=1), cells, self.read_at, "race", f"{what} not ordered after the load"
        )
        for engine, ticks in zip(self.engines, self.engine_read, strict=True):
            busy = (ticks[cells] > 0) & ~self.clocks.knows(team, member, engine, ticks[cells])
            self._engine_report(
                busy,
                cells,
                self.read_at,
                "in-flight",
                f"{what} over the source of an asynchronous operation",
            )
        self.writer[cells] = column
        self.written[cells] = tick
        self.strong[cells] = False
        self.write_at[cells] = self.machine.at.index

    def _engine_after_write(self, team, member, cells, what: str) -> None:
        writer, tick = self.writer[cells], self.written[cells]
        known = self.clocks.knows(team, member, writer, tick) | (writer < 0)
        generic = (writer >= 0) & (writer < self.clocks.lanes)
        mine = (writer == member) & (tick != NEVER)
        flying = ~known & ~mine & (~generic | (tick == NEVER))
        self._engine_report(
            flying,
            cells,
            self.write_at,
            "in-flight",
            f"{what} of the destination of an asynchronous copy nobody waited for,",
        )
        unordered = ~known & ~mine & generic & (tick != NEVER)
        self._engine_report(
            unordered, cells, self.write_at, "race", f"{what} not ordered after the store"
        )
        ordered = generic & (known | mine) & (tick != NEVER)
        crossed = self.clocks.crossed(team, member, np.where(generic, writer, 0), tick)
        bad = ordered & ~crossed
        for place in np.unique(self.write_at[cells[bad]]).tolist():
            if self.machine.instruction(place).opcode == "tcgen05":
                bad &= self.write_at[cells] != place  # tcgen05.alloc is no generic store
        self._engine_report(
            bad,
            cells,
            self.write_at,
            "missing-proxy-fence",
            f"{what} without fence.proxy.async since the store",
        )

    def _engine_report(self, bad, cells, places, kind: str, message: str) -> None:
        if bad.any():
            cell = int(cells[bad][0])
            other = self.machine.instruction(int(places[cell]))
            where = self.machine.shared.describe(cell << self.shift)
            self.machine.find(kind, f"{message} at line {other.line} ({other.text}), {where}", None)
