"""mbarrier objects ("Parallel Synchronization and Communication Instructions: mbarrier").

An object counts pending arrivals and pending transaction bytes of its current phase; the phase
completes when both are zero, and the next begins with the count given at init.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .clocks import latest
from .global_races import Knowledge, merged

if TYPE_CHECKING:
    from .machine import Machine

MAX_TRANSACTION = 2**20 - 1


@dataclass
class Mbarrier:
    count: int
    pending: int
    column: int
    creator: tuple[int, int]
    transactions: int = 0
    phase: int = 0
    known: np.ndarray | None = None
    done: np.ndarray | None = None
    abroad: Knowledge = field(default_factory=dict)
    abroad_done: Knowledge = field(default_factory=dict)
    waiting: np.ndarray | None = None
    refused: np.ndarray | None = None  # lanes whose try_wait gave up in this phase
    posted: np.ndarray | None = None
    posted_done: np.ndarray | None = None


class TransactionBarriers:
    """All live mbarrier objects, keyed by their offset in the shared space."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.objects: dict[int, Mbarrier] = {}
        self.columns: dict[int, int] = {}
        self.init_fences: dict[int, int] = {}
        self.timed_out = np.zeros(machine.lane_count, bool)
        self.progress_at_timeout = -1

    # ---- life ------------------------------------------------------------------------------

    def init(self, lane: int, at: int, count: int) -> None:
        machine = self.machine
        if not 1 <= count <= MAX_TRANSACTION:
            machine.stop("mbarrier", f"init with count {count}", None)
        team, member = machine.team_and_member(lane)
        tick = int(machine.clocks.now[team, member])
        self.objects[at] = Mbarrier(count, count, self.column(at), (member, tick))

    def fence_init(self, lanes: np.ndarray) -> None:
        """fence.mbarrier_init: earlier inits become visible to the cluster."""
        for lane, tick in zip(lanes.tolist(), self.machine.ticks(lanes).tolist(), strict=True):
            self.init_fences[lane] = tick

    def overwritten(self, at: np.ndarray, size: int) -> np.ndarray:
        """Which of these stores hit a live object (8 bytes each)."""
        objects = np.fromiter(self.objects, np.int64, len(self.objects))
        distance = at[:, None] - objects
        return ((distance < 8) & (distance > -size)).any(axis=1)

    def column(self, at: int) -> int:
        """The clock column of asynchronous writes that signal this object."""
        machine = self.machine
        inside = at % (machine.shared.stride * machine.layout.cluster_size)
        if inside not in self.columns:
            self.columns[inside] = machine.clocks.add_engine()
        return self.columns[inside]

    def invalidate(self, lane: int, at: int) -> None:
        self.get(lane, at)
        del self.objects[at]

    def get(self, lane: int | None, at: int) -> Mbarrier:
        """The object at an offset; the lane must know of its init."""
        machine = self.machine
        barrier = self.objects.get(at)
        if barrier is None:
            machine.stop(
                "mbarrier", f"no initialised mbarrier at {machine.shared.describe(at)}", None
            )
        if lane is not None:
            team, member = machine.team_and_member(lane)
            creator, tick = barrier.creator
            if creator != member and not machine.clocks.knows(team, member, creator, tick):
                machine.find("race", "mbarrier used without synchronisation after its init", None)
            lanes = machine.block_lanes
            if creator // lanes != member // lanes:
                fenced = self.init_fences.get(team * machine.team_lanes + creator, 0)
                if fenced < tick:
                    message = "mbarrier of another block without fence.mbarrier_init after its init"
                    machine.find("missing-fence", message, None)
        return barrier

    def finish(self, team: int) -> None:
        """All threads of a cluster exited: transactions still expected are lost."""
        machine = self.machine
        size = machine.shared.stride * machine.layout.cluster_size
        for at in [at for at in self.objects if at // size == team]:
            barrier = self.objects.pop(at)
            if barrier.transactions != 0:
                machine.find(
                    "leftover",
                    f"exit with {barrier.transactions} bytes pending at the mbarrier of "
                    + machine.shared.describe(at),
                    None,
                )

    # ---- phases ----------------------------------------------------------------------------

    def arrive(
        self,
        lanes: np.ndarray,
        at: int,
        count: int,
        expect: int,
        release: bool,
        drop: bool = False,
        may_complete: bool = True,
    ) -> np.ndarray:
        """`lanes` arrive `count` times each, one after the other; returns the state each found:
        its phase, and 32 bits above that the pending count.  `drop`: later phases expect so many
        fewer."""
        machine = self.machine
        barrier = self.get(int(lanes[0]), at)
        if not 1 <= count <= MAX_TRANSACTION:
            machine.stop("mbarrier", f"arrival with count {count}", None)
        first = barrier.pending // count
        if 0 < first < len(lanes):  # the rest arrives in the next phase
            options = (at, count, expect, release, drop, may_complete)
            parts = (lanes[:first], lanes[first:])
            return np.concatenate([self.arrive(part, *options) for part in parts])
        pending = barrier.pending - count * np.arange(len(lanes))
        states = np.uint64(barrier.phase) + (pending.astype(np.uint64) << np.uint64(32))
        if release:
            team = int(lanes[0]) // machine.team_lanes
            known = machine.clocks.release(team, lanes % machine.team_lanes)
            barrier.known = latest(barrier.known, known)
            barrier.abroad = merged(barrier.abroad, machine.races.known_to(lanes))
        barrier.posted = machine.thread_sync.arrive(lanes, barrier.posted)
        if expect:
            self._transactions(barrier, expect * len(lanes), at)
        barrier.pending -= count * len(lanes)
        barrier.count -= count * len(lanes) if drop else 0
        if not may_complete and not barrier.pending and not barrier.transactions:
            machine.stop("mbarrier", "arrive.noComplete completes the phase", None)
        if barrier.pending < 0:
            machine.stop(
                "barrier-count",
                f"more arrivals than the {barrier.count} the mbarrier expects,"
                f" {machine.shared.describe(at)}",
                None,
            )
        machine.progress += 1
        self._update(barrier)
        return states

    def expect(self, lane: int, at: int, size: int) -> None:
        """More bytes are pending; fewer if `size` is negative."""
        barrier = self.get(lane, at)
        self._transactions(barrier, size, at)
        self._update(barrier)

    def complete(self, at: int, size: int, tick: int) -> None:
        """Asynchronous work wrote `size` bytes and signals."""
        barrier = self.get(None, at)
        known = np.zeros(self.machine.clocks.known.shape[2], np.int32)
        known[barrier.column] = tick
        barrier.known = latest(barrier.known, known)
        self._transactions(barrier, -size, at)
        self.machine.progress += 1
        self._update(barrier)

    def engine_arrive(self, at: int, known: np.ndarray) -> None:
        """One arrival by the tensor core when its work is complete."""
        barrier = self.objects.get(at)
        if barrier is None:
            where = self.machine.shared.describe(at)
            self.machine.find("invalidated", f"arrival at an invalidated mbarrier, {where}", None)
            return
        barrier.known = latest(barrier.known, known)
        barrier.posted = latest(barrier.posted, known)
        barrier.pending -= 1
        if barrier.pending < 0:
            self.machine.stop("barrier-count", "more arrivals than the mbarrier expects", None)
        self.machine.progress += 1
        self._update(barrier)

    def _transactions(self, barrier: Mbarrier, size: int, at: int) -> None:
        barrier.transactions += size
        if abs(barrier.transactions) > MAX_TRANSACTION:
            self.machine.stop(
                "mbarrier",
                f"transaction count {barrier.transactions}, {self.machine.shared.describe(at)}",
                None,
            )

    def _update(self, barrier: Mbarrier) -> None:
        if barrier.pending or barrier.transactions:
            return
        barrier.phase += 1
        barrier.pending = barrier.count
        barrier.refused = None
        if barrier.known is not None:
            barrier.done = latest(barrier.done, barrier.known)
        barrier.known = None
        if barrier.posted is not None:
            barrier.posted_done = latest(barrier.posted_done, barrier.posted)
        barrier.posted = None
        if barrier.abroad:
            barrier.abroad_done = merged(barrier.abroad_done, barrier.abroad)
            barrier.abroad = {}
        if barrier.waiting is not None:
            self.machine.retry(barrier.waiting)
            barrier.waiting = None

    # ---- waiting ---------------------------------------------------------------------------

    def finished(self, barrier: Mbarrier, parity: int) -> bool:
        """Whether the phase with this parity is the one before the current phase."""
        return (barrier.phase & 1) != (parity & 1)

    def await_phase(self, lanes: np.ndarray, at: int, barrier: Mbarrier, what: str) -> None:
        old = barrier.waiting
        barrier.waiting = lanes if old is None else np.concatenate([old, lanes])
        self.machine.block(
            lanes,
            f"mbarrier at {self.machine.shared.describe(at)}, {what}: {barrier.pending} of "
            f"{barrier.count} arrivals and {barrier.transactions} bytes pending",
        )

    def observed(self, lanes: np.ndarray, barrier: Mbarrier) -> None:
        """The lanes saw the phase complete (acquire)."""
        machine = self.machine
        machine.races.learn(lanes, barrier.abroad_done)
        if barrier.done is not None:
            team = int(lanes[0]) // machine.team_lanes
            known = barrier.done
            width = machine.clocks.known.shape[2]
            machine.clocks.acquire(
                team, lanes % machine.team_lanes, np.pad(known, (0, width - len(known)))
            )

    def gives_up(self, lanes: np.ndarray, barrier: Mbarrier) -> bool:
        """Whether a try_wait returns before its phase completes, as its time limit allows.

        Once per lane and phase, so that who asks again is suspended in the end."""
        before = barrier.refused
        if before is not None and np.isin(lanes, before).any():
            return False
        if not self.machine.picker.gives_up():
            return False
        barrier.refused = lanes if before is None else np.concatenate([before, lanes])
        return True

    def time_out(self) -> bool:
        """Suspended try_waits give up (their time limit), unless that helped nobody before."""
        machine = self.machine
        if machine.progress == self.progress_at_timeout:
            return False
        self.progress_at_timeout = machine.progress
        lanes = [b.waiting for b in self.objects.values() if b.waiting is not None]
        if not lanes:
            return False
        waiting = np.unique(np.concatenate(lanes))
        self.timed_out[waiting] = True
        machine.retry(waiting)
        return True
