"""Asynchronous work: `cp.async` groups, bulk copies, and when they land.

Data may move as early as at issue and as late as at the wait that covers it; the schedule says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .instruction import Instruction

if TYPE_CHECKING:
    from .machine import Machine


@dataclass(eq=False)
class Copies:
    """One `cp.async` instruction of many lanes."""

    ins: Instruction
    lanes: np.ndarray
    group: np.ndarray
    to: np.ndarray
    size: int
    data: np.ndarray | None  # bytes [n, size] still to be written, None when landed
    left: np.ndarray


@dataclass(eq=False)
class Job:
    """One bulk operation of one lane (or one warpgroup)."""

    ins: Instruction
    team: int
    run: Callable[[], None]
    done: bool = False
    after: Job | None = None


@dataclass(eq=False)
class BulkStore:
    """A bulk store in a bulk group: waited for before its source is reused and before exit, and
    without `.read` before its destination counts as written."""

    job: Job
    group: int
    source_free: Callable[[], None]
    written: Callable[[], None]
    read_done: bool = False


class AsyncWork:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.copies: list[Copies] = []
        self.committed = np.zeros(machine.lane_count, np.int64)
        self.jobs: list[Job] = []
        self.bulk: dict[int, list[BulkStore]] = {}
        self.bulk_committed: dict[int, int] = {}

    # ---- cp.async --------------------------------------------------------------------------

    def copy(self, lanes: np.ndarray, to: np.ndarray, data: np.ndarray) -> None:
        record = Copies(
            self.machine.at,
            lanes,
            self.committed[lanes],
            to,
            data.shape[1],
            data,
            np.ones(len(lanes), bool),
        )
        self.copies.append(record)
        if self.machine.picker.lands_now():
            self._land_copies(record, record.left)
            record.data = None

    def _land_copies(self, record: Copies, which: np.ndarray) -> None:
        if record.data is not None:
            self.machine.shared.store(record.to[which], _widest(record.data[which]))

    def commit(self, lanes: np.ndarray) -> None:
        """`cp.async.commit_group`: earlier uncommitted copies become the newest group."""
        self.committed[lanes] += 1

    def wait(
        self, lanes: np.ndarray, newest: int | None, records: list[Copies] | None = None
    ) -> None:
        """All but the `newest` committed groups of each lane are complete; None: everything,
        or everything among `records`."""
        limit = np.full(self.machine.lane_count, -1, np.int64)
        limit[lanes] = (
            self.committed[lanes] + 1 if newest is None else self.committed[lanes] - newest
        )
        for record in self.copies if records is None else records:
            due = record.left & (record.group < limit[record.lanes])
            if due.any():
                self._land_copies(record, due)
                self.machine.shared_races.landed(record.lanes[due], record.to[due], record.size)
                record.left &= ~due
        self.copies = [record for record in self.copies if record.left.any()]

    # ---- bulk ------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        if self.machine.picker.lands_now():
            self.finish(job)
        else:
            self.jobs.append(job)

    def finish(self, job: Job) -> None:
        """Land a job now, reported at its own instruction."""
        if job.done:
            return
        if job.after is not None:
            self.finish(job.after)
            job.after = None
        if job in self.jobs:
            self.jobs.remove(job)
        job.done = True
        at, self.machine.at = self.machine.at, job.ins
        job.run()
        self.machine.at = at

    def land_one(self) -> bool:
        if not self.jobs:
            return False
        pick = 0
        if self.machine.schedule.landing == "random":
            pick = int(self.machine.picker.random.integers(len(self.jobs)))
        self.finish(self.jobs[pick])
        return True

    def maybe_land(self) -> None:
        machine = self.machine
        if (
            self.jobs
            and machine.schedule.landing == "random"
            and machine.picker.random.random() < 0.2
        ):
            self.land_one()

    def land_all(self, team: int) -> None:
        for job in [job for job in self.jobs if job.team == team]:
            self.finish(job)

    def store(self, lane: int, job: Job, source_free, written) -> None:
        """A bulk store joins the lane's open bulk group."""
        group = self.bulk_committed.get(lane, 0)
        self.bulk.setdefault(lane, []).append(BulkStore(job, group, source_free, written))
        self.submit(job)

    def commit_bulk(self, lane: int) -> None:
        self.bulk_committed[lane] = self.bulk_committed.get(lane, 0) + 1

    def wait_bulk(self, lane: int, newest: int, read_only: bool) -> None:
        limit = self.bulk_committed.get(lane, 0) - newest
        left = []
        for store in self.bulk.get(lane, []):
            if store.group < limit:
                self.finish(store.job)
                if not store.read_done:
                    store.source_free()
                    store.read_done = True
                if not read_only:
                    store.written()
                    continue
            left.append(store)
        self.bulk[lane] = left

    # ---- exit ------------------------------------------------------------------------------

    def check_left(self) -> None:
        """Asynchronous work that nobody waited for when the kernel ended."""
        machine = self.machine
        machine.group = None
        for record in self.copies:
            machine.at = record.ins
            machine.find("leftover", "cp.async was never waited for before exit", None)
        for stores in self.bulk.values():
            for store in stores:
                if not store.read_done:
                    machine.at = store.job.ins
                    machine.find("leftover", "bulk store was never waited for before exit", None)
        for job in list(self.jobs):
            machine.at = job.ins
            machine.find("leftover", "asynchronous operation pending at exit", None)
            self.finish(job)


def _widest(data: np.ndarray) -> np.ndarray:
    """Bytes [n, size] as the widest units that divide the size."""
    size = data.shape[1]
    unit = next(u for u in (8, 4, 2, 1) if size % u == 0)
    return np.ascontiguousarray(data).view(f"u{unit}")
