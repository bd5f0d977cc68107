"""Flags: locations of global and shared memory through which threads synchronise.

"Release and Acquire Patterns": a release (`st.release`, `red.release`, or a strong write after a
fence) leaves behind what its thread knows; an acquire of the same location takes it over.  Strong
accesses are execution ordering operations for `tcgen05.fence` too, see `thread_sync.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .global_races import WIDE, Knowledge, merged

if TYPE_CHECKING:
    from .machine import Machine
    from .memory import Space


def _of_cluster(knowledge: Knowledge, cluster: int) -> Knowledge:
    return {cluster: knowledge[cluster]} if cluster in knowledge else {}


class Flags:
    """Global locations are named by their offset, those of shared memory by numbers below 0."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        # what was released at a location: to everybody, and to the releasing cluster only
        self.objects: dict[int, Knowledge] = {}
        self.nearby: dict[int, Knowledge] = {}
        self.fences: dict[int, dict[int, tuple[np.ndarray, int]]] = {}  # lane -> scope -> known
        self.unfenced_reads: dict[int, dict[int, int]] = {}

    def restart(self, team: int, lanes: slice) -> None:
        """New blocks start in these lanes: nothing is left in their shared memory."""
        for lane in range(lanes.start, lanes.stop):
            self.fences.pop(lane, None)
            self.unfenced_reads.pop(lane, None)
        size = self.machine.shared.stride * self.machine.layout.cluster_size
        for left in (self.objects, self.nearby):
            for flag in [flag for flag in left if flag < 0 and ~flag // size == team]:
                del left[flag]

    # ---- accesses --------------------------------------------------------------------------

    def read(self, lanes: np.ndarray, space: Space, at: np.ndarray, acquire: bool, scope) -> None:
        """A strong read of every lane may acquire what was released there."""
        if self.objects or self.nearby or self.machine.thread_sync.used:
            for lane, flag in zip(lanes.tolist(), self._flags(space, at), strict=True):
                self._read(lane, flag, acquire, scope)

    def write(self, lanes: np.ndarray, space: Space, at: np.ndarray, release: bool, scope) -> None:
        """A strong store of every lane may release to later acquirers, and ends what was left."""
        if release or self.objects or self.nearby or self.fences or self.machine.thread_sync.used:
            for lane, flag in zip(lanes.tolist(), self._flags(space, at), strict=True):
                self.objects.pop(flag, None)
                self.nearby.pop(flag, None)
                self.machine.thread_sync.clear(lane, flag)
                self._write(lane, flag, release, scope)

    def update(
        self, lanes: np.ndarray, space: Space, at: np.ndarray, order: str, scope, reads: bool
    ) -> None:
        """Read-modify-writes, one lane after the other; each extends the release sequence of
        what it read.  One without a result (`red`) reads nothing that its thread may act on."""
        release, acquire = order in ("release", "acq_rel"), order in ("acquire", "acq_rel")
        left = self.objects or self.nearby or self.fences or self.machine.thread_sync.used
        if release or acquire or left:
            for lane, flag in zip(lanes.tolist(), self._flags(space, at), strict=True):
                if reads or acquire:
                    self._read(lane, flag, acquire, scope)
                self._write(lane, flag, release, scope)

    def _flags(self, space: Space, at: np.ndarray) -> list[int]:
        return (~at if space is self.machine.shared else at).tolist()

    def fence(self, lanes: np.ndarray, scope: int) -> None:
        """`fence.acq_rel` and stronger: later strong writes release, earlier reads acquire."""
        for lane in lanes.tolist():
            for flag, read_scope in self.unfenced_reads.pop(lane, {}).items():
                self._take(lane, flag, min(scope, read_scope))
        clocks = self.machine.clocks
        team, member = self.machine.team_of(lanes)
        rows = clocks.known[team, member]
        rows[np.arange(len(lanes)), member] = clocks.now[team, member]
        clocks.now[team, member] += 1
        known_by = self.machine.races.known_by[lanes]
        for lane, row, known in zip(lanes.tolist(), rows, known_by, strict=True):
            self.fences.setdefault(lane, {})[scope] = (row, int(known))

    # ---- one lane --------------------------------------------------------------------------

    def _write(self, lane: int, flag: int, release: bool, scope: int) -> None:
        machine = self.machine
        team, member = machine.team_and_member(lane)
        cluster = int(machine.cluster_of_team[team])
        machine.thread_sync.post(lane, flag)
        for reach, (row, known) in self.fences.get(lane, {}).items():
            self._leave(flag, cluster, row, known, min(scope, reach))
        if release:
            row = machine.clocks.release(team, np.array([member]))
            self._leave(flag, cluster, row, int(machine.races.known_by[lane]), scope)

    def _leave(self, flag: int, cluster: int, row: np.ndarray, known: int, scope: int) -> None:
        """Add to what acquirers of a location learn."""
        left = merged(self.machine.races.knowledge[known], {cluster: row})
        if scope == WIDE:
            self.objects[flag] = merged(self.objects.get(flag, {}), left)
        else:
            left = _of_cluster(left, cluster)
            self.nearby[flag] = merged(self.nearby.get(flag, {}), left)

    def _read(self, lane: int, flag: int, acquire: bool, scope: int) -> None:
        self.machine.thread_sync.collect(lane, flag)
        if flag not in self.objects and flag not in self.nearby:
            return
        if acquire:
            self._take(lane, flag, scope)
        else:
            reads = self.unfenced_reads.setdefault(lane, {})
            reads[flag] = max(scope, reads.get(flag, scope))

    def _take(self, lane: int, flag: int, scope: int) -> None:
        """Learn what was released at a location, as far as the scopes reach."""
        machine = self.machine
        team, member = machine.team_and_member(lane)
        cluster = int(machine.cluster_of_team[team])
        left = self.objects.get(flag, {})
        left = left if scope == WIDE else _of_cluster(left, cluster)
        left = merged(left, _of_cluster(self.nearby.get(flag, {}), cluster))
        if cluster in left:
            machine.clocks.acquire(team, np.array([member]), left[cluster])
        machine.races.learn(np.array([lane]), left)
