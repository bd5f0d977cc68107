"""Happens-before, down to single lanes.

A *team* is a cluster (one block when there are no clusters).  Every lane has a clock that ticks
at each of its release operations, and knows for every lane of its team up to which tick that
lane's accesses happened before now.  Asynchronous engines get columns of their own after the
lanes: an access of theirs is known to a lane only after a wait that covers it.

`floor` is, per lane, the least tick it knows over all columns: a cheap sufficient test.
"""

from __future__ import annotations

import numpy as np

NEVER = np.int32(2**31 - 1)  # tick of an asynchronous write that nobody has waited for yet
ENGINE_TICK = 2**24  # engines count from here, so `floor` never vouches for them
_PADDING = np.int32(2**30)


def latest(a: np.ndarray | None, b: np.ndarray) -> np.ndarray:
    """The larger of each tick; engines that were added since know nothing earlier."""
    if a is None:
        return b
    width = max(len(a), len(b))
    return np.maximum(np.pad(a, (0, width - len(a))), np.pad(b, (0, width - len(b))))


class Clocks:
    def __init__(self, teams: int, lanes: int, threads: np.ndarray) -> None:
        """`threads[lanes]` is False for lanes that only pad a block to whole warps."""
        self.lanes = lanes
        self.engines = 0
        self.now = np.ones((teams, lanes), np.int32)
        self.now[:, ~threads] = _PADDING
        self.known = np.zeros((teams, lanes, lanes), np.int32)
        self.known[:, :, ~threads] = _PADDING
        self.floor = np.zeros((teams, lanes), np.int32)
        self.fenced = np.zeros((teams, lanes), np.int32)
        self.fence_view: np.ndarray | None = None  # of shared memory
        self.global_view: np.ndarray | None = None
        self.engine_ticks = np.zeros((teams, 0), np.int32)

    def add_engine(self) -> int:
        """A new column for an asynchronous engine; no lane knows anything of it yet."""
        teams, lanes, columns = self.known.shape
        self.engines += 1
        if self.lanes + self.engines > columns:
            more = np.zeros((teams, lanes, 16), np.int32)
            self.known = np.concatenate([self.known, more], axis=2)
            self.engine_ticks = np.concatenate([self.engine_ticks, more[:, 0]], axis=1)
        return self.lanes + self.engines - 1

    def tick_engine(self, team: int, column: int) -> int:
        self.engine_ticks[team, column - self.lanes] += 1
        return int(self.engine_ticks[team, column - self.lanes]) + ENGINE_TICK

    def knows(self, team, lane, column, tick) -> np.ndarray:
        return tick <= self.known[team, lane, column]

    def join_team(self, teams: np.ndarray) -> None:
        """Barrier over every lane of the given teams."""
        now = self.now[teams]
        self.known[teams, :, : self.lanes] = now[:, None, :]
        engines = self.known[teams, :, self.lanes :].max(axis=1)
        self.known[teams, :, self.lanes :] = engines[:, None, :]
        self.floor[teams] = now.min(axis=1)[:, None]
        self.now[teams] = now + 1

    def join(self, team: int, members: np.ndarray) -> None:
        """Barrier over some lanes of one team."""
        rows = self.known[team, members]
        rows[np.arange(len(members)), members] = self.now[team, members]
        joint = rows.max(axis=0)
        self.known[team, members] = joint
        self.floor[team, members] = joint[: self.lanes].min()
        self.now[team, members] += 1

    def join_warps(self, team: np.ndarray, lanes: np.ndarray) -> None:
        """`bar.warp.sync` of whole warps: team [w, 1], lanes [w, 32]."""
        rows = self.known[team, lanes]
        w = np.arange(len(lanes))[:, None]
        rows[w, np.arange(lanes.shape[1]), lanes] = self.now[team, lanes]
        joint = rows.max(axis=1)
        self.known[team, lanes] = joint[:, None, :]
        self.floor[team, lanes] = joint[:, : self.lanes].min(axis=1)[:, None]
        self.now[team, lanes] += 1

    def release(self, team: int, members: np.ndarray) -> np.ndarray:
        """What acquirers of a release by `members` will know; their clocks tick."""
        rows = self.known[team, members]
        rows[np.arange(len(members)), members] = self.now[team, members]
        self.now[team, members] += 1
        return rows.max(axis=0)

    def acquire(self, team: int, members: np.ndarray, known: np.ndarray) -> None:
        width = len(known)
        rows = np.maximum(self.known[team, members, :width], known)
        self.known[team, members, :width] = rows
        self.floor[team, members] = rows[:, : self.lanes].min(axis=1)

    def fence_proxy(self, team: np.ndarray, members: np.ndarray, spaces: set[str]) -> None:
        """`fence.proxy.async`: earlier generic accesses become visible to the async proxy."""
        known = self.known[team, members, : self.lanes]
        shape = (*self.known.shape[:2], self.lanes)
        if "shared" in spaces:
            self.fenced[team, members] = self.now[team, members]
            if self.fence_view is None:
                self.fence_view = np.zeros(shape, np.int32)
            self.fence_view[team, members] = known
        if "global" in spaces:
            if self.global_view is None:
                self.global_view = np.zeros(shape, np.int32)
            self.global_view[team, members] = known
        self.now[team, members] += 1

    def crossed(self, team, lane, writer: np.ndarray, tick: np.ndarray) -> np.ndarray:
        """Whether generic writes reached the async proxy, by a fence of writer or of `lane`."""
        done = tick <= self.fenced[team, writer]
        if self.fence_view is not None:
            done |= tick <= self.fence_view[team, lane, writer]
        return done

    def restart(self, team: int) -> None:
        """A new cluster starts in this slot: it knows nothing and nothing is known of it."""
        threads = self.now[team] < _PADDING
        self.known[team] = 0
        self.known[team][:, : self.lanes][:, ~threads] = _PADDING
        self.floor[team] = 0
        self.fenced[team] = 0
        for view in (self.fence_view, self.global_view):
            if view is not None:
                view[team] = 0
