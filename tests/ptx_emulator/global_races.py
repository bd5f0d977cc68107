"""Races in global memory, within a cluster and across clusters.

Clusters know of each other only through synchronisation on global memory ("Causality Order"),
see `flags.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clocks import NEVER, latest
from .races import Granules, Same

if TYPE_CHECKING:
    from .machine import Machine

Knowledge = dict[int, np.ndarray]  # cluster -> tick per lane (and engine) of that cluster
WEAK, NARROW, WIDE = 0, 1, 2  # strong accesses of .cta or .cluster scope, of .gpu or .sys scope


def strength(scope: str) -> int:
    return NARROW if scope in ("cta", "cluster") else WIDE


def merged(a: Knowledge, b: Knowledge) -> Knowledge:
    result = dict(a)
    for cluster, ticks in b.items():
        result[cluster] = latest(result.get(cluster), ticks)
    return result


class GlobalTracker(Granules):
    def __init__(self, machine: Machine, size: int, granule: int) -> None:
        self.machine = machine
        self.clocks = machine.clocks
        super().__init__(granule)
        count = size >> self.shift
        self.writer = np.full(count, -1, np.int32)
        self.written = np.zeros(count, np.int32)
        self.strong = np.zeros(count, np.uint8)
        self.by_engine = np.zeros(count, bool)
        self.write_at = np.zeros(count, np.int32)
        # the last reader, and the last one of another cluster than that
        self.reader = np.full((2, count), -1, np.int32)
        self.read = np.zeros((2, count), np.int32)
        self.read_at = np.zeros(count, np.int32)
        self.observed = np.zeros(count, bool)  # the last store was read by a strong load
        self.knowledge: list[Knowledge] = [{}]
        self.known_by = np.zeros(machine.lane_count, np.int32)
        self.proxy_view = np.zeros(machine.lane_count, np.int32)

    def restart(self, lanes: slice) -> None:
        """New blocks start in these lanes: they know nothing."""
        self.known_by[lanes] = 0
        self.proxy_view[lanes] = 0

    # ---- accesses --------------------------------------------------------------------------

    def load(self, lanes, at, size: int, strong: int = WEAK, engine: bool = False) -> None:
        if self.machine.dependent_launch.ranges:
            self.machine.dependent_launch.check(lanes, at)
        cells = self.granules(at, size)
        self._after_write(lanes, cells, strong, "load", None, engine)
        uid = self.machine.thread_ids(lanes)
        tick = self.machine.ticks(lanes)
        before = self.reader[0, cells]
        lanes_each = self.machine.cluster_threads
        other = (before >= 0) & (before // lanes_each != (uid // lanes_each)[:, None])
        if other.any():
            moved = cells[other]
            self.reader[1, moved] = self.reader[0, moved]
            self.read[1, moved] = self.read[0, moved]
        self.reader[0, cells] = uid[:, None]
        self.read[0, cells] = tick[:, None]
        self.read_at[cells] = self.machine.at.index
        self.observed[cells] |= strong != WEAK

    def store(
        self,
        lanes: np.ndarray,
        at: np.ndarray,
        size: int,
        same: Same | None,
        strong: int = WEAK,
        engine: bool = False,
        ticks: np.ndarray | None = None,
    ) -> None:
        if self.machine.dependent_launch.ranges:
            self.machine.dependent_launch.check(lanes, at)
        cells = self.granules(at, size)
        self._after_write(lanes, cells, strong, "store", same, engine)
        for slot in (0, 1):
            reader = self.reader[slot, cells]
            if not strong and (reader >= 0).any():
                self._check(
                    lanes,
                    cells,
                    reader,
                    self.read[slot, cells],
                    "store not ordered after the load",
                    self.read_at,
                    same,
                )
        self.writer[cells] = self.machine.thread_ids(lanes)[:, None]
        ticks = self.machine.ticks(lanes) if ticks is None else ticks
        self.written[cells] = NEVER if engine else ticks[:, None]
        self.observed[cells] = False
        self.by_engine[cells] = engine
        self.strong[cells] = strong
        self.write_at[cells] = self.machine.at.index

    def landed(self, lane: int, cells: np.ndarray) -> None:
        """A bulk store of `lane` was waited for."""
        lanes = np.array([lane])
        mine = cells[
            (self.writer[cells] == self.machine.thread_ids(lanes)[0])
            & (self.written[cells] == NEVER)
        ]
        self.written[mine] = self.machine.ticks(lanes)[0]

    def overlaps(self, lanes: np.ndarray, at: np.ndarray, size: int, same: Same) -> None:
        uid = self.machine.thread_ids(lanes)
        lost = (self.writer[self.granules(at, size)] != uid[:, None]).any(axis=1)
        if lost.any():
            lost[lost] = ~same(lost)
            if lost.any():
                message = "lanes of one instruction store different values to the same bytes"
                self.machine.find("global-race", message, lost)

    def _after_write(self, lanes, cells, strong, access: str, same: Same | None, engine) -> None:
        writer = self.writer[cells]
        candidates = writer >= 0
        if strong:
            uid = self.machine.thread_ids(lanes)[:, None]
            each = self.machine.cluster_threads
            weaker = np.minimum(self.strong[cells], strong)
            candidates &= (weaker == WEAK) | ((weaker == NARROW) & (writer // each != uid // each))
        if candidates.any():
            tick = self.written[cells]
            writer = np.where(candidates, writer, -1)
            message = f"{access} not ordered after the store"
            self._check(lanes, cells, writer, tick, message, self.write_at, same, engine)
            if engine:
                self._check_proxy(lanes, cells, writer, tick)

    def _check(
        self, lanes, cells, other, tick, message: str, places, same: Same | None, engine=False
    ) -> None:
        uid = np.broadcast_to(self.machine.thread_ids(lanes)[:, None], cells.shape)
        apart = other != uid
        if not engine:
            apart |= tick == NEVER  # a bulk store of the thread itself that it did not wait for
        row, column = np.nonzero((other >= 0) & apart)
        if not len(row):
            return
        other, tick = other[row, column], tick[row, column]
        bad = ~self.ordered(lanes[row], other, tick)
        if places is self.write_at and bad.any():
            bad[bad] = ~self._saw(lanes[row[bad]], cells[row[bad], column[bad]], tick[bad])
        if not bad.any():
            return
        rows = np.zeros(len(lanes), bool)
        rows[row[bad]] = True
        if same is not None:
            rows[rows] = ~same(rows)
            if not rows.any():
                return
        first = np.nonzero(bad & rows[row])[0][0]
        cell = int(cells[row[first], column[first]])
        place = self.machine.instruction(int(places[cell]))
        where = self.machine.memory.describe(cell << self.shift)
        who = self.machine.thread_name(int(other[first]))
        self.machine.find(
            "global-race", f"{message} of {who} at line {place.line} ({place.text}), {where}", rows
        )

    def _saw(self, lanes: np.ndarray, cells: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Whether the store was read, by a strong load that happened before now.

        "Causality Order": X precedes Y also when a Z that observed X precedes Y; of what its writer
        did before X that says nothing."""
        reader, read = self.reader[0, cells], self.read[0, cells]
        mine = reader == self.machine.thread_ids(lanes)
        before = mine | self.ordered(lanes, reader, read)
        return self.observed[cells] & (tick != NEVER) & before

    def _check_proxy(self, lanes, cells, writer, tick) -> None:
        generic = (writer >= 0) & ~self.by_engine[cells]
        row, column = np.nonzero(generic)
        if not len(row):
            return
        bad = ~self._crossed(lanes[row], writer[row, column], tick[row, column])
        if bad.any():
            cell = int(cells[row[bad][0], column[bad][0]])
            place = self.machine.instruction(int(self.write_at[cell]))
            self.machine.find(
                "missing-proxy-fence",
                f"asynchronous read without fence.proxy.async since the store at line {place.line}"
                f" ({place.text}), {self.machine.memory.describe(cell << self.shift)}",
                None,
            )

    def _crossed(self, lanes: np.ndarray, writer: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """A fence.proxy.async after the store: by its writer, or by the reader once ordered."""
        done = tick <= self.machine.fence_ticks[writer]
        view = self.clocks.global_view
        if view is not None:
            done |= self.ordered(lanes, writer, tick, self.proxy_view, view)
        return done

    def ordered(
        self,
        lanes: np.ndarray,
        other: np.ndarray,
        tick: np.ndarray,
        known_by: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> np.ndarray:
        """Whether accesses of threads `other` at `tick` happened before now, per lane."""
        known_by = self.known_by if known_by is None else known_by
        known = self.clocks.known if known is None else known
        team, lane = self.machine.team_of(lanes)
        each = self.machine.cluster_threads
        cluster, column = other // each, other % each
        mine = cluster == self.machine.cluster_of_team[team]
        result = np.zeros(len(lanes), bool)
        result[mine] = tick[mine] <= known[team[mine], lane[mine], column[mine]]
        rest = np.nonzero(~mine)[0]
        if len(rest):
            pairs = np.stack([known_by[lanes[rest]], cluster[rest]])
            kinds, which = np.unique(pairs, axis=1, return_inverse=True)
            for n, (knowledge, where) in enumerate(kinds.T.tolist()):
                ticks = self.knowledge[knowledge].get(where)
                if ticks is not None:
                    at = rest[which.ravel() == n]
                    result[at] = tick[at] <= ticks[column[at]]
        return result

    # ---- synchronisation -------------------------------------------------------------------

    def joined(self, lanes: np.ndarray, passers: list[np.ndarray] | None = None) -> None:
        """A barrier of one cluster: `lanes` know what any of them and of the passers knew."""
        everybody = np.concatenate([lanes, *(passers or [])])
        if (self.known_by[everybody] != self.known_by[lanes[0]]).any():
            self._learn(lanes, self.known_to(everybody))

    def known_to(self, lanes: np.ndarray) -> Knowledge:
        """What the lanes together know of other clusters."""
        total: Knowledge = {}
        for kind in np.unique(self.known_by[lanes]).tolist():
            total = merged(total, self.knowledge[kind])
        return total

    def learn(self, lanes: np.ndarray, knowledge: Knowledge) -> None:
        """The lanes acquired `knowledge` of other clusters."""
        for kind in np.unique(self.known_by[lanes]).tolist() if knowledge else ():
            mine = lanes[self.known_by[lanes] == kind]
            self._learn(mine, merged(self.knowledge[kind], knowledge))

    def _learn(self, lanes, knowledge: Knowledge) -> None:
        self.knowledge.append(knowledge)
        self.known_by[lanes] = len(self.knowledge) - 1
